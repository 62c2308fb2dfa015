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
from rekd_deploy.bench.examples import (
    Features,
    exchanged,
    features_of,
    filled,
    labelled_examples,
    other_examples,
)
from rekd_deploy.bench.judges import Judges, judge_checks, judged, judges_of, known_reasons, pipeline_figures
from rekd_deploy.bench.probes import covert_code, leakage, token_check
from rekd_deploy.bench.results import (
    Check,
    Progress,
    Result,
    items_input,
    not_applicable,
    repository_input,
    result,
    silent,
)
from rekd_deploy.bench.subject import Exam, ServedGraphs, Subject, classified, selected

if TYPE_CHECKING:
    from rekd_train.data import Split

UNSEPARABLE = "the patches do not end where pixels do, so the content of one cannot be changed alone"
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


def measure_faithfulness(options: FaithfulnessOptions, progress: Progress = silent) -> Result:
    """Run every test that the repository, the data and the checkpoint allow.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the data, the checkpoint or the judge cannot be used.
    """
    from rekd_train.data import encode

    with ServedGraphs(options.repository, engine=options.engine) as subject:
        description, manifest = subject.description, subject.manifest
        if options.checkpoint is not None:
            check_belongs(options.checkpoint, manifest, list(description.labels))
        measured = labelled_examples(
            description.labels, checkpoint=options.checkpoint, data=options.data, overrides=options.overrides,
            split=options.split,
        ).head(options.examples)  # fmt: skip
        preprocessor = description.preprocessor()
        split = encode(measured.examples, preprocessor)
        features = features_of(split, preprocessor, full_width=subject.policy.selectable == "all")
        judges, names = judges_of(options, split, features, progress)
        figures, checks = examine(
            subject, features, split, judges=judges, seed=options.seed, progress=progress,
            temperature=float(manifest["probability_temperature"]),
        )  # fmt: skip
    data = items_input(measured.items, measured.origin, measured.labels)
    inputs = {"repository": repository_input(options.repository), "data": data} | names
    return result("faithfulness", figures, inputs=inputs, checks=checks, settings={
        "split": options.split, "examples": len(split), "seed": options.seed, "engine": options.engine,
        "operator": manifest["operator"], "policy": manifest["policy"],
    })  # fmt: skip


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
    from rekd_train.evaluation.mask_metrics import token_figures
    from rekd_train.evaluation.metrics import selection_summary

    labels, judges = split.labels, judges or Judges()
    chosen = selected(subject, features, progress)
    logits = classified(subject, features, chosen.mask, progress)
    exam = Exam(subject, features, chosen, logits, labels, seed, progress)
    figures: dict[str, Any] = {"answers": {
        "accuracy": float(np.mean(exam.classes == labels)),
        **selection_summary(chosen.mask.sum(axis=1), features.counts, positions=features.preprocessor.positions),
    }}  # fmt: skip
    figures["structure"], checks = _structure(exam)
    figures["judges"] = {"pipeline": pipeline_figures(exam, temperature)} if features.separable else {}
    found = {
        name: judged(judge, features, chosen, labels, seed, progress, f"{name} judge")
        for name, judge in vars(judges).items() if judge is not None
    }  # fmt: skip
    figures["judges"] |= {name: each.figures for name, each in found.items()}
    independent = found.get("independent")
    figures["probes"], leaks = leakage(exam)
    if tokens := token_figures(features.preprocessor, split, chosen.mask).get("tokens"):
        figures["probes"]["tokens"] = tokens
    figures["known"], known = known_reasons(split, features, chosen, seed)
    code = covert_code(independent, logits, labels, NO_JUDGE)
    return figures, [*checks, *judge_checks(independent, NO_JUDGE), *leaks, code, token_check(tokens), known]


# structure: exchanges of content, by definition 4.3; donors are other examples of the same data



def _structure(exam: Exam) -> tuple[dict[str, Any], list[Check]]:
    """The three exchanges; no figures where the content of one feature cannot be changed alone."""
    figures: dict[str, Any] = {}
    if exam.features.separable:
        generator = np.random.default_rng(exam.seed)
        figures["swap"] = swap_test(exam.subject, exam.features, exam.chosen.mask, generator, exam.progress)
        figures["counterfactual"] = _counterfactual(exam, generator)
        figures["selected_swap"] = _selected_swap(exam, generator)
    follows = _follows_check(figures.get("selected_swap"), exam.features.separable)
    return figures, [swap_check(figures.get("swap")), follows]


def swap_test(
    subject: Subject, features: Features, mask: np.ndarray, generator: np.random.Generator, progress: Progress = silent
) -> dict[str, Any]:
    """Unselected content from another example, the mask (n, N) bool kept: nothing may change, not by one bit.

    Returns:
        ``largest_difference`` of a logit, ``examples_changed`` (their logits differ in any bit), and
        ``content_changed``: the share of unselected features whose content was really another one.
    """
    unselected = features.selectable & ~mask
    swapped = exchanged(features, unselected, other_examples(len(features), generator))
    before = classified(subject, features, mask, progress, "swap test: before")
    after = classified(subject, swapped, mask, progress, "swap test: after")
    differ = features.content != swapped.content
    differ = differ if differ.ndim == 2 else differ.any(axis=tuple(range(2, differ.ndim)))
    return {
        "largest_difference": float(np.max(np.abs(after.astype(np.float64) - before))),
        "examples_changed": int(np.sum((after.view(np.int32) != before.view(np.int32)).any(axis=1))),
        "examples": len(features),
        "content_changed": float(np.mean(differ[unselected])) if unselected.any() else 0.0,
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


def _counterfactual(exam: Exam, generator: np.random.Generator) -> dict[str, float]:
    """The same exchange, but the selector chooses anew, and may choose otherwise where it reads its context."""
    from rekd_train.evaluation.mask_metrics import overlap

    features, mask = exam.features, exam.chosen.mask
    swapped = exchanged(features, features.selectable & ~mask, other_examples(len(features), generator))
    again = selected(exam.subject, swapped, exam.progress, "counterfactual: selecting")
    classes = exam.classes_of(swapped, again.mask, "counterfactual: classifying")
    return {"flips": float(np.mean(classes != exam.classes)), "mask_jaccard": overlap(mask, again.mask)["jaccard"]}


def _selected_swap(exam: Exam, generator: np.random.Generator) -> dict[str, float] | None:
    """Selected content from an example of another predicted class, at the same positions: does the class follow it?

    ``follows_unselected``: the donor's unselected content in place of its rationale, the level that any content
    reaches. None where all classes are the same.
    """
    classes, chosen = exam.classes, exam.chosen
    rows = np.flatnonzero(chosen.mask.any(axis=1))
    pools = {each: rows[classes[rows] != each] for each in np.unique(classes[rows])}
    if len(pools) < 2:
        return None
    donors = np.array([generator.choice(pools[classes[row]]) for row in rows])
    receivers, theirs, mask = exam.features.take(rows), exam.features.take(donors), chosen.mask[rows]
    given = filled(receivers, mask, theirs, chosen.mask[donors], chosen.scores[donors])
    found = exam.classes_of(given, mask, "selected swap")
    others = theirs.selectable & ~chosen.mask[donors]
    rest = filled(receivers, mask, theirs, np.where(others.any(axis=1)[:, None], others, theirs.selectable), None)
    by_chance = exam.classes_of(rest, mask, "selected swap: baseline")
    return {
        "follows": float(np.mean(found == classes[donors])),
        "stays": float(np.mean(found == classes[rows])),
        "follows_unselected": float(np.mean(by_chance == classes[donors])),
        "examples": len(rows),
    }


def _follows_check(figures: dict[str, float] | None, separable: bool) -> Check:
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
