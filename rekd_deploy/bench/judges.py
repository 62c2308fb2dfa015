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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rekd_deploy.bench.examples import Features, is_table
from rekd_deploy.bench.results import Check, Input, Progress, checkpoint_input, not_applicable, silent
from rekd_deploy.bench.subject import Exam, Selected, classified, selected
from rekd_train.training.observers import Observer

if TYPE_CHECKING:
    from rekd_deploy.bench.faithfulness import FaithfulnessOptions
    from rekd_train.data import Split
    from rekd_train.models.rationalizer import Rationalizer

Judge = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""(n, N) bool masks by name -> (n, C) probabilities by name."""
KNOWN = "rationales lie where the reason is known to be"


@dataclass(frozen=True)
class Judges:
    """Beside the pipeline: the pair's own predictor, given any features, and one trained on random features."""

    predictor: Judge | None = None
    independent: Judge | None = None


class Judged(NamedTuple):
    """What a judge says, and each example's part in it for comparisons."""

    figures: dict[str, Any]
    comprehensiveness_gain: np.ndarray
    """(n,): of the rationale - of random features of equal count."""
    sufficiency_gain: np.ndarray
    """(n,): of random features of equal count - of the rationale; positive: the rationale is more sufficient."""
    correct: dict[str, np.ndarray]
    """(n,) bool by what was shown: 'full', 'rationale', 'random', 'first', 'rest'."""


def torch_judge(pair: Rationalizer, split: Split, selectable: np.ndarray) -> Judge:
    """A pair's predictor as a judge of any mask, by PyTorch.

    Args:
        selectable: (n, N) bool, the features; where a rule may also drop special tokens, none is dropped here.
    """
    import torch

    from rekd_train.evaluation.forward import run_masks

    always = ~selectable if pair.policy.selectable == "all" else np.zeros_like(selectable)

    def judge(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = run_masks(pair, split, {name: torch.from_numpy(mask | always) for name, mask in masks.items()})
        return {name: pair.probabilities(torch.from_numpy(found)).numpy() for name, found in logits.items()}

    return judge


def judged(
    judge: Judge, features: Features, chosen: Selected, labels: np.ndarray, seed: int = 0, progress: Progress = silent,
    step: str = "judging",
) -> Judged:
    """All of one judge: the rationale, the best-scored features by size, and baselines of equal size."""
    from rekd_train.evaluation import mask_metrics as eraser

    selectable, generator = features.selectable, np.random.default_rng(seed)
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
    for done, (name, mask) in enumerate(jobs.items(), 1):
        found |= judge({name: mask, f"not_{name}": selectable & ~mask})
        progress(step, done, len(jobs))
    full = found["full"]
    without = {name: eraser.confidence_lost(full, found[f"not_{name}"]) for name in jobs}
    alone = {name: eraser.confidence_lost(full, found[name]) for name in jobs}
    figures: dict[str, Any] = {"confidence_on_everything": float(np.mean(full.max(axis=1)))}
    for kind in shown:
        figures[kind] = {"comprehensiveness": float(without[kind].mean()), "sufficiency": float(alone[kind].mean())}
    for kind in rankings:
        for name, values in (("comprehensiveness", without), ("sufficiency", alone)):
            by_size = [values[f"{kind}_{share}"] for share in eraser.BINS]
            figures[kind][f"aopc_{name}"] = float(np.mean(by_size))
    correct = {name: found[name].argmax(axis=1) == labels for name in ("full", *shown)}
    correct["rest"] = found["not_rationale"].argmax(axis=1) == labels
    figures["accuracy"] = {name: float(np.mean(right)) for name, right in correct.items()}
    return Judged(
        figures, without["rationale"] - without["random"], alone["random"] - alone["rationale"], correct
    )


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

    subject, features, chosen, progress = exam.subject, exam.features, exam.chosen, exam.progress
    generator, full, selectable = np.random.default_rng(exam.seed), probabilities(exam.logits), features.selectable

    def without(mask: np.ndarray, step: str) -> np.ndarray:
        rest = features.without(mask & selectable)
        found = selected(subject, rest, progress, f"pipeline without {step}")
        logits = classified(subject, rest, found.mask, progress, f"pipeline without {step}")
        return eraser.confidence_lost(full, probabilities(logits))

    best = {share: eraser.top_share(chosen.scores, selectable, share) for share in eraser.BINS}
    by_size = [without(mask, f"the best {share:.0%}") for share, mask in best.items()]
    again = probabilities(classified(subject, features, chosen.mask, progress, "pipeline again"))
    random = without(random_masks(chosen.mask, selectable, generator), "random features")
    return {
        "rationale": {
            "comprehensiveness": float(without(chosen.mask, "the rationale").mean()),
            "sufficiency": float(eraser.confidence_lost(full, again).mean()),
            "aopc_comprehensiveness": float(np.mean(by_size)),
        },
        "random": {"comprehensiveness": float(random.mean())},
    }


def judge_checks(found: Judged | None, why_not: str = "") -> list[Check]:
    """The verdicts of the independent judge; None: there is none, and ``why_not``."""
    names = "removing the rationale hurts the independent judge", "the rationale suffices the independent judge"
    if found is None:
        return [not_applicable(name, why_not, limit=0.0) for name in names]
    comprehensive, sufficient = paired(found.comprehensiveness_gain), paired(found.sufficiency_gain)
    return [
        better_check(names[0], comprehensive, "comprehensiveness above that of as many random features", points=False),
        better_check(names[1], sufficient, "confidence kept above that of as many random features", points=False),
    ]


def judges_of(
    options: FaithfulnessOptions, split: Split, features: Features, progress: Progress
) -> tuple[Judges, dict[str, Input]]:
    """The pair's own predictor and the independent judge, and their entries among the result's inputs."""
    if options.checkpoint is None:
        return Judges(), {}
    from rekd_train.checkpoints import checkpoint
    from rekd_train.judge import judge_run
    from rekd_train.training.runtime import chosen_device

    place = options.judge or options.checkpoint.with_name(f"{options.checkpoint.name}.judge")
    named = not is_table(options.data)
    independent = judge_run(
        options.checkpoint, place, epochs=options.judge_epochs, observer=_Steps(progress), device=options.device,
        data=options.data if named else None, overrides=options.overrides if named else (),
    )  # fmt: skip
    names = {"checkpoint": checkpoint_input(options.checkpoint), "judge": checkpoint_input(place)}
    own = checkpoint.load(options.checkpoint).to(chosen_device(options.device))
    return Judges(*(torch_judge(pair, split, features.selectable) for pair in (own, independent))), names


class _Steps(Observer):
    """Tells a progress bar how far the judge's training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._done, self._total = f"training the {name}", start, steps
        self._progress(self._name, start, steps)

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
    return figures, better_check(KNOWN, gain, said)


# from figures to verdicts


def paired(values: np.ndarray) -> dict[str, float]:
    """``mean``, ``low`` and ``high`` (95 %, bootstrap over items) of paired differences (n,)."""
    from rekd_train.evaluation.metrics import bootstrap_mean

    return bootstrap_mean(np.asarray(values, dtype=float))


def better_check(name: str, gain: Mapping[str, float], said: str, points: bool = True) -> Check:
    """Something must be better than its baseline: the 95 % interval of the gain lies above 0."""
    shown = in_points(gain) if points else f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    words, outcome = f"{said}: {shown} (limit: above 0 with 95 % confidence)", "passed" if gain["low"] > 0 else "failed"
    return Check(name=name, outcome=outcome, words=words, value=gain["mean"], limit=0.0)


def in_points(gain: Mapping[str, float]) -> str:
    """A gain and its interval in percentage points."""
    return f"{100 * gain['mean']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
