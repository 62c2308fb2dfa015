"""Comprehensiveness and sufficiency (ERASER) by three judges, never mixed; and reasons that are known.

    pipeline      p(x) is the served prediction itself. Sufficiency is 0 by construction; comprehensiveness takes the
                  rationale out of the input and lets the selector choose anew.
    predictor     the pair's own predictor, on masks it was not trained for: everything, everything but the rationale.
    independent   a classifier trained on random features at random rates with the same removal operator
                  (``rekd_train.judge``): the headline.

j is the class that the judge itself predicts on the full input. AOPC is the plain mean over the best-scored 1, 5, 10,
20 and 50 % of the features. Special tokens are never removed and never count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rekd_deploy.bench.examples import TABLES, Features
from rekd_deploy.bench.results import Check, Progress, not_applicable, verdict
from rekd_deploy.bench.subject import Exam, Selected, classified, selected
from rekd_train.training.state import Observer

if TYPE_CHECKING:
    from rekd_train.data import Split
    from rekd_train.models.rationalizer import Rationalizer

Judge = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""(n, N) bool masks by name -> (n, C) probabilities by name."""
KNOWN = "rationales lie where the reason is known to be"


class Judged(NamedTuple):
    """What a judge says, and each example's part in it for comparisons."""

    figures: dict[str, Any]
    comprehensiveness_gain: np.ndarray
    """(n,): of the rationale - of random features of equal count."""
    sufficiency_gain: np.ndarray
    """(n,): of random features of equal count - of the rationale; positive: the rationale is more sufficient."""
    correct: dict[str, np.ndarray]
    """(n,) bool by what was shown: 'full', 'rationale', 'random', 'first', 'rest'."""


def _torch_judge(pair: Rationalizer, split: Split, selectable: np.ndarray) -> Judge:
    """A pair's predictor as a judge of any mask; where a rule may also drop special tokens, none is dropped here."""
    import torch

    from rekd_train.evaluation.forward import run_masks

    always = ~selectable if pair.policy.selectable == "all" else np.zeros_like(selectable)

    def judge(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = run_masks(pair, split, {name: torch.from_numpy(mask | always) for name, mask in masks.items()})
        return {name: pair.probabilities(torch.from_numpy(found)).numpy() for name, found in logits.items()}

    return judge


def judged(judge: Judge, exam: Exam) -> Judged:
    """All of one judge: the rationale, the best-scored features by size, and baselines of equal size."""
    from rekd_train.evaluation import mask_metrics as eraser

    chosen, selectable, generator = exam.chosen, exam.features.selectable, np.random.default_rng(exam.seed)
    kept = chosen.mask & selectable
    shown = {
        "rationale": kept,
        "random": random_masks(kept, selectable, generator),
        "first": selectable & (selectable.cumsum(axis=1) <= kept.sum(axis=1)[:, None]),
    }
    rankings = {"rationale": chosen.scores, "random": generator.random(selectable.shape).astype(np.float32)}
    jobs = shown | {
        f"{kind}_{share}": eraser.top_share(scores, selectable, share)
        for kind, scores in rankings.items() for share in eraser.BINS
    }  # fmt: skip
    found = judge({"full": selectable})
    for name, mask in jobs.items():
        found |= judge({name: mask, f"not_{name}": selectable & ~mask})
    full = found["full"]
    scores = {
        "comprehensiveness": {name: eraser.confidence_lost(full, found[f"not_{name}"]) for name in jobs},
        "sufficiency": {name: eraser.confidence_lost(full, found[name]) for name in jobs},
    }
    figures: dict[str, Any] = {"confidence_on_everything": float(np.mean(full.max(axis=1)))}
    for kind in shown:
        figures[kind] = {name: float(values[kind].mean()) for name, values in scores.items()}
    for kind in rankings:
        for name, values in scores.items():
            by_size = [values[f"{kind}_{share}"] for share in eraser.BINS]
            figures[kind][f"aopc_{name}"] = float(np.mean(by_size))
    correct = {name: found[name].argmax(axis=1) == exam.labels for name in ("full", *shown)}
    correct["rest"] = found["not_rationale"].argmax(axis=1) == exam.labels
    figures["accuracy"] = {name: float(np.mean(right)) for name, right in correct.items()}
    without, alone = scores.values()
    return Judged(figures, without["rationale"] - without["random"], alone["random"] - alone["rationale"], correct)


def random_masks(mask: np.ndarray, selectable: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many features of each example as ``mask`` keeps, uniformly at random: (n, N) bool."""
    kept = (mask & selectable).sum(axis=1)
    draws = np.where(selectable, generator.random(selectable.shape), np.inf)
    ranks = np.argsort(np.argsort(draws, axis=1, kind="stable"), axis=1, kind="stable")
    return selectable & (ranks < kept[:, None])


def pipeline_figures(exam: Exam, temperature: float) -> dict[str, Any]:
    """The first judge: the served pipeline itself; ``temperature`` is that of its probabilities."""
    from scipy.special import softmax

    from rekd_train.evaluation import mask_metrics as eraser

    def probabilities(logits: np.ndarray) -> np.ndarray:
        return softmax(logits.astype(np.float64) / temperature, axis=1)

    subject, features, chosen = exam.subject, exam.features, exam.chosen
    generator, full, selectable = np.random.default_rng(exam.seed), probabilities(exam.logits), features.selectable

    def without(mask: np.ndarray) -> np.ndarray:
        rest = features.without(mask & selectable)
        logits = classified(subject, rest, selected(subject, rest).mask)
        return eraser.confidence_lost(full, probabilities(logits))

    by_size = [without(eraser.top_share(chosen.scores, selectable, share)) for share in eraser.BINS]
    again = probabilities(classified(subject, features, chosen.mask))
    return {
        "rationale": {
            "comprehensiveness": float(without(chosen.mask).mean()),
            "sufficiency": float(eraser.confidence_lost(full, again).mean()),
            "aopc_comprehensiveness": float(np.mean(by_size)),
        },
        "random": {"comprehensiveness": float(without(random_masks(chosen.mask, selectable, generator)).mean())},
    }


def judge_checks(found: Judged | None, why_not: str = "") -> list[Check]:
    """The verdicts of the independent judge; None: there is none, and ``why_not``."""
    names = "removing the rationale hurts the independent judge", "the rationale suffices the independent judge"
    if found is None:
        return [not_applicable(name, why_not, limit=0.0) for name in names]
    gains = paired(found.comprehensiveness_gain), paired(found.sufficiency_gain)
    said = "comprehensiveness", "confidence kept"
    return [
        _better_check(name, gain, f"{what} above that of as many random features", points=False)
        for name, gain, what in zip(names, gains, said, strict=True)
    ]


def judges_of(
    checkpoint: Path, place: Path, split: Split, selectable: np.ndarray, *, epochs: float | None, device: str,
    data: str | None, overrides: Sequence[str], progress: Progress,
) -> dict[str, Judge]:  # fmt: skip
    """The pair's own predictor, and the independent judge, which is trained and kept at ``place`` if it is not there.

    Args:
        selectable: (n, N) bool, of the examples in ``split``.
    """
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.judge import judge_run
    from rekd_train.training.runtime import chosen_device

    named = data is None or Path(data).suffix not in TABLES
    independent = judge_run(
        checkpoint, place, epochs=epochs, observer=_Steps(progress), device=device,
        data=data if named else None, overrides=overrides if named else (),
    )  # fmt: skip
    pairs = {"predictor": load(checkpoint).to(chosen_device(device)), "independent": independent}
    return {name: _torch_judge(pair, split, selectable) for name, pair in pairs.items()}


class _Steps(Observer):
    """Tells a progress bar how far the judge's training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._done, self._total = f"training the {name}", start, steps

    def step(self, values: dict[str, float]) -> None:
        self._done += 1
        self._progress(self._name, self._done, self._total)


# where the reason is known: people's marks on texts, the deciding tile of a mosaic


def known_reasons(split: Split, features: Features, chosen: Selected, seed: int = 0) -> tuple[dict[str, Any], Check]:
    """Plausibility or truth figures of the rationales, and of random masks of equal size with random scores.

    Returns:
        ``human_rationales`` or ``truth`` (docs/evaluation.md), each with ``random`` beside it, and ``share_inside``:
        mean share of the kept features inside the known reason; nothing where none is known.
    """
    from rekd_train.evaluation.mask_metrics import reason_figures

    truths = [] if split.truth is None else split.truth
    known = [row for row, truth in enumerate(truths) if truth is not None and truth.any()]
    if not known:
        return {}, not_applicable(KNOWN, "the data name no reasons", limit=0.0)
    generator = np.random.default_rng(seed)
    mask = chosen.mask & features.selectable
    random = random_masks(mask, features.selectable, generator)
    scores = generator.random(chosen.scores.shape).astype(np.float32)
    ours, theirs = (
        reason_figures(features.preprocessor, split, values, features.selectable, kept)
        for values, kept in ((chosen.scores, mask), (scores, random))
    )
    figures: dict[str, Any] = {name: {**found, "random": theirs[name]} for name, found in ours.items()}
    inside = [
        np.array([(kept[row, : len(truths[row])] & truths[row]).sum() / max(int(kept[row].sum()), 1) for row in known])
        for kept in (mask, random)
    ]  # (known,) shares; an empty rationale: 0
    gain = paired(inside[0] - inside[1])
    figures["share_inside"] = {"rationale": float(inside[0].mean()), "random": float(inside[1].mean()), "gain": gain}
    said = f"{inside[0].mean():.1%} of what is kept lies inside, above as many random features"
    return figures, _better_check(KNOWN, gain, said)


# from figures to verdicts


def paired(values: np.ndarray) -> dict[str, float]:
    """``mean``, ``low`` and ``high`` (95 %, bootstrap over items) of paired differences (n,)."""
    from rekd_train.evaluation.metrics import bootstrap_mean

    return bootstrap_mean(np.asarray(values, dtype=float))


def _better_check(name: str, gain: Mapping[str, float], said: str, points: bool = True) -> Check:
    """Something must be better than its baseline: the 95 % interval of the gain lies above 0."""
    shown = in_points(gain) if points else f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    return verdict(name, gain["low"] > 0, f"{said}: {shown} (limit: above 0 with 95 % confidence)", gain["mean"], 0.0)


def in_points(gain: Mapping[str, float]) -> str:
    """A gain and its interval in percentage points."""
    return f"{100 * gain['mean']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
