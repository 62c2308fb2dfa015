"""Two processes on loopback train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_run

SCRIPT = Path(__file__).with_name("toy_run.py")
NEAR_TIE = 1e-3  # as far as the weights may differ at the end


def assert_close(mine: dict[str, float], theirs: dict[str, float], stage: str) -> None:
    for name in mine.keys() - {"examples_per_second"}:
        assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (stage, name)


def run_in_processes(task: dict, processes: int, output: Path) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), json.dumps({**task, "output": str(output)})]
    started = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    return torch.load(output)


@pytest.mark.parametrize(
    ("images", "config"),
    [
        (False, {"distillation": {"noise": "independent", "teacher_mask": "student"}}),
        (True, {"selection": {"penalty_per": "example", "penalty_on": "counts", "weight": 0.1, "target": 0.2,
                              "continuity": 0.5}}),
    ],
    ids=["batch shares, live teacher", "example counts, augmented images"],
)
def test_two_processes_give_the_losses_of_one(images, config, tmp_path):
    # 250 = 3 * 83 + 1: parts are unequal, and the last batch of an epoch leaves the second process nothing
    config = config | {
        "optimisation": {"batch_size": 83, "learning_rate": 1e-3, "gradient_clip": 0.5},
        "stages": {"evaluate_every": 1, "classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 2},
    }
    task = {"dropout": 0.0, "images": images, "augmented": images, "teacher": True, "config": config}
    one = toy_run.run(task)
    two = run_in_processes(task, 2, tmp_path / "two.pt")
    assert list(one["values"]) == list(two["values"]) == ["classifier", "selector", "distillation", "compact"]
    for stage, readings in one["values"].items():
        for mine, theirs in zip(readings, two["values"][stage], strict=True):
            assert_close(mine, theirs, stage)
    # sums in another order move weights by a rounding: only decisions that hang by less may differ
    decided = zip(one["decisions"], two["decisions"], strict=True)
    compared = 0
    for stage, readings in one["evaluations"].items():
        for mine, theirs in zip(readings, two["evaluations"][stage], strict=True):
            (my_mask, margins), (their_mask, _) = next(decided)
            clear = margins > NEAR_TIE
            assert torch.equal(my_mask[clear], their_mask[clear]), stage
            if torch.equal(my_mask, their_mask):
                assert_close(mine, theirs, stage)
                compared += 1
    assert compared > len(one["decisions"]) / 2, "near-ties are rare"
    for name, tensor in one["pair"].items():
        torch.testing.assert_close(two["pair"][name], tensor, rtol=0, atol=1e-3)
