"""The full evaluation of a checkpoint: every figure of one split in one document.

One pass of the selector and one of the predictor over the split; the predictor answers to every mask while a
batch is at hand. ``REPORT_VERSION`` rises whenever a key changes its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split
from rekd_train.evaluation import metrics
from rekd_train.evaluation.agreement import human_figures, teacher_figures, token_figures
from rekd_train.evaluation.forward import (
    ARGMAX,
    decide,
    drawn,
    fill,
    first_like,
    random_like,
    run_masks,
    run_selector,
    run_split,
)
from rekd_train.evaluation.mask_metrics import flip_rate, pairwise_jaccard
from rekd_train.models.rationalizer import Rationalizer

REPORT_FORMAT = "rekd-evaluation"
REPORT_VERSION = 1
CURVE_RATES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def evaluate(
    rationalizer: Rationalizer,
    splits: Mapping[str, Split],
    *,
    split: str = "test",
    draws: int = 10,
    teacher: Rationalizer | None = None,
    risk: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a pair on a split.

    Args:
        splits: at least ``split``; without 'dev', on which it is chosen, the abstain threshold is left out.
        draws: sampled rationales of each example; below 2 the sampled mode is left out.
        teacher: compared with, mask by mask and label by label.
        risk: share of wrong answers that the abstain threshold allows.
        seed: of the draws and of the random baseline.

    Returns:
        JSON values; sections as docs/evaluation.md lists them. Sections without data are left out.

    Raises:
        ConfigError: the teacher reads other features or has other labels.
    """
    examples, labels = splits[split], splits[split].labels
    generator = torch.Generator().manual_seed(seed)
    selector = run_selector(rationalizer, examples)
    scores, selectable = selector.scores, selector.selectable
    stored = decide(scores, selectable, rationalizer.policy)
    masks = {"stored": stored}
    selects = rationalizer.policy.bias is not None or rationalizer.policy.budget is not None
    if selects:
        masks |= _other_masks(rationalizer, scores, selectable, stored, generator)
        masks |= {f"draw_{i}": m for i, m in enumerate(drawn(scores, selectable, max(draws, 0), generator))}
    logits = run_masks(rationalizer, examples, masks)
    modes = {name: _mode(rationalizer, mask, logits[name], selectable, labels) for name, mask in masks.items()}
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "split": split,
        "examples": len(examples),
        "policy": rationalizer.policy.model_dump(),
        "operator": rationalizer.predictor.operator,
        "classification": _classification(logits["stored"], labels, rationalizer.labels),
        "calibration": _calibration(rationalizer, logits["stored"], splits, split, risk),
        "rate": _rates(rationalizer, stored, selectable),
    }
    if selects:
        report["modes"] = {name: modes[name] for name in ("stored", "argmax", "fill")} | _sampled(masks, logits, modes)
        report["baselines"] = {name: modes[name] for name in ("random", "first")}
        report["curve"] = _curve([modes[f"rate_{rate}"] for rate in CURVE_RATES])
        report["selector"] = _selector_calibration(scores, selectable, stored, masks["argmax"])
        report |= token_figures(rationalizer.preprocessor, examples, stored)
        report |= human_figures(rationalizer.preprocessor, examples, scores, selectable, stored)
    if teacher is not None:
        report["teacher"] = teacher_figures(rationalizer, teacher, examples, selector, stored, logits["stored"])
    return report


def _other_masks(
    rationalizer: Rationalizer, scores: Tensor, selectable: Tensor, stored: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """By name: the noise-free modes beside the stored one, the baselines of equal size, the curve."""
    policy = rationalizer.policy
    budget = policy.budget
    if budget is None:  # no limit of its own: fill to the rate that it realises
        budget = float((stored.sum(dim=1) / selectable.sum(dim=1).clamp(min=1)).mean())
    return {
        "argmax": decide(scores, selectable, ARGMAX),
        "fill": fill(scores, selectable, max(budget, 1e-6), policy.minimum),
        "random": random_like(stored, selectable, generator),
        "first": first_like(stored, selectable),
        **{f"rate_{rate}": fill(scores, selectable, rate) for rate in CURVE_RATES},
    }


def _classification(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    predicted = logits.argmax(axis=1)
    return {
        "accuracy": metrics.accuracy(logits, labels),
        "macro_f1": metrics.macro_f1(predicted, labels),
        "never_predicted": metrics.never_predicted(predicted, labels, names),
        "per_class": metrics.per_class(predicted, labels, names),
    }


def _calibration(
    rationalizer: Rationalizer, logits: np.ndarray, splits: Mapping[str, Split], split: str, risk: float
) -> dict[str, Any]:
    """Before and after the fitted temperature, and when to abstain: chosen on dev, realised on the split."""
    labels = splits[split].labels
    probabilities = rationalizer.probabilities(torch.from_numpy(logits)).numpy()
    plain = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    abstain = {"aurc": metrics.area_under_risk_coverage(confidence, correct)}
    if "dev" in splits:
        dev_logits = logits if split == "dev" else run_split(rationalizer, splits["dev"]).class_logits
        dev = rationalizer.probabilities(torch.from_numpy(dev_logits)).numpy()
        right = dev.argmax(axis=1) == splits["dev"].labels
        threshold = metrics.abstain_threshold(dev.max(axis=1), right, risk)
        answered = confidence >= (np.inf if threshold is None else threshold)
        abstain |= {
            "risk_wanted": risk,
            "threshold": threshold,
            "coverage": float(answered.mean()),
            "risk": float(1 - correct[answered].mean()) if answered.any() else 0.0,
        }
    return {
        "temperature": rationalizer.probability_temperature,
        **_scores(probabilities, labels),
        "uncalibrated": _scores(plain, labels),
        "abstain": abstain,
    }


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "nll": metrics.negative_log_likelihood(probabilities, labels),
        "brier": metrics.brier_score(probabilities, labels),
        "ece": metrics.expected_calibration_error(probabilities, labels),
        "ece_equal_mass": metrics.expected_calibration_error(probabilities, labels, equal_mass=True),
    }


def _rates(rationalizer: Rationalizer, mask: Tensor, selectable: Tensor) -> dict[str, float]:
    kept, counts = mask.sum(dim=1).numpy(), selectable.sum(dim=1).numpy()
    limits, positions = rationalizer.policy.limits(counts), rationalizer.preprocessor.positions
    return metrics.rate_summary(kept, counts, limits, positions)


def _mode(
    rationalizer: Rationalizer, mask: Tensor, logits: np.ndarray, selectable: Tensor, labels: np.ndarray
) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy(logits, labels),
        "macro_f1": metrics.macro_f1(logits.argmax(axis=1), labels),
        **_rates(rationalizer, mask, selectable),
    }


def _sampled(
    masks: Mapping[str, Tensor], logits: Mapping[str, np.ndarray], modes: Mapping[str, dict[str, float]]
) -> dict[str, Any]:
    """Means over the draws and how far they differ; nothing for less than two."""
    draws = [name for name in masks if name.startswith("draw_")]
    if len(draws) < 2:
        return {}
    each = [modes[name] for name in draws]
    sampled = {
        "draws": len(draws),
        "accuracy_std": float(np.std([figures["accuracy"] for figures in each], ddof=1)),
        "flip_rate": flip_rate(np.stack([logits[name].argmax(axis=1) for name in draws])),
        "mask_jaccard": pairwise_jaccard(np.stack([masks[name].numpy() for name in draws])),
        **{key: float(np.mean([figures[key] for figures in each])) for key in each[0]},
    }
    return {"sampled": sampled}


def _curve(modes: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Accuracy given exactly so many of the features, the highest scores first; a mode for each of CURVE_RATES."""
    accuracies = [mode["accuracy"] for mode in modes]
    return {
        "rates": list(CURVE_RATES),
        "realised": [mode["rate"] for mode in modes],
        "accuracies": accuracies,
        "area": metrics.area_under_curve(CURVE_RATES, accuracies),
    }


def _selector_calibration(scores: Tensor, selectable: Tensor, stored: Tensor, argmax: Tensor) -> dict[str, float]:
    """Does the selector keep as many as its probabilities promise? (mean counts)"""
    return {
        "expected_count": float(torch.where(selectable, torch.sigmoid(scores), 0.0).sum(dim=1).mean()),
        "argmax_count": float(argmax.sum(dim=1).float().mean()),
        "stored_count": float(stored.sum(dim=1).float().mean()),
    }


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The report as lines of a table: section, figure, value."""
    rows = []
    for section, content in report.items():
        if not isinstance(content, dict) or section == "policy":
            continue
        if section == "curve":
            points = zip(content["rates"], content["accuracies"], strict=True)
            rows += [(section, f"accuracy at {rate:.0%}", shown(value)) for rate, value in points]
            rows.append((section, "area", shown(content["area"])))
            continue
        rows += [(section, name, shown(value)) for name, value in _flat(content)]
    return rows


def shown(value: Any) -> str:
    """A figure as a table shows it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in content.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
