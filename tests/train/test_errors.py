"""The fix for a missing package is a command that works where the user stands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rekd_train import errors
from rekd_train.errors import DISTRIBUTION, MissingExtraError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed_in(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "_FOLDER", tmp_path)
    return tmp_path


def test_in_the_checkout_it_is_the_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    fix = "'sklearn' is not installed; fix: pip install -e '.[bench]'"
    assert str(MissingExtraError("sklearn", "bench")).endswith(fix)


def test_elsewhere_it_names_the_checkout(installed_in, monkeypatch):
    (installed_in / "pyproject.toml").touch()
    monkeypatch.chdir(ROOT)
    assert errors.install_command("bench") == f"pip install -e '{installed_in}[bench]'"


def test_without_a_checkout_it_names_the_distribution(installed_in):
    assert errors.install_command("bench") == f"pip install '{DISTRIBUTION}[bench]'"


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
