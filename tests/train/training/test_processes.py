"""Two processes on loopback train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run
from conftest import make_rationalizer
from toys import toy_config

from rekd_train import runs
from rekd_train.checkpoints import checkpoint
from rekd_train.data import DataSet, LabelledTexts
from rekd_train.training.runtime import Runtime

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("toy_run.py")
NEAR_TIE = 1e-3  # as far as the weights may differ at the end


def assert_close(mine: dict[str, float], theirs: dict[str, float], stage: str) -> None:
    for name in mine.keys() - {"examples_per_second"}:
        assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (stage, name)


def run_in_processes(command: list[str], processes: int) -> list[str]:
    """What each process printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    printed = []
    for process in started:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        printed.append(output)
    return printed


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
    output = tmp_path / "two.pt"
    run_in_processes([sys.executable, str(SCRIPT), json.dumps({**task, "output": str(output)})], 2)
    two = torch.load(output)
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


def test_of_two_processes_that_compact_one_measures_writes_and_reports(tmp_path):
    texts = (("good film", "bad plot")[number % 2] + f" seen {number} times" for number in range(200))
    rows = [json.dumps({"text": text, "label": "np"[number % 2]}) for number, text in enumerate(texts)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    data = {"name": "table", "path": str(tmp_path / "mine.jsonl"), "max_length": 32}
    pair = make_rationalizer(max_length=32, labels=("n", "p"))
    sizes = {role: getattr(pair, role).backbone.settings.model_dump() for role in ("selector", "predictor")}
    config = toy_config(data=data, stages={"compact_epochs": 1}, **sizes).model_dump()
    source = checkpoint.save(pair, tmp_path / "pair", training={"name": "toy", "config": config})
    program = [sys.executable, "-c", "from rekd_train.cli.main import main; main()", "compact", str(source)]
    options = ["--output", str(tmp_path / "made"), "--device", "cpu", "--json"]
    main, other = run_in_processes([*program, *options], 2)
    assert json.loads(main)["test"]["examples"] > 0 and other == ""
    assert checkpoint.load(tmp_path / "made").labels == ["n", "p"]


def test_no_process_waits_while_the_main_one_measures(monkeypatch, tmp_path):
    """Communication gives up on a process that waits for longer than its time-out."""
    events = []
    monkeypatch.setattr(runs, "measure", lambda *_: events.append("measure") or {})
    monkeypatch.setattr(Runtime, "close", lambda runtime: events.append("close"))
    monkeypatch.setattr(Runtime, "wait", lambda runtime: events.append("wait"))
    monkeypatch.setattr(runs, "fit", lambda *_, **__: events.append("fit"))
    monkeypatch.setattr(runs, "preprocessor_for", lambda config: make_rationalizer(max_length=32).preprocessor)
    texts = LabelledTexts(["good", "bad"] * 20, np.array([1, 0] * 20))
    data = DataSet({name: texts for name in ("train", "dev", "test")}, ("negative", "positive"), "made up")
    monkeypatch.setattr(runs, "load_data", lambda config: data)
    runs.train_run(toy_config(data={"max_length": 32}), tmp_path / "out", device="cpu")
    assert events == ["wait", "fit", "close", "measure", "measure"]
