"""Does the answer depend on the kept features alone, and on their content? Exchanges of content, by definition 4.3.

All three run the served predictor itself. Donors are other examples of the same data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.subject import Selected, Subject, classified, selected
from rekd_deploy.bench.verdicts import not_applicable
from rekd_train.inputs.text import TextPreprocessor

UNSEPARABLE = "the patches do not end where pixels do, so the content of one cannot be changed alone"


def swap_test(
    subject: Subject, features: Features, mask: np.ndarray, generator: np.random.Generator, progress: Progress = silent
) -> dict[str, Any]:
    """Unselected content from another example, the mask held: nothing may change, not by one bit.

    Args:
        mask: (n, N) bool, the rationales.

    Returns:
        ``largest_difference`` of a logit, ``examples_changed`` (their logits differ in any bit), and
        ``content_changed``: the share of unselected features whose content was really another one.
    """
    unselected = features.selectable & ~mask
    swapped = exchanged(features, unselected, other_examples(len(features), generator))
    before = classified(subject, features, mask, progress, "swap test: before")
    after = classified(subject, swapped, mask, progress, "swap test: after")
    return {
        "largest_difference": float(np.max(np.abs(after.astype(np.float64) - before))),
        "examples_changed": int(np.sum((after.view(np.int32) != before.view(np.int32)).any(axis=1))),
        "examples": len(features),
        "content_changed": float(np.mean(_differ(features, swapped)[unselected])) if unselected.any() else 0.0,
    }


def swap_check(figures: dict[str, Any] | None) -> Check:
    """The verdict; None: the content cannot be exchanged."""
    name = "unselected content has no influence"
    if figures is None:
        return not_applicable(name, UNSEPARABLE, limit=0.0)
    if not figures["content_changed"]:
        return not_applicable(name, "no unselected content could be changed", limit=0.0)
    difference = figures["largest_difference"]
    exact = difference == 0 and figures["examples_changed"] == 0
    words = (
        f"with {figures['content_changed']:.0%} of the unselected content exchanged, the logits of "
        f"{figures['examples_changed']} of {figures['examples']} examples changed, by at most {difference:.3g} "
        "(limit 0, bit for bit)"
    )
    return Check(name=name, outcome="passed" if exact else "failed", words=words, value=difference, limit=0.0)


def counterfactual(
    subject: Subject, features: Features, chosen: Selected, logits: np.ndarray, generator: np.random.Generator,
    progress: Progress = silent,
) -> dict[str, float]:
    """The same exchange, but the selector chooses anew: how often the answer flips, how alike the rationales are.

    A selector that reads its context may choose otherwise; the figure says how much of an answer hangs on that.
    """
    from rekd_train.evaluation.mask_metrics import overlap

    swapped = exchanged(features, features.selectable & ~chosen.mask, other_examples(len(features), generator))
    again = selected(subject, swapped, progress, "counterfactual: selecting")
    answers = classified(subject, swapped, again.mask, progress, "counterfactual: classifying").argmax(axis=1)
    return {
        "flips": float(np.mean(answers != logits.argmax(axis=1))),
        "mask_jaccard": overlap(chosen.mask, again.mask)["jaccard"],
    }


def selected_swap(
    subject: Subject, features: Features, chosen: Selected, logits: np.ndarray, generator: np.random.Generator,
    progress: Progress = silent,
) -> dict[str, float] | None:
    """Selected content from an example with another answer, in the same places: does the answer follow the donor?

    Returns:
        ``follows``, ``stays`` (shares of the exchanges), ``follows_unselected`` (the donor's unselected content in
        place of its rationale: the level that any content reaches) and ``examples``; None where the answers are all
        the same.
    """
    answers = logits.argmax(axis=1)
    rows = np.flatnonzero(chosen.mask.any(axis=1))
    donors = _opposite(answers, rows, generator)
    if donors is None:
        return None
    receivers, mask = features.take(rows), chosen.mask[rows]
    theirs = features.take(donors)
    given = _filled(receivers, mask, theirs, chosen.mask[donors], chosen.scores[donors])
    found = classified(subject, given, mask, progress, "selected swap").argmax(axis=1)
    others = theirs.selectable & ~chosen.mask[donors]
    rest = _filled(receivers, mask, theirs, np.where(others.any(axis=1)[:, None], others, theirs.selectable), None)
    by_chance = classified(subject, rest, mask, progress, "selected swap: baseline").argmax(axis=1)
    return {
        "follows": float(np.mean(found == answers[donors])),
        "stays": float(np.mean(found == answers[rows])),
        "follows_unselected": float(np.mean(by_chance == answers[donors])),
        "examples": len(rows),
    }


def selected_swap_check(figures: dict[str, float] | None, separable: bool) -> Check:
    """The verdict on ``selected_swap``."""
    name = "the answer follows the selected content"
    if not separable:
        return not_applicable(name, UNSEPARABLE, limit=0.0)
    if figures is None:
        return not_applicable(name, "every answer is of the same class, so there is no donor of another", limit=0.0)
    lead = figures["follows"] - figures["stays"]
    words = (
        f"given the selected content of an example with another answer, {figures['follows']:.1%} answer as the donor, "
        f"{figures['stays']:.1%} as before (limit: more follow than stay)"
    )
    return Check(name=name, outcome="passed" if lead > 0 else "failed", words=words, value=lead, limit=0.0)


def other_examples(count: int, generator: np.random.Generator) -> np.ndarray:
    """(n,) for each example another one, never itself (where there are two)."""
    return (np.arange(count) + generator.integers(1, max(count, 2), size=count)) % count


def exchanged(features: Features, where: np.ndarray, donors: np.ndarray) -> Features:
    """Other content at the positions of (n, N) bool: a patch of the same place, a word of about the same place.

    A shorter donor's words are taken over and over. Special tokens and padding stay, and none is brought in.
    """
    content = features.content.copy()
    if not isinstance(features.preprocessor, TextPreprocessor):
        content[where] = features.content[donors][where]
        return features.with_content(content)
    for row, donor in enumerate(donors):
        positions = np.flatnonzero(where[row])
        words = features.content[donor][features.selectable[donor]]
        if len(positions) and len(words):
            content[row, positions] = words[positions % len(words)]
    return features.with_content(content)


def _filled(
    receivers: Features, mask: np.ndarray, donors: Features, kept: np.ndarray, scores: np.ndarray | None
) -> Features:
    """The kept positions of each receiver with its donor's kept content in reading order.

    Of more than fit the best-scored are taken (without scores the first), fewer are repeated.
    """
    content = receivers.content.copy()
    for row in range(len(receivers)):
        places, theirs = np.flatnonzero(mask[row]), np.flatnonzero(kept[row])
        if len(theirs) > len(places) and scores is not None:
            theirs = np.sort(theirs[np.argsort(-scores[row, theirs], kind="stable")[: len(places)]])
        if len(theirs):
            content[row, places] = donors.content[row, theirs[np.arange(len(places)) % len(theirs)]]
    return receivers.with_content(content)


def _opposite(answers: np.ndarray, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray | None:
    """For each of these rows one of them with another answer; None if there is no other answer."""
    if len(np.unique(answers[rows])) < 2:
        return None
    pools = {answer: rows[answers[rows] != answer] for answer in np.unique(answers[rows])}
    return np.array([generator.choice(pools[answers[row]]) for row in rows])


def _differ(one: Features, other: Features) -> np.ndarray:
    """(n, N) bool: positions with different content."""
    different = one.content != other.content
    return different if different.ndim == 2 else different.any(axis=tuple(range(2, different.ndim)))
