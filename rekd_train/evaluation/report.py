"""The full evaluation of a checkpoint: every figure of one split in one document.

One pass of the selector and one of the predictor over the split, on every mask while a batch is at hand.
``REPORT_VERSION`` rises whenever a key changes its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split
from rekd_train.evaluation import forward, mask_metrics, metrics
from rekd_train.evaluation.forward import SelectorOutputs, decide, fill, run_masks, run_selector, run_split
from rekd_train.models.rationalizer import Rationalizer

REPORT_FORMAT = "rekd-evaluation"
REPORT_VERSION = 1
CURVE_RATES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def evaluate(rationalizer: Rationalizer, splits: Mapping[str, Split], *, split: str = "test", draws: int = 10,
             teacher: Rationalizer | None = None, risk: float = 0.05, seed: int = 0) -> dict[str, Any]:
    """Measure a pair on a split.

    Args:
        splits: at least ``split``; without 'dev', on which it is chosen, the abstain threshold is left out.
        draws: sampled rationales of each example; below 2 the sampled mode is left out.
        risk: share of wrong predictions that the abstain threshold allows.

    Returns JSON values; sections as docs/evaluation.md lists them. Sections without data are left out.
    ConfigError: the teacher reads other features or has other labels.
    """
    examples, labels, policy = splits[split], splits[split].labels, rationalizer.policy
    generator = torch.Generator().manual_seed(seed)
    selector = run_selector(rationalizer, examples)
    scores, selectable = selector.scores, selector.selectable
    stored = decide(scores, selectable, policy)
    masks = {"stored": stored}
    selects = policy.bias is not None or policy.budget is not None
    if selects:
        masks |= _other_masks(rationalizer, selector, stored, generator)
        sampled = forward.drawn(scores, selectable, max(draws, 0), generator)
        masks |= {f"draw_{i}": mask for i, mask in enumerate(sampled)}
    logits = run_masks(rationalizer, examples, masks)
    predicted = {name: found.argmax(axis=1) for name, found in logits.items()}
    counts = selectable.sum(dim=1).numpy()
    limits, positions = policy.limits(counts), rationalizer.preprocessor.positions
    selections, modes = {}, {}
    for name, mask in masks.items():
        selections[name] = metrics.selection_summary(mask.sum(dim=1).numpy(), counts, limits, positions)
        right = metrics.accuracy(logits[name], labels), metrics.macro_f1(predicted[name], labels)
        modes[name] = {"accuracy": right[0], "macro_f1": right[1], **selections[name]}
    report: dict[str, Any] = {
        "format": REPORT_FORMAT, "version": REPORT_VERSION, "split": split, "examples": len(examples),
        "policy": policy.model_dump(), "operator": rationalizer.predictor.operator,
        "classification": {
            "accuracy": modes["stored"]["accuracy"], "macro_f1": modes["stored"]["macro_f1"],
            "never_predicted": metrics.never_predicted(predicted["stored"], labels, rationalizer.labels),
            "per_class": metrics.per_class(predicted["stored"], labels, rationalizer.labels),
        },
        "calibration": _calibration(rationalizer, logits["stored"], splits, split, risk), "rate": selections["stored"],
    }  # fmt: skip
    if selects:
        report["modes"] = {name: modes[name] for name in ("stored", "argmax", "fill")}
        report["modes"] |= _sampled(masks, predicted, modes)
        report["baselines"] = {name: modes[name] for name in ("random", "first")}
        realised, accuracies = ([modes[f"rate_{rate}"][key] for rate in CURVE_RATES] for key in ("rate", "accuracy"))
        area = metrics.area_under_curve(CURVE_RATES, accuracies)
        report["curve"] = {"rates": list(CURVE_RATES), "realised": realised, "accuracies": accuracies, "area": area}
        report["selector"] = {  # does it keep as many as its probabilities promise? (mean counts)
            "expected_count": float(torch.where(selectable, torch.sigmoid(scores), 0.0).sum(dim=1).mean()),
            **{f"{name}_count": modes[name]["count_mean"] for name in ("argmax", "stored")},
        }
        arrays = scores.numpy(), selectable.numpy(), stored.numpy()
        report |= mask_metrics.token_figures(rationalizer.preprocessor, examples, stored.numpy())
        report |= mask_metrics.reason_figures(rationalizer.preprocessor, examples, *arrays)
    if teacher is not None:
        report["teacher"] = _teacher(rationalizer, teacher, examples, selector, stored, predicted["stored"])
    return report


def _teacher(student: Rationalizer, teacher: Rationalizer, split: Split, selector: SelectorOutputs, mask: Tensor,
             predicted: np.ndarray) -> dict[str, float]:
    """How far a student decides as its teacher does, both noise-free by their stored policies."""
    forward.check_comparable(student, teacher)
    theirs = run_selector(teacher, split)
    their_mask = decide(theirs.scores, theirs.selectable, teacher.policy)
    their_labels = run_masks(teacher, split, {"own": their_mask})["own"].argmax(axis=1)
    width = min(selector.scores.shape[1], theirs.scores.shape[1])  # one that may select padding is padded wider
    arrays = (selector.selectable, theirs.selectable, selector.scores, theirs.scores, mask, their_mask)
    mine, yours, scores, their_scores, mask, their_mask = (value[:, :width].numpy() for value in arrays)
    both = mine & yours
    shared = mask_metrics.overlap(mask & both, their_mask & both)
    return {
        "accuracy": float(np.mean(their_labels == split.labels)),
        "label_agreement": float(np.mean(their_labels == predicted)),
        **{f"mask_{name}": value for name, value in shared.items()},
        "score_rank_correlation": mask_metrics.rank_correlation(scores, their_scores, both),
        "selection_divergence": mask_metrics.selection_divergence(their_scores, scores, both),
    }


def _other_masks(rationalizer: Rationalizer, selector: SelectorOutputs, stored: Tensor,
                 generator: torch.Generator) -> dict[str, Tensor]:
    """By name: the noise-free modes beside the stored one, the baselines of equal size, the curve."""
    scores, selectable, policy = selector.scores, selector.selectable, rationalizer.policy
    budget = policy.budget
    if budget is None:  # no limit of its own: fill to the rate that it realises
        budget = float((stored.sum(dim=1) / selectable.sum(dim=1).clamp(min=1)).mean())
    return {
        "argmax": decide(scores, selectable, forward.ARGMAX),
        "fill": fill(scores, selectable, max(budget, 1e-6), policy.minimum),
        "random": forward.random_like(stored, selectable, generator), "first": forward.first_like(stored, selectable),
        **{f"rate_{rate}": fill(scores, selectable, rate) for rate in CURVE_RATES},
    }


def _calibration(rationalizer: Rationalizer, logits: np.ndarray, splits: Mapping[str, Split], split: str,
                 risk: float) -> dict[str, Any]:
    """Before and after the fitted temperature, and when to abstain: chosen on dev, realised on the split."""

    def confident(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        probabilities = rationalizer.probabilities(torch.from_numpy(logits)).numpy()
        return probabilities, probabilities.max(axis=1), probabilities.argmax(axis=1) == labels

    labels = splits[split].labels
    probabilities, confidence, correct = confident(logits, labels)
    plain = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    abstain = {"aurc": metrics.area_under_risk_coverage(confidence, correct)}
    if "dev" in splits:
        dev = logits if split == "dev" else run_split(rationalizer, splits["dev"]).class_logits
        threshold = metrics.abstain_threshold(*confident(dev, splits["dev"].labels)[1:], risk)
        answered = confidence >= (np.inf if threshold is None else threshold)
        wrong = float(1 - correct[answered].mean()) if answered.any() else 0.0
        realised = {"coverage": float(answered.mean()), "risk": wrong}
        abstain |= {"risk_wanted": risk, "threshold": threshold, **realised}
    return {
        "temperature": rationalizer.probability_temperature, **metrics.calibration(probabilities, labels),
        "uncalibrated": metrics.calibration(plain, labels), "abstain": abstain,
    }  # fmt: skip


def _sampled(masks: Mapping[str, Tensor], predicted: Mapping[str, np.ndarray],
             modes: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Means over the draws and how far they differ; nothing for less than two."""
    draws = [name for name in masks if name.startswith("draw_")]
    if len(draws) < 2:
        return {}
    each = [modes[name] for name in draws]
    return {"sampled": {
        "draws": len(draws), "accuracy_std": float(np.std([figures["accuracy"] for figures in each], ddof=1)),
        "flip_rate": mask_metrics.flip_rate(np.stack([predicted[name] for name in draws])),
        "mask_jaccard": mask_metrics.pairwise_jaccard(np.stack([masks[name].numpy() for name in draws])),
        **{key: float(np.mean([figures[key] for figures in each])) for key in each[0]},
    }}


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The report as lines of a table: section, figure, value."""
    rows = []
    for section, content in report.items():
        if not isinstance(content, dict) or section == "policy":
            continue
        if section == "curve":
            points = zip(content["rates"], content["accuracies"], strict=True)
            content = {f"accuracy at {rate:.0%}": value for rate, value in points} | {"area": content["area"]}
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
