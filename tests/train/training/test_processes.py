"""Two processes on loopback train as one does; a killed run goes on exactly where it was saved."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import toy_run
from toys import recorded_pair

from rekd_train import runs
from rekd_train.checkpoints import checkpoint
from rekd_train.checkpoints.recorded import recorded_config
from rekd_train.training.runtime import Runtime

pytestmark = pytest.mark.slow

SCRIPT = str(Path(toy_run.__file__))
NEAR_TIE = 1e-3  # as far as the weights may differ at the end


def run_in_processes(command: list[str], processes: int) -> list[str]:
    """What each process printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    own = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=variables, **pipes) for variables in own]
    printed = []
    for process in started:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        printed.append(output)
    return printed


@pytest.mark.parametrize(("images", "config"), [
    (True, {"stages": {"operator": "gather", "selector_warm_start": 2}}),
    (False, {"distillation": {"noise": "independent", "teacher_mask": "student"}}),
    (True, {"selection": {"penalty_per": "example", "penalty_on": "counts", "weight": 0.1, "target": 0.2,
                          "continuity": 0.5}}),
], ids=["gathered, augmented images", "batch shares, live teacher", "example counts, augmented images"])  # fmt: skip
def test_two_processes_give_the_losses_of_one(images, config, tmp_path):
    # 250 = 3 * 83 + 1: parts are unequal, and the last batch of an epoch leaves the second process nothing
    stages = {"evaluate_every": 1, "classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 2}
    optimisation = {"batch_size": 83, "learning_rate": 1e-3, "gradient_clip": 0.5}
    config = config | {"optimisation": optimisation, "stages": stages | config.get("stages", {})}
    task, output = {"dropout": 0.0, "images": images, "config": config}, tmp_path / "two.pt"
    one = toy_run.run(task)
    run_in_processes([sys.executable, SCRIPT, json.dumps({**task, "output": str(output)})], 2)
    two = torch.load(output)
    first = [] if "operator" in config["stages"] else ["classifier"]
    assert list(one["values"]) == list(two["values"]) == [*first, "selector", "distillation", "compact"]
    # sums in another order move weights by a rounding: on dev only decisions that hang by less may differ
    decided, compared = zip(one["decisions"], two["decisions"], strict=True), 0
    for log in ("values", "evaluations"):
        for stage, readings in one[log].items():
            for mine, theirs in zip(readings, two[log][stage], strict=True):
                if log == "evaluations":
                    (my_mask, margins), (their_mask, _) = next(decided)
                    clear = margins > NEAR_TIE
                    assert torch.equal(my_mask[clear], their_mask[clear]), stage
                    if not torch.equal(my_mask, their_mask):
                        continue
                    compared += 1
                for name in mine.keys() - {"examples_per_second"}:
                    assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (stage, name)
    assert compared > len(one["decisions"]) / 2, "near-ties are rare"
    for name, tensor in one["pair"].items():
        torch.testing.assert_close(two["pair"][name], tensor, rtol=0, atol=1e-3)


STAGES = {"classifier_epochs": 2, "rationale_epochs": 3, "compact_epochs": 2, "save_every": 7, "evaluate_every": 1}

@cache
def uninterrupted(operator: str) -> tuple[dict, dict]:
    """A task, and what it ends with."""
    votes = {"selector_warm_start": STAGES["classifier_epochs"]} if operator == "gather" else {}
    task = {"config": {"stages": STAGES | {"operator": operator} | votes}}
    return task, toy_run.run(task)


@pytest.mark.parametrize(("operator", "kill"), [
    ("zero", ("distillation", 18)), ("zero", ("compact", 3)), ("zero", ("classifier", 15)),
    ("gather", ("selector", 15)), ("gather", ("distillation", 18)),
])  # fmt: skip
def test_killed_and_resumed_equals_uninterrupted(operator, kill, tmp_path):
    task, whole = uninterrupted(operator)
    task = {**task, "state": str(tmp_path)}
    command = [sys.executable, SCRIPT, json.dumps({**task, "kill": kill})]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for starts_at in ([(kill[0], kill[1] // 7 * 7)], []):  # the last save; then the end, which is saved, too
        result = toy_run.run({**task, "resume": True})
        assert [(stage, start) for stage, _, start in result["stages"]][:1] == starts_at
        assert result["policy"] == whole["policy"]
        torch.testing.assert_close(result["pair"], whole["pair"], rtol=0, atol=0)


def test_of_two_processes_that_compact_one_measures_writes_and_reports(tmp_path):
    program = [sys.executable, "-c", "from rekd_train.cli.main import main; main()", "compact"]
    made = str(tmp_path / "made")
    main, other = run_in_processes([*program, str(recorded_pair(tmp_path)), "-o", made, "--device", "cpu", "--json"], 2)
    assert json.loads(main)["test"]["examples"] > 0 and other == ""
    assert checkpoint.load(tmp_path / "made").labels == ["bad", "good"]


def test_no_process_waits_while_the_main_one_measures(monkeypatch, tmp_path):
    """Communication gives up on a process that waits for longer than its time-out."""
    source, events = recorded_pair(tmp_path), []
    monkeypatch.setattr(runs, "measure", lambda *_: events.append("measure") or {})
    monkeypatch.setattr(Runtime, "close", lambda runtime: events.append("close"))
    monkeypatch.setattr(Runtime, "wait", lambda runtime: events.append("wait"))
    monkeypatch.setattr(runs, "fit", lambda *_, **__: events.append("fit"))
    preprocessor = checkpoint.load(source).preprocessor
    monkeypatch.setattr(runs, "preprocessor_for", lambda config: preprocessor)
    runs.train_run(recorded_config(source), tmp_path / "out", device="cpu")
    assert events == ["wait", "fit", "close", "measure", "measure"]
