"""What the user is told: commands that work, lists that end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rekd_train import errors
from rekd_train.errors import DISTRIBUTION, MissingExtraError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("folder", "here", "command"), [
    (ROOT, ROOT, "pip install -e '.[bench]'"),  # in the checkout
    (ROOT, ROOT.parent, f"pip install -e '{ROOT}[bench]'"),
    (ROOT / "docs", ROOT, f"pip install '{DISTRIBUTION}[bench]'"),  # without one
])  # fmt: skip
def test_the_fix_for_a_missing_package_works_where_the_user_stands(folder, here, command, monkeypatch):
    monkeypatch.setattr(errors, "_FOLDER", folder)
    monkeypatch.chdir(here)
    assert str(MissingExtraError("sklearn", "bench")).endswith(f"'sklearn' is not installed; fix: {command}")


def test_no_text_names_the_package_of_somebody_else():
    foreign = "rekd" + "["  # on PyPI a ransomware scanner
    found = subprocess.run(["git", "grep", "-nF", foreign], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""
    assert f'name = "{DISTRIBUTION}"' in (ROOT / "pyproject.toml").read_text()


def test_a_long_list_of_problems_says_how_many_more():
    assert errors.listed(f"row {n} is empty" for n in (1, 2)) == "row 1 is empty; row 2 is empty"
    assert errors.listed(map(str, range(20))).endswith("18; 19")
    assert errors.listed(map(str, range(1_021))).endswith("18; 19; and 1,001 more")
    assert errors.listed("abc", limit=2) == "a; b; and 1 more"
