"""What is fitted on dev, and how a pair is measured on it during training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import toy_config, toy_images, toy_texts

from rekd_train.evaluation.forward import measure, run_masks, run_selector
from rekd_train.inputs.policy import SelectionPolicy, cut_margins
from rekd_train.models.gates import apply_policy
from rekd_train.training import losses
from rekd_train.training.runtime import Runtime
from rekd_train.training.validation import DevEvaluation, calibrate_bias, calibrate_policy

RULE = SelectionPolicy(bias=0.0, budget=0.5, minimum=1)
ARGMAX = {"decision": "argmax", "budget": None, "minimum": 0}
CPU = Runtime("cpu")


@pytest.fixture
def readings():
    """(scores, selectable): (40, 12) with rows of 6 to 12 features."""
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    return scores, torch.arange(12) < 6 + torch.arange(40)[:, None] % 7


def evaluation(pair, dev, with_rationale: bool = True, **changes) -> DevEvaluation:
    return DevEvaluation(toy_config(**changes), pair, pair.predictor, dev, CPU, with_rationale=with_rationale)


@pytest.mark.parametrize("target", [0.2, 0.3])
def test_the_bias_meets_the_target_and_lies_midway_between_two_scores(readings, target):
    scores, selectable = readings
    rule = RULE.model_copy(update={"bias": calibrate_bias(scores, selectable, RULE, 6, target)})
    mask = apply_policy(scores, selectable, rule, 6)
    rate = (mask.sum(dim=1) / selectable.sum(dim=1)).mean().item()
    assert target <= rate < target + 1 / selectable.sum(dim=1).min() / 40
    cut = -rule.bias
    above, below = scores[selectable & (scores > cut)].min(), scores[selectable & (scores < cut)].max()
    assert cut == pytest.approx(((above + below) / 2).item(), abs=2e-6)
    near = torch.from_numpy(cut_margins(scores.numpy(), selectable.numpy(), rule)) < (above - below).item() / 4
    noise = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * (above - below) / 4
    changed = apply_policy(scores + noise, selectable, rule, 6) != mask
    assert not (changed & ~near).any()


def test_a_target_that_the_budget_forbids_gives_the_largest_useful_bias(readings):
    bias = calibrate_bias(*readings, RULE, 6, 0.9)
    assert bias == pytest.approx(-readings[0][readings[1]].min().item(), abs=1e-6)


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
    (toy_texts, {"continuity": 0.4}, 30),
    (toy_images, {"continuity": 0.4}, 30),
    (toy_texts, {"denominator": "all"}, 64),
    (toy_texts, {"penalty_per": "example"}, 30),
])  # fmt: skip
def test_the_extraction_loss_is_that_of_batches_in_order(make, selection, size):
    pair, _, dev = make()
    outputs = run_selector(pair, dev)
    with torch.no_grad():  # about half is kept: there are borders
        pair.selector.head[-1].bias[1] -= float(outputs.scores[outputs.selectable].median())
    selection = {"weight": 3.0, "continuity": 0.0, **ARGMAX, **selection}
    figures = evaluation(pair, dev, selection=selection, optimisation={"batch_size": size})(10)
    values = []
    pair.eval()
    with torch.no_grad():
        for start in range(0, 64, size):
            rows = list(range(start, min(start + size, 64)))
            inputs = {name: torch.from_numpy(array) for name, array in dev.inputs(rows).items()}
            logits, selectable = pair.selector_logits(inputs), pair.selectable(inputs)
            mask = selectable & (logits[..., 1] > logits[..., 0])
            kept, features = mask.sum(dim=1), selectable.sum(dim=1)
            if "denominator" in selection:
                features = torch.full_like(kept, 48)  # positions of the longest input
            rates = kept / features if "penalty_per" in selection else kept.sum() / features.sum()
            loss = losses.prediction_loss(pair.class_logits(inputs, mask), torch.from_numpy(dev.labels[rows]))
            borders = losses.discontinuity(mask.float(), selectable, 3 if make is toy_images else None)
            assert borders > 0
            values.append(float(loss + 3.0 * ((rates - 0.15) ** 2).mean() + selection["continuity"] * borders))
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
