"""The independent judge: reads any subset, shares nothing with the pair, and is trained once."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from toys import Recorder, ToyTexts, plain, recorded_pair, toy_config

from rekd_train.checkpoints import checkpoint
from rekd_train.errors import CheckpointError
from rekd_train.evaluation.forward import run_masks, run_selector
from rekd_train.judge import fit_judge, judge_figures, judge_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("operator", ["zero", "compact"])
def test_it_learns_to_read_what_is_shown_and_no_more(operator) -> None:
    judge = plain(make_rationalizer(11, operator=operator))
    train, dev = ToyTexts.split(judge, 512, 1), ToyTexts.split(judge, 128, 2)
    selector = copy.deepcopy(judge.selector.state_dict())
    fit_judge(toy_config(), judge, train, epochs=8)
    figures = judge_figures(judge, dev)
    assert judge.predictor.operator == operator and figures["accuracy"] > 0.9
    assert 0.45 < figures["accuracy_random_10"] < figures["accuracy_random_50"] < 0.95
    assert all(torch.equal(value, selector[name]) for name, value in judge.selector.state_dict().items())

    cues = [judge.preprocessor.encode([word])[0].ids[1] for word in ("bad", "good")]
    shown = torch.zeros_like(run_selector(judge, dev).selectable)
    for row in range(len(dev)):
        ids = dev.inputs([row])["input_ids"][0]
        shown[row, : len(ids)] = torch.from_numpy(np.isin(ids, cues))
    alone = run_masks(judge, dev, {"cue": shown})["cue"].argmax(axis=1)
    assert np.mean(alone == dev.labels) > 0.9  # a rationale of one word is enough for it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that records a run, its judge, and what its training was told."""
    path, observer = recorded_pair(tmp_path_factory.mktemp("judge")), Recorder()
    return path, judge_run(path, path.with_name("judge"), epochs=0.5, observer=observer, device="cpu"), observer


def test_it_is_trained_once_and_kept(trained) -> None:
    path, judge, observer = trained
    kept = judge_run(path, path.with_name("judge"), observer=observer, device="cpu")
    assert [name for name, *_ in observer.stages] == ["judge"]
    own = checkpoint.load(path)
    for mine, theirs, pairs in zip(*(each.predictor.parameters() for each in (judge, kept, own)), strict=True):
        # other weights than the pair's predictor, from the first layer to the last
        assert torch.equal(mine, theirs) and not (pairs.std() > 0 and torch.equal(mine, pairs))
    assert kept.predictor.operator == own.predictor.operator and kept.policy.bias is None
    dev = checkpoint.read_metrics(path.with_name("judge"))["dev"]
    assert set(dev) == {"accuracy", "accuracy_random_10", "accuracy_random_50"}
    file = path.with_name("judge") / "config.json"
    description = json.loads(file.read_text())
    del description["training"]["judge"]["data"]["class_weights"]
    file.write_text(json.dumps(description))
    judge_run(path, file.parent, device="cpu")  # one from before a setting is still taken


@pytest.mark.parametrize(("options", "match"), [
    ({"epochs": 1.0}, "epochs differ"), ({"overrides": ["seed=5"]}, "seed differ"),
    ({"overrides": ["data.class_weights=balanced"]}, "data differ"), ({"output": "pair"}, "but no judge"),
])  # fmt: skip
def test_the_judge_of_another_model_is_refused(options, match, trained) -> None:
    with pytest.raises(CheckpointError, match=match):
        judge_run(trained[0], trained[0].with_name(options.pop("output", "judge")), device="cpu", **options)
