"""What is fitted on dev, and which state of a stage is the best on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import toy_config, toy_images, toy_texts

from rekd_train.evaluation.forward import measure, run_masks, run_selector
from rekd_train.inputs.policy import SelectionPolicy, cut_margins
from rekd_train.models.gates import apply_policy
from rekd_train.training import losses
from rekd_train.training.runtime import Runtime
from rekd_train.training.state import Best
from rekd_train.training.validation import DevEvaluation, calibrate_bias, calibrate_policy, read_selector

RULE = SelectionPolicy(bias=0.0, budget=0.5, minimum=1)


@pytest.fixture
def readings():
    """(scores, selectable): (40, 12) with rows of 6 to 12 features."""
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    return scores, torch.arange(12) < 6 + torch.arange(40)[:, None] % 7


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
    scores, selectable = readings
    bias = calibrate_bias(scores, selectable, RULE, 6, 0.9)
    assert bias == pytest.approx(-scores[selectable].min().item(), abs=1e-6)


CPU = Runtime("cpu")


def offered(metric: str, *values: tuple[float, float], rate: float | None = 0.1) -> list[bool]:
    best, rated = Best(metric), {} if rate is None else {"rate": rate}
    return [best.offer(i, {"accuracy": a, "extraction_loss": e, **rated}, {}) for i, (a, e) in enumerate(values)]


def test_accuracy_decides_and_the_loss_between_equals():
    assert offered("accuracy", (0.5, 1.0), (0.6, 2.0), (0.6, 2.0), (0.6, 1.9), (0.5, 0.1)) == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_macro_f1_decides_where_it_is_asked_for():
    best = Best("macro_f1")
    figures = [{"accuracy": a, "macro_f1": f, "extraction_loss": 1.0} for a, f in ((0.9, 0.5), (0.8, 0.6), (0.95, 0.6))]
    assert [best.offer(step, each, {}) for step, each in enumerate(figures)] == [True, True, False]


def test_the_paper_s_criterion_rounds_and_lets_the_later_of_equals_win():
    assert offered("extraction_loss", (0, 0.5004), (1, 0.5001), (1, 0.5012), (0, 0.4996)) == [True, True, False, True]
    assert offered("extraction_loss", (1, float("nan")), (1, 0.3)) == [False, True]
    plain = (0, 0.5001), (1, 0.5004), (1, 0.5001)  # a classifier's losses are not rounded
    assert offered("extraction_loss", *plain, rate=None) == [True, False, True]


def test_the_best_is_a_copy_and_survives_saving():
    weights = {"w": torch.zeros(2)}
    best = Best("accuracy")
    best.offer(3, {"accuracy": 0.5, "extraction_loss": 1.0}, weights)
    weights["w"] += 1
    again = Best("accuracy")
    again.restore(best.state())
    assert torch.equal(again.weights["w"], torch.zeros(2)) and again.step == 3
    assert not again.offer(4, {"accuracy": 0.4, "extraction_loss": 1.0}, weights) and again.since == 1


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_what_is_served_is_what_is_measured(make):
    pair, _, dev = make()
    config = toy_config(optimisation={"batch_size": 30})
    figures = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=True)(10)
    calibrate_policy(config, pair, dev)
    measured = measure(pair, dev)
    for name in ("accuracy", "macro_f1", "rate"):
        assert figures[name] == pytest.approx(measured[name])
    assert figures["rate"] == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_the_extraction_loss_is_that_of_batches_in_order(make):
    pair, _, dev = make()
    outputs = run_selector(pair, dev)
    with torch.no_grad():  # about half is kept: there are borders
        pair.selector.head[-1].bias[1] -= float(outputs.scores[outputs.selectable].median())
    selection = {"weight": 3.0, "continuity": 0.4, "decision": "argmax", "budget": None, "minimum": 0}
    config = toy_config(selection=selection, optimisation={"batch_size": 30})
    figures = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=True)(10)
    values = []
    pair.eval()
    with torch.no_grad():
        for start in (0, 30, 60):
            rows = list(range(start, min(start + 30, 64)))
            inputs = {name: torch.from_numpy(array) for name, array in dev.inputs(rows).items()}
            logits, selectable = pair.selector_logits(inputs), pair.selectable(inputs)
            mask = selectable & (logits[..., 1] > logits[..., 0])
            rate = mask.sum() / selectable.sum()
            loss = losses.prediction_loss(pair.class_logits(inputs, mask), torch.from_numpy(dev.labels[rows]))
            borders = losses.discontinuity(mask.float(), selectable, 3 if make is toy_images else None)
            assert borders > 0
            values.append(float(loss + 3.0 * (rate - config.selection.target) ** 2 + 0.4 * borders))
    assert figures["extraction_loss"] == pytest.approx(sum(values) / 3, rel=1e-5)


def test_the_extraction_loss_counts_all_positions_as_training_does():
    pair, _, dev = toy_texts()
    selection = {"weight": 1.0, "denominator": "all", "decision": "argmax", "budget": None, "minimum": 0}
    config = toy_config(selection=selection, optimisation={"batch_size": 64})
    figures = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=True)(10)
    outputs = run_selector(pair, dev)
    mask = outputs.selectable & (outputs.scores > 0)
    assert mask.shape[1] < pair.preprocessor.positions == 48
    rate = float(mask.sum() / (len(dev) * 48))
    logits = torch.from_numpy(run_masks(pair, dev, {"own": mask})["own"])
    loss = float(losses.prediction_loss(logits, torch.from_numpy(dev.labels)))
    assert figures["extraction_loss"] == pytest.approx(loss + (rate - config.selection.target) ** 2, rel=1e-5)


def test_class_weights_count_in_the_extraction_loss_as_in_training():
    pair, _, dev = toy_texts()
    dev.labels = (np.arange(64) % 8 == 0).astype(np.int64)
    config = toy_config(data={"class_weights": "balanced"}, optimisation={"batch_size": 64})
    figures = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=False)(10)
    selectable = run_selector(pair, dev).selectable
    logits = torch.from_numpy(run_masks(pair, dev, {"all": selectable})["all"]).log_softmax(dim=1)
    each = -logits[torch.arange(64), torch.from_numpy(dev.labels)].numpy()
    means = [each[dev.labels == label].mean() for label in (0, 1)]
    assert figures["extraction_loss"] == pytest.approx(np.mean(means), rel=1e-5), "both classes count alike"


def test_sampled_masks_differ_between_evaluations_and_follow_the_scores():
    pair, _, dev = toy_texts()
    config = toy_config(stages={"evaluation": "sampled"})
    evaluate = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=True)
    rates = [evaluate(step)["rate"] for step in (1, 2, 1)]
    assert rates[0] == rates[2] != rates[1]
    outputs = run_selector(pair, dev)
    expected = float((torch.sigmoid(outputs.scores) * outputs.selectable).sum(1).div(outputs.selectable.sum(1)).mean())
    assert rates[0] == pytest.approx(expected, abs=0.05)


def test_the_selector_is_read_as_evaluation_reads_it():
    pair, _, dev = toy_texts()
    mine, theirs = read_selector(pair, dev, CPU, "fp32"), run_selector(pair, dev)
    assert torch.equal(mine.selectable, theirs.selectable)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decision", ["argmax", "top-k"])
def test_dev_is_measured_by_the_rule_that_will_be_stored(decision):
    pair, _, dev = toy_texts()
    read = run_selector(pair, dev)
    counts = read.selectable.sum(dim=1)
    kept = (read.selectable & (read.scores > 0)).sum(dim=1)
    if decision == "top-k":
        kept = (counts * 0.15).floor().clamp(min=1)
    config = toy_config(selection={"decision": decision, "budget": None, "minimum": int(decision == "top-k")})
    figures = DevEvaluation(config, pair, pair.predictor, dev, CPU, with_rationale=True)(10)
    assert figures["rate"] == pytest.approx((kept / counts).mean().item(), rel=1e-6)
    served = DevEvaluation(toy_config(), pair, pair.predictor, dev, CPU, with_rationale=True)(10)["rate"]
    assert abs(served - figures["rate"]) > 1e-3
