"""Comprehensiveness and sufficiency (ERASER) by three judges, never mixed.

    pipeline      p(x) is the served answer itself. Sufficiency is 0 by construction; comprehensiveness takes the
                  rationale out of the input and lets the selector choose anew.
    predictor     the pair's own predictor, on masks it was not trained for: everything, everything but the rationale.
    independent   a classifier trained on random features at random rates with the same removal operator
                  (``rekd_train.judge``): the headline.

j is the class that the judge itself predicts on the full input. AOPC is the plain mean over the best-scored 1, 5, 10,
20 and 50 % of the features. Special tokens are never removed and never count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.subject import Selected, Subject, classified, selected
from rekd_deploy.bench.verdicts import better_check, not_applicable, paired

if TYPE_CHECKING:
    from rekd_train.data import Split
    from rekd_train.models.rationalizer import Rationalizer

Judge = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""(n, N) bool masks by name -> (n, C) probabilities by name."""


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
    """Everything one judge is asked: the rationale, the best-scored features by size, and baselines of equal size."""
    from rekd_train.evaluation.mask_metrics import BINS, comprehensiveness, sufficiency, top_share

    selectable, generator = features.selectable, np.random.default_rng(seed)
    shown = rationale_masks(chosen.mask, selectable, generator)
    rankings = {"rationale": chosen.scores, "random": generator.random(selectable.shape).astype(np.float32)}
    answers = judge({"full": selectable})
    jobs = list(shown.items())
    jobs += [
        (f"{kind}_{share}", top_share(scores, selectable, share)) for kind, scores in rankings.items() for share in BINS
    ]
    for done, (name, mask) in enumerate(jobs, 1):
        answers |= judge({name: mask, f"not_{name}": selectable & ~mask})
        progress(step, done, len(jobs))
    full = answers["full"]
    figures: dict[str, Any] = {"confidence_on_everything": float(np.mean(full.max(axis=1)))}
    for kind in shown:
        without, alone = comprehensiveness(full, answers[f"not_{kind}"]), sufficiency(full, answers[kind])
        figures[kind] = {"comprehensiveness": float(without.mean()), "sufficiency": float(alone.mean())}
    for kind in rankings:
        figures[kind] |= _areas(full, answers, kind)
    correct = {name: answers[name].argmax(axis=1) == labels for name in ("full", *shown)}
    correct["rest"] = answers["not_rationale"].argmax(axis=1) == labels
    figures["accuracy"] = {name: float(np.mean(found)) for name, found in correct.items()}
    gains = [
        comprehensiveness(full, answers["not_rationale"]) - comprehensiveness(full, answers["not_random"]),
        sufficiency(full, answers["random"]) - sufficiency(full, answers["rationale"]),
    ]
    return Judged(figures, *gains, correct)


def rationale_masks(
    mask: np.ndarray, selectable: np.ndarray, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The rationale and as many features of each example, ``random`` ones and the ``first`` ones: (n, N) bool."""
    kept = (mask & selectable).sum(axis=1)
    return {
        "rationale": mask & selectable,
        "random": random_masks(mask, selectable, generator),
        "first": selectable & (selectable.cumsum(axis=1) <= kept[:, None]),
    }


def random_masks(mask: np.ndarray, selectable: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many features of each example as ``mask`` keeps, uniformly at random: (n, N) bool."""
    kept = (mask & selectable).sum(axis=1)
    draws = np.where(selectable, generator.random(selectable.shape), np.inf)
    places = np.argsort(np.argsort(draws, axis=1, kind="stable"), axis=1, kind="stable")
    return selectable & (places < kept[:, None])


def pipeline_figures(
    subject: Subject, features: Features, chosen: Selected, logits: np.ndarray, temperature: float, seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The first judge: the served pipeline itself.

    Args:
        logits: (n, C), its answers on its own rationales.
        temperature: of its probabilities.
    """
    from rekd_train.evaluation.mask_metrics import (
        BINS,
        area_over_perturbation_curve,
        comprehensiveness,
        sufficiency,
        top_share,
    )

    generator, full = np.random.default_rng(seed), _softmax(logits, temperature)
    selectable = features.selectable

    def without(mask: np.ndarray, step: str) -> np.ndarray:
        rest = features.without(mask & selectable)
        found = selected(subject, rest, progress, f"pipeline without {step}")
        answers = classified(subject, rest, found.mask, progress, f"pipeline without {step}")
        return comprehensiveness(full, _softmax(answers, temperature))

    by_size = [without(top_share(chosen.scores, selectable, share), f"the best {share:.0%}") for share in BINS]
    again = classified(subject, features, chosen.mask, progress, "pipeline again")
    return {
        "rationale": {
            "comprehensiveness": float(without(chosen.mask, "the rationale").mean()),
            "sufficiency": float(sufficiency(full, _softmax(again, temperature)).mean()),
            "aopc_comprehensiveness": area_over_perturbation_curve(by_size),
        },
        "random": {
            "comprehensiveness": float(
                without(random_masks(chosen.mask, selectable, generator), "random features").mean()
            )
        },
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


def _areas(full: np.ndarray, answers: Mapping[str, np.ndarray], kind: str) -> dict[str, float]:
    from rekd_train.evaluation.mask_metrics import BINS, area_over_perturbation_curve, comprehensiveness, sufficiency

    return {
        "aopc_comprehensiveness": area_over_perturbation_curve(
            [comprehensiveness(full, answers[f"not_{kind}_{share}"]) for share in BINS]
        ),
        "aopc_sufficiency": area_over_perturbation_curve(
            [sufficiency(full, answers[f"{kind}_{share}"]) for share in BINS]
        ),
    }


def _softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
