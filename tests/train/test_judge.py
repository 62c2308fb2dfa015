"""The independent judge: reads any subset, shares nothing with the pair, and is trained once."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from toys import Recorder, ToyTexts, plain, toy_config

from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import RunConfig
from rekd_train.errors import CheckpointError
from rekd_train.evaluation.forward import run_masks
from rekd_train.judge import fit_judge, judge_figures, judge_run


def fresh(operator: str):
    return plain(make_rationalizer(11, operator=operator))


@pytest.mark.parametrize("operator", ["zero", "compact"])
def test_it_learns_to_read_what_is_shown_and_no_more(operator) -> None:
    judge = fresh(operator)
    train, dev = ToyTexts(judge, 512, 1), ToyTexts(judge, 128, 2)
    selector = copy.deepcopy(judge.selector.state_dict())
    fit_judge(toy_config(), judge, train, epochs=8)
    assert judge.predictor.operator == operator
    figures = judge_figures(judge, dev)
    assert figures["accuracy"] > 0.9
    assert 0.45 < figures["accuracy_random_10"] < figures["accuracy_random_50"] < 0.95
    assert all(torch.equal(value, selector[name]) for name, value in judge.selector.state_dict().items())

    cues = [judge.preprocessor.encode([word])[0].ids[1] for word in ("bad", "good")]
    width = int(dev.lengths.max())
    shown = torch.zeros(len(dev), width, dtype=torch.bool)
    for row in range(len(dev)):
        ids = dev.inputs([row])["input_ids"][0]
        shown[row, : len(ids)] = torch.from_numpy(np.isin(ids, cues))
    alone = run_masks(judge, dev, {"cue": shown})["cue"].argmax(axis=1)
    assert np.mean(alone == dev.labels) > 0.9  # a rationale of one word is enough for it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that records a run on a small table."""
    folder = tmp_path_factory.mktemp("judge")
    texts, labels = ToyTexts.words(80, 0)
    lines = ["text,label", *(f"{text},{('bad', 'good')[label]}" for text, label in zip(texts, labels, strict=True))]
    (folder / "texts.csv").write_text("\n".join(lines))
    pair = make_rationalizer(labels=("bad", "good"))
    config = RunConfig.model_validate(
        {
            "name": "toy", "data": {"name": "table", "path": str(folder / "texts.csv"), "max_length": 48},
            "predictor": pair.predictor.backbone.settings.model_dump(), "selector":
            pair.selector.backbone.settings.model_dump(),
        }
    )  # fmt: skip
    return checkpoint.save(pair, folder / "pair", training={"config": config.model_dump()}), folder


def test_it_is_trained_once_and_kept(trained) -> None:
    path, folder = trained
    recorder = Recorder()
    judge = judge_run(path, folder / "judge", epochs=0.5, observer=recorder, device="cpu")
    assert [name for name, *_ in recorder.stages] == ["judge"]
    again = Recorder()
    kept = judge_run(path, folder / "judge", observer=again, device="cpu")
    assert again.stages == []
    for mine, theirs in zip(judge.predictor.parameters(), kept.predictor.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    own = checkpoint.load(path)
    assert kept.predictor.operator == own.predictor.operator and kept.policy.bias is None
    assert set(checkpoint.read_metrics(folder / "judge")["dev"]) == {
        "accuracy", "accuracy_random_10", "accuracy_random_50",
    }  # fmt: skip
    # other weights than the pair's predictor, from the first layer to the last
    same = [torch.equal(a, b) for a, b in zip(own.predictor.parameters(), kept.predictor.parameters(), strict=True)
            if a.std() > 0]  # fmt: skip
    assert not any(same)


def test_a_judge_from_before_a_setting_is_still_taken(trained) -> None:
    path, folder = trained
    judge_run(path, folder / "old", epochs=0.5, device="cpu")
    file = folder / "old" / "config.json"
    description = json.loads(file.read_text())
    del description["training"]["judge"]["data"]["class_weights"]
    file.write_text(json.dumps(description))
    judge_run(path, folder / "old", device="cpu")
    with pytest.raises(CheckpointError, match="data differ"):
        judge_run(path, folder / "old", overrides=["data.class_weights=balanced"], device="cpu")


def test_the_judge_of_another_model_is_refused(trained) -> None:
    path, folder = trained
    judge_run(path, folder / "judge2", epochs=0.5, device="cpu")
    with pytest.raises(CheckpointError, match="epochs differ"):
        judge_run(path, folder / "judge2", epochs=1.0, device="cpu")
    with pytest.raises(CheckpointError, match="seed differ"):
        judge_run(path, folder / "judge2", overrides=["seed=5"], device="cpu")
    with pytest.raises(CheckpointError, match="but no judge"):
        judge_run(path, path, device="cpu")
