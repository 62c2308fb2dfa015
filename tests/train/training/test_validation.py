"""What is fitted on dev, and how a pair is measured on it during training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import toy_config, toy_images, toy_texts

from rekd_train.evaluation.forward import measure, run_masks, run_selector
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.base import apply_policy
from rekd_train.training import losses, objectives
from rekd_train.training.runtime import Batch, Runtime
from rekd_train.training.validation import DevEvaluation, calibrate_bias, calibrate_policy

RULE = SelectionPolicy(bias=0.0, budget=0.5, minimum=1)
ARGMAX = {"decision": "argmax", "budget": None, "minimum": 0}
CPU = Runtime("cpu")


SCORES = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
SELECTABLE = torch.arange(12) < 6 + torch.arange(40)[:, None] % 7


def evaluation(pair, dev, with_rationale: bool = True, **changes) -> DevEvaluation:
    return DevEvaluation(toy_config(**changes), pair, pair.predictor, dev, CPU, with_rationale=with_rationale)


@pytest.mark.parametrize("target", [0.2, 0.3])
def test_the_bias_meets_the_target_and_lies_midway_between_two_scores(target):
    rule = RULE.model_copy(update={"bias": calibrate_bias(SCORES, SELECTABLE, RULE, 6, target)})
    mask, cut = apply_policy(SCORES, SELECTABLE, rule, 6), -rule.bias
    rate = (mask.sum(dim=1) / SELECTABLE.sum(dim=1)).mean().item()
    assert target <= rate < target + 1 / SELECTABLE.sum(dim=1).min() / 40
    above, below = SCORES[SELECTABLE & (cut < SCORES)].min(), SCORES[SELECTABLE & (cut > SCORES)].max()
    assert cut == pytest.approx(((above + below) / 2).item(), abs=2e-6)
    # a target that the budget forbids gives the largest useful bias
    bias = calibrate_bias(SCORES, SELECTABLE, RULE, 6, 0.9)
    assert bias == pytest.approx(-SCORES[SELECTABLE].min().item(), abs=1e-6)


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_what_is_served_is_what_is_measured(make):
    pair, _, dev = make()
    figures = evaluation(pair, dev)(10)
    calibrate_policy(toy_config(), pair, dev, CPU)
    measured = measure(pair, dev)
    for name, mine in (("accuracy", "accuracy"), ("macro_f1", "macro_f1"), ("rate", "selection_rate")):
        assert figures[mine] == pytest.approx(measured[name])
    assert figures["selection_rate"] == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(("make", "selection", "size"), [
    (toy_texts, {"continuity": 0.4}, 30), (toy_images, {"continuity": 0.4}, 30),
    (toy_texts, {"denominator": "all"}, 64), (toy_texts, {"penalty_per": "example"}, 30),
])  # fmt: skip
def test_the_extraction_loss_is_that_of_training_without_noise_on_batches_in_order(make, selection, size, monkeypatch):
    pair, _, dev = make()
    outputs = run_selector(pair, dev)
    with torch.no_grad():  # about half is kept: there are borders
        pair.selector.head[-1].bias[1] -= float(outputs.scores[outputs.selectable].median()) + 1e-4
    changes = {"selection": {"weight": 3.0, **ARGMAX, **selection}, "optimisation": {"batch_size": size}}
    figures = evaluation(pair, dev, **changes)(10)
    monkeypatch.setattr(objectives, "gumbel", lambda *given: 0.0)
    objective, values = objectives.RationaleObjective(toy_config(**changes), pair.eval(), CPU, 0), []
    for start in range(0, 64, size):
        rows = np.arange(start, min(start + size, 64))
        inputs = {name: torch.from_numpy(array) for name, array in dev.inputs(rows).items()}
        batch = Batch(torch.from_numpy(rows), inputs, torch.from_numpy(dev.labels[rows]), 0, 1, len(rows), len(rows))
        values.append(objective(batch)["loss"].item())
    assert figures["extraction_loss"] == pytest.approx(np.mean(values), rel=1e-5)


def test_class_weights_count_in_the_extraction_loss_as_in_training():
    pair, _, dev = toy_texts()
    dev = replace(dev, labels=(np.arange(64) % 8 == 0).astype(np.int64))
    figures = evaluation(pair, dev, with_rationale=False, data={"class_weights": "balanced"})(10)
    logits = run_masks(pair, dev, {"all": run_selector(pair, dev).selectable})["all"]
    each = losses.cross_entropy(torch.from_numpy(logits), torch.from_numpy(dev.labels), reduction="none").numpy()
    means = [each[dev.labels == label].mean() for label in (0, 1)]
    assert figures["extraction_loss"] == pytest.approx(np.mean(means), rel=1e-5), "both classes count alike"


def test_sampled_masks_differ_between_evaluations_and_follow_the_scores():
    pair, _, dev = toy_texts()
    evaluate, outputs = evaluation(pair, dev, stages={"evaluation": "sampled"}), run_selector(pair, dev)
    rates = [evaluate(step)["selection_rate"] for step in (1, 2, 1)]
    assert rates[0] == rates[2] != rates[1]
    expected = float((torch.sigmoid(outputs.scores) * outputs.selectable).sum(1).div(outputs.selectable.sum(1)).mean())
    assert rates[0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("decision", ["argmax", "top-k"])
def test_dev_is_measured_by_the_rule_that_will_be_stored(decision):
    pair, _, dev = toy_texts()
    read = run_selector(pair, dev)
    counts, kept = read.selectable.sum(dim=1), (read.selectable & (read.scores > 0)).sum(dim=1)
    if decision == "top-k":
        kept = (counts * 0.15).floor().clamp(min=1)
    selection = {"decision": decision, "budget": None, "minimum": int(decision == "top-k")}
    found, calibrated = (evaluation(pair, dev, selection=each)(10)["selection_rate"] for each in (selection, {}))
    assert found == pytest.approx((kept / counts).mean().item(), rel=1e-6)
    assert abs(calibrated - found) > 1e-3
