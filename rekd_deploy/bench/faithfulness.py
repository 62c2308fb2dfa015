"""Is the rationale the reason? Structure, judges, leakage probes and known reasons of one served model.

Figures of a result of the kind 'faithfulness' (definitions: docs/faithfulness.md):

    answers      accuracy given the rationale, rate and spread
    structure    swap (bitwise), counterfactual, selected_swap
    judges       pipeline, predictor, independent: comprehensiveness and sufficiency, with baselines
    probes       mask_only, neutral_content, other_masks, random_masks, tokens
    known        human_rationales or truth, share_inside, with random masks beside them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.accuracy import check_belongs
from rekd_deploy.bench.features import Features, features_of
from rekd_deploy.bench.judges import Judge, judge_checks, judged, pipeline_figures, torch_judge
from rekd_deploy.bench.known_reasons import known_reasons
from rekd_deploy.bench.labelled import is_table, labelled_examples
from rekd_deploy.bench.probes import covert_code, leakage, token_check
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.result_inputs import checkpoint_input, repository_input
from rekd_deploy.bench.results import Check, Result, result
from rekd_deploy.bench.structure import counterfactual, selected_swap, selected_swap_check, swap_check, swap_test
from rekd_deploy.bench.subject import Selected, ServedGraphs, Subject, classified, selected

if TYPE_CHECKING:
    from rekd_train.data import Split

NO_JUDGE = "there is no judge without --checkpoint"


@dataclass(frozen=True)
class FaithfulnessOptions:
    """What to test; see ``rekd-bench faithfulness --help``."""

    repository: Path
    checkpoint: Path | None = None
    data: str | None = None
    overrides: tuple[str, ...] = ()
    split: str = "test"
    examples: int = 1000
    judge: Path | None = None
    judge_epochs: float | None = None
    seed: int = 0
    engine: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Judges:
    """Who is asked beside the pipeline; None: nobody."""

    predictor: Judge | None = None
    """The pair's own predictor, given any features."""
    independent: Judge | None = None
    """One that was trained on random features."""


def measure_faithfulness(options: FaithfulnessOptions, progress: Progress = silent) -> Result:
    """Run every test that the repository, the data and the checkpoint allow.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the data, the checkpoint or the judge cannot be used.
    """
    from rekd_train.data import encode

    with ServedGraphs(options.repository, engine=options.engine) as subject:
        description = subject.description
        if options.checkpoint is not None:
            check_belongs(options.checkpoint, subject.manifest, list(description.labels))
        measured = labelled_examples(
            description.labels, checkpoint=options.checkpoint, data=options.data, overrides=options.overrides,
            split=options.split,
        ).head(options.examples)  # fmt: skip
        preprocessor = description.preprocessor()
        split = encode(measured.examples, preprocessor)
        features = features_of(split, preprocessor, full_width=subject.policy.selectable == "all")
        judges, names = _judges(options, split, features, progress)
        figures, checks = examine(
            subject, features, split, judges=judges, seed=options.seed, progress=progress,
            temperature=float(subject.manifest["probability_temperature"]),
        )  # fmt: skip
        inputs = {"repository": repository_input(options.repository), "data": measured.input()} | names
        settings = {
            "split": options.split, "examples": len(split), "seed": options.seed, "engine": options.engine,
            "operator": subject.manifest["operator"], "policy": subject.manifest["policy"],
        }  # fmt: skip
    return result("faithfulness", figures, inputs=inputs, settings=settings, checks=checks)


def examine(
    subject: Subject, features: Features, split: Split, *, judges: Judges | None = None, temperature: float = 1.0,
    seed: int = 0, progress: Progress = silent,
) -> tuple[dict[str, Any], list[Check]]:
    """All figures and verdicts of one model on encoded examples.

    Args:
        subject: the model; the served one, or any that can do the same.
        features: of the examples in ``split``.
        judges: None: the pipeline alone.
        temperature: of the subject's probabilities.
        seed: of donors, random masks and folds.
    """
    labels, judges = split.labels, judges or Judges()
    chosen = selected(subject, features, progress)
    logits = classified(subject, features, chosen.mask, progress)
    figures: dict[str, Any] = {"answers": _answers(features, chosen, logits, labels)}
    checks: list[Check] = []

    figures["structure"] = _structure(subject, features, chosen, logits, seed, progress, checks)
    independent = None
    figures["judges"] = {}
    if features.separable:
        figures["judges"]["pipeline"] = pipeline_figures(
            subject, features, chosen, logits, temperature, seed, progress
        )
    for name, judge in (("predictor", judges.predictor), ("independent", judges.independent)):
        if judge is not None:
            found = judged(judge, features, chosen, labels, seed, progress, f"{name} judge")
            figures["judges"][name] = found.figures
            independent = found if name == "independent" else independent
    checks += judge_checks(independent, NO_JUDGE)

    figures["probes"], found_leaks = leakage(subject, features, chosen, logits, labels, seed, progress)
    checks += [*found_leaks, covert_code(independent, logits, labels, NO_JUDGE)]
    tokens = _tokens(features, split, chosen)
    if tokens is not None:
        figures["probes"]["tokens"] = tokens
    checks.append(token_check(tokens))
    figures["known"], known = known_reasons(split, features, chosen, seed)
    return figures, [*checks, known]


def _answers(features: Features, chosen: Selected, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    from rekd_train.evaluation.metrics import rate_summary

    return {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        **rate_summary(chosen.mask.sum(axis=1), features.counts, positions=features.preprocessor.positions),
    }


def _structure(
    subject: Subject, features: Features, chosen: Selected, logits: np.ndarray, seed: int, progress: Progress,
    checks: list[Check],
) -> dict[str, Any]:
    """Figures; the verdicts are added to ``checks``."""
    figures: dict[str, Any] = {}
    if features.separable:
        generator = np.random.default_rng(seed)
        figures["swap"] = swap_test(subject, features, chosen.mask, generator, progress)
        figures["counterfactual"] = counterfactual(subject, features, chosen, logits, generator, progress)
        figures["selected_swap"] = selected_swap(subject, features, chosen, logits, generator, progress)
    checks.append(swap_check(figures.get("swap")))
    checks.append(selected_swap_check(figures.get("selected_swap"), features.separable))
    return figures


def _tokens(features: Features, split: Split, chosen: Selected) -> dict[str, float] | None:
    import torch

    from rekd_train.evaluation.agreement import token_figures

    return token_figures(features.preprocessor, split, torch.from_numpy(chosen.mask)).get("tokens")


def _judges(
    options: FaithfulnessOptions, split: Split, features: Features, progress: Progress
) -> tuple[Judges, dict[str, Any]]:
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


class _Steps:
    """Tells a progress bar how far the judge's training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._name, self._done, self._total = "", 0, 0

    def data(self, summary: dict[str, Any]) -> None:
        pass

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._done, self._total = f"training the {name}", start, steps
        self._progress(self._name, start, steps)

    def step(self, values: dict[str, float]) -> None:
        self._done += 1
        self._progress(self._name, self._done, self._total)

    def evaluated(self, values: dict[str, float]) -> None:
        pass
