"""Leakage probes (definition 4.4): does the pattern of a rationale tell the label, whatever its content?

A selector and a predictor that are trained together can agree on a code: early words for one class, late ones for the
other. The answer is then right and its rationale means nothing. Each probe takes the content away and looks at what
is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_deploy.bench.judges import random_masks
from rekd_deploy.bench.mask_probe import Probe, mask_probe
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.subject import Selected, Subject, classified, fitted
from rekd_deploy.bench.verdicts import leak_check, not_applicable, paired

if TYPE_CHECKING:
    from rekd_deploy.bench.judges import Judged

MASK_ONLY = "the pattern alone does not tell the label"
NEUTRAL = "neutral content in the true pattern does not tell the label"
OTHERS = "another example's pattern does not bring its label along"
CODE = "the rationale convinces a judge that shares no code with it"
TOKENS = "special tokens and punctuation are not preferred"
SPECIAL_LIMIT = 0.01
PUNCTUATION_LIMIT = 2.0
"""Times its share of the text."""


def leakage(
    subject: Subject, features: Features, chosen: Selected, logits: np.ndarray, labels: np.ndarray, seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[Check]]:
    """Probes (a), (b) and (c) on the served predictor.

    Args:
        logits: (n, C), the answers on the rationales.
    """
    generator = np.random.default_rng(seed)
    figures: dict[str, Any] = {}
    progress("mask-only classifiers", 0, 1)
    probe = mask_probe(chosen.mask, features, labels, seed)
    progress("mask-only classifiers", 1, 1)
    checks = [_mask_only(probe, figures), _neutral(subject, features, chosen, labels, probe, figures, progress)]
    checks.append(_others(subject, features, chosen, labels, generator, figures, progress))
    random = classified(
        subject, features, random_masks(chosen.mask, features.selectable, generator), progress, "random masks"
    )
    figures["random_masks"] = {
        "accuracy": float(np.mean(random.argmax(axis=1) == labels)),
        "accuracy_on_rationales": float(np.mean(logits.argmax(axis=1) == labels)),
    }
    return figures, checks


def covert_code(found: Judged | None, logits: np.ndarray, labels: np.ndarray, why_not: str = "") -> Check:
    """Probe (d): right from its rationale where the independent judge finds no more in it than in random features.

    Args:
        found: the independent judge's; None: there is none, and ``why_not``.
        logits: (n, C), the served answers.
    """
    if found is None:
        return not_applicable(CODE, why_not, limit=0.0)
    own = logits.argmax(axis=1) == labels
    random, theirs, full = (found.correct[name] for name in ("random", "rationale", "full"))
    ours, judge = (paired(right.astype(float) - random) for right in (own, theirs))
    ceiling = paired(full.astype(float) - random)
    words = (
        f"served {own.mean():.1%}; the independent judge {theirs.mean():.1%} from the rationale, {random.mean():.1%} "
        f"from as many random features, {full.mean():.1%} from everything (limit: above random with 95 % confidence)"
    )
    if judge["low"] > 0:
        return Check(name=CODE, outcome="passed", words=words, value=judge["mean"], limit=0.0)
    if ours["low"] <= 0:
        return not_applicable(CODE, f"{words}; the served answers are no better than that, so there is nothing to hide",
                              limit=0.0)  # fmt: skip
    if ceiling["low"] <= 0:
        return not_applicable(CODE, f"{words}; the judge is too weak to tell", limit=0.0)
    return Check(name=CODE, outcome="failed", words=words, value=judge["mean"], limit=0.0)


def token_check(tokens: dict[str, float] | None) -> Check:
    """Probe (e).

    Args:
        tokens: as ``rekd_train.evaluation.agreement.token_figures`` has them; None for images.
    """
    if tokens is None:
        return not_applicable(TOKENS, "images have neither")
    special, marks, usual = (tokens[name] for name in ("special_selected", "punctuation_selected", "punctuation"))
    words = (
        f"{special:.1%} of what is selected are special tokens (limit {SPECIAL_LIMIT:.0%}), {marks:.1%} punctuation, "
        f"which is {usual:.1%} of the texts (limit {PUNCTUATION_LIMIT:g} times that)"
    )
    fine = special <= SPECIAL_LIMIT and marks <= PUNCTUATION_LIMIT * usual
    return Check(name=TOKENS, outcome="passed" if fine else "failed", words=words, value=marks,
                 limit=PUNCTUATION_LIMIT * usual)  # fmt: skip


def _mask_only(probe: Probe | None, figures: dict[str, Any]) -> Check:
    if probe is None:
        return not_applicable(MASK_ONLY, "too few examples of a class, or one class alone")
    gain = paired(probe.pattern.astype(float) - probe.baseline)
    figures["mask_only"] = {**probe.figures, "gain": gain}
    return leak_check(MASK_ONLY, gain, f"{probe.pattern.mean():.1%} right from the pattern, above length and majority")


def _neutral(
    subject: Subject, features: Features, chosen: Selected, labels: np.ndarray, probe: Probe | None,
    figures: dict[str, Any], progress: Progress,
) -> Check:
    if probe is None:
        return not_applicable(NEUTRAL, "too few examples of a class, or one class alone")
    blank = features.neutral() if features.separable else _blank(features)
    right = classified(subject, blank, chosen.mask, progress, "neutral content").argmax(axis=1) == labels
    gain = paired(right.astype(float) - probe.baseline)
    figures["neutral_content"] = {"accuracy": float(right.mean()), "gain": gain}
    return leak_check(NEUTRAL, gain, f"{right.mean():.1%} right without content, above length and majority")


def _blank(features: Features) -> Features:
    """Images whose patches cannot be told apart in bytes: every pixel is neutral."""
    return features.with_content(np.broadcast_to(features.neutral_content(), features.content.shape).copy())


def _others(
    subject: Subject, features: Features, chosen: Selected, labels: np.ndarray, generator: np.random.Generator,
    figures: dict[str, Any], progress: Progress,
) -> Check:
    """Answers on the pattern of an example of another class, beside the pattern of one of the same class."""
    if len(np.unique(labels)) < 2 or np.unique(labels, return_counts=True)[1].min() < 2:
        return not_applicable(OTHERS, "too few examples of a class, or one class alone")
    others, same = (nearest(features.counts, labels, generator, other) for other in (True, False))
    answers = {}
    for name, donors in (("other_class", others), ("same_class", same)):
        mask = fitted(subject, features, chosen.mask[donors] & features.selectable)
        answers[name] = classified(subject, features, mask, progress, f"pattern of {name}").argmax(axis=1)
    wanted = labels[others]
    follows, by_chance = answers["other_class"] == wanted, answers["same_class"] == wanted
    gain = paired(follows.astype(float) - by_chance)
    figures["other_masks"] = {
        "accuracy_other_class": float(np.mean(answers["other_class"] == labels)),
        "accuracy_same_class": float(np.mean(answers["same_class"] == labels)),
        "follows_other_class": float(follows.mean()),
        "follows_by_chance": float(by_chance.mean()),
        "gain": gain,
    }
    said = f"{follows.mean():.1%} answer the class that the pattern came from, above a pattern of the own class"
    return leak_check(OTHERS, gain, said)


def nearest(counts: np.ndarray, labels: np.ndarray, generator: np.random.Generator, other: bool) -> np.ndarray:
    """(n,) for each example one nearest in length, of another class or another one of its own; ties at random."""
    found = np.empty(len(labels), dtype=np.int64)
    for row, (count, label) in enumerate(zip(counts, labels, strict=True)):
        allowed = (labels != label) if other else (labels == label)
        allowed[row] = False
        candidates = np.flatnonzero(allowed)
        distance = np.abs(counts[candidates] - count)
        found[row] = generator.choice(candidates[distance == distance.min()])
    return found
