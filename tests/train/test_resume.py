"""A run that was killed goes on exactly where it was saved."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("toy_run.py")
STAGES = {"classifier_epochs": 2, "rationale_epochs": 3, "compact_epochs": 2, "save_every": 7, "evaluate_every": 1}
CONFIG = {"stages": STAGES}


def run(task: dict, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("whole") / "run.pt"
    done = run({"output": str(output), "config": CONFIG, "teacher": True})
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize("kill", [("distillation", 18), ("compact", 3), ("classifier", 15)])
def test_killed_and_resumed_equals_uninterrupted(kill, uninterrupted, tmp_path):
    task = {"output": str(tmp_path / "run.pt"), "state": str(tmp_path / "state"), "config": CONFIG, "teacher": True}
    killed = run({**task, "kill": kill})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run.pt").exists()
    resumed = run({**task, "resume": True})
    assert resumed.returncode == 0, resumed.stderr
    result = torch.load(tmp_path / "run.pt")
    stage, _, start = result["stages"][0]
    assert stage == kill[0] and start == kill[1] // 7 * 7, "goes on from the last save, not from the beginning"
    assert result["policy"] == uninterrupted["policy"]
    assert result["pair"].keys() == uninterrupted["pair"].keys()
    for name, tensor in uninterrupted["pair"].items():
        assert torch.equal(result["pair"][name], tensor), name
