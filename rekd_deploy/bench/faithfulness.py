"""Is the rationale the reason? Structure, judges, leakage probes and known reasons of one served model.

Figures of a result of the kind 'faithfulness' (definitions: docs/faithfulness.md):

    answers      accuracy given the rationale, rate and spread
    structure    swap (bitwise), counterfactual, selected_swap
    judges       pipeline, predictor, independent: comprehensiveness and sufficiency, with baselines
    probes       mask_only, neutral_content, other_masks, random_masks, tokens
    known        human_rationales or truth, share_inside, with random masks beside them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench import results
from rekd_deploy.bench.accuracy import check_belongs
from rekd_deploy.bench.examples import Features, features_of, labelled_examples
from rekd_deploy.bench.judges import Judge, judge_checks, judged, judges_of, known_reasons, pipeline_figures
from rekd_deploy.bench.probes import covert_code, leakage, token_check
from rekd_deploy.bench.subject import Exam, ServedGraphs, Subject, classified, selected
from rekd_train.inputs.text import TextPreprocessor

if TYPE_CHECKING:
    from rekd_train.data import Split

UNSEPARABLE = "the patches do not end where pixels do, so the content of one cannot be changed alone"
NO_JUDGE = "there is no judge without --checkpoint"


def measure_faithfulness(
    repository: Path, checkpoint: Path | None = None, data: str | None = None, overrides: Sequence[str] = (),
    split: str = "test", examples: int = 1000, *, judge: Path | None = None, judge_epochs: float | None = None,
    seed: int = 0, engine: bool = False, device: str = "auto", progress: results.Progress = results.silent,
) -> results.Result:  # fmt: skip
    """Run every test that the repository, the data and the checkpoint allow; see ``rekd-bench faithfulness --help``.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the data, the checkpoint or the judge cannot be used.
    """
    from rekd_train.data import encode

    with ServedGraphs(repository, engine=engine) as subject:
        manifest, labels = subject.manifest, list(subject.description.labels)
        if checkpoint is not None:
            check_belongs(checkpoint, manifest, labels)
        measured = labelled_examples(labels, checkpoint, data, overrides, split).head(examples)
        preprocessor = subject.description.preprocessor()
        encoded = encode(measured.examples, preprocessor)
        features = features_of(encoded, preprocessor, full_width=subject.policy.selectable == "all")
        inputs = {"repository": results.repository_input(repository),
                  "data": results.items_input(measured.items, measured.origin, encoded.labels)}  # fmt: skip
        judges: dict[str, Judge] = {}
        if checkpoint is not None:
            place = judge or checkpoint.with_name(f"{checkpoint.name}.judge")
            judges = judges_of(
                checkpoint, place, encoded, features.selectable, epochs=judge_epochs, device=device, progress=progress,
                data=data, overrides=overrides,
            )  # fmt: skip
            inputs |= {"checkpoint": results.checkpoint_input(checkpoint), "judge": results.checkpoint_input(place)}
        temperature = float(manifest["probability_temperature"])
        figures, checks = examine(subject, features, encoded, judges, temperature, seed, progress)
    return results.result("faithfulness", figures, inputs=inputs, checks=checks, settings={
        "split": split, "examples": len(encoded), "seed": seed, "engine": engine,
        "operator": manifest["operator"], "policy": manifest["policy"],
    })  # fmt: skip


def examine(
    subject: Subject, features: Features, split: Split, judges: Mapping[str, Judge], temperature: float = 1.0,
    seed: int = 0, progress: results.Progress = results.silent,
) -> tuple[dict[str, Any], list[results.Check]]:
    """All figures and verdicts of one model on encoded examples.

    Args:
        subject: the served model, or any that can do the same.
        features: of the examples in ``split``.
        judges: beside the pipeline: 'predictor' and 'independent', or neither.
        temperature: of the subject's probabilities.
        seed: of donors, random masks and folds.
    """
    from rekd_train.evaluation.mask_metrics import token_figures
    from rekd_train.evaluation.metrics import selection_summary

    labels, chosen = split.labels, selected(subject, features)
    logits = classified(subject, features, chosen.mask)
    exam = Exam(subject, features, chosen, logits, labels, seed)
    progress("tests", 1, 5)
    figures: dict[str, Any] = {"answers": {
        "accuracy": float(np.mean(exam.classes == labels)),
        **selection_summary(chosen.mask.sum(axis=1), features.counts, positions=features.preprocessor.positions),
    }}  # fmt: skip
    generator = np.random.default_rng(seed)
    figures["structure"] = {
        "swap": swap_test(exam, generator), "counterfactual": _counterfactual(exam, generator),
        "selected_swap": _selected_swap(exam, generator),
    } if features.separable else {}
    progress("tests", 2, 5)
    checks = [swap_check(figures["structure"].get("swap")), _follows_check(figures["structure"], features.separable)]
    figures["judges"] = {"pipeline": pipeline_figures(exam, temperature)} if features.separable else {}
    progress("tests", 3, 5)
    found = {name: judged(judge, exam) for name, judge in judges.items()}
    progress("tests", 4, 5)
    figures["judges"] |= {name: each.figures for name, each in found.items()}
    independent = found.get("independent")
    figures["probes"], leaks = leakage(exam)
    progress("tests", 5, 5)
    if tokens := token_figures(features.preprocessor, split, chosen.mask).get("tokens"):
        figures["probes"]["tokens"] = tokens
    figures["known"], known = known_reasons(split, features, chosen, seed)
    code = covert_code(independent, logits, labels, NO_JUDGE)
    return figures, [*checks, *judge_checks(independent, NO_JUDGE), *leaks, code, token_check(tokens), known]


# structure: exchanges of content, by definition 4.3; donors are other examples of the same data


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
        return replace(features, content=content)
    for row, donor in enumerate(donors):
        positions = np.flatnonzero(where[row])
        words = features.content[donor][features.selectable[donor]]
        if len(positions) and len(words):
            content[row, positions] = words[positions % len(words)]
    return replace(features, content=content)


def swap_test(exam: Exam, generator: np.random.Generator) -> dict[str, Any]:
    """Unselected content from another example, the mask kept: nothing may change, not by one bit.

    Returns:
        ``largest_difference`` of a logit, ``examples_changed`` (their logits differ in any bit), and
        ``content_changed``: the share of unselected features whose content was really another one.
    """
    subject, features, mask = exam.subject, exam.features, exam.chosen.mask
    unselected = features.selectable & ~mask
    swapped = exchanged(features, unselected, other_examples(len(features), generator))
    before = classified(subject, features, mask)
    after = classified(subject, swapped, mask)
    differ = (features.content != swapped.content).reshape(*features.selectable.shape, -1).any(axis=2)
    return {
        "largest_difference": float(np.max(np.abs(after.astype(np.float64) - before))),
        "examples_changed": int(np.sum((after.view(np.int32) != before.view(np.int32)).any(axis=1))),
        "examples": len(features),
        "content_changed": float(np.mean(differ[unselected])) if unselected.any() else 0.0,
    }


def swap_check(figures: dict[str, Any] | None) -> results.Check:
    """The verdict; None: the content cannot be exchanged."""
    name = "unselected content has no influence"
    if figures is None:
        return results.not_applicable(name, UNSEPARABLE, limit=0.0)
    if not figures["content_changed"]:
        return results.not_applicable(name, "no unselected content could be changed", limit=0.0)
    difference, changed = figures["largest_difference"], figures["examples_changed"]
    words = (
        f"with {figures['content_changed']:.0%} of the unselected content exchanged, the logits of {changed} of "
        f"{figures['examples']} examples changed, by at most {difference:.3g} (limit 0, bit for bit)"
    )
    return results.verdict(name, difference == 0 and changed == 0, words, difference, 0.0)


def _counterfactual(exam: Exam, generator: np.random.Generator) -> dict[str, float]:
    """The same exchange, but the selector chooses anew, and may choose otherwise where it reads its context."""
    from rekd_train.evaluation.mask_metrics import overlap

    features, mask = exam.features, exam.chosen.mask
    swapped = exchanged(features, features.selectable & ~mask, other_examples(len(features), generator))
    again = selected(exam.subject, swapped)
    classes = exam.classes_of(swapped, again.mask)
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
    others = theirs.selectable & ~chosen.mask[donors]
    others = np.where(others.any(axis=1)[:, None], others, theirs.selectable)
    given = _filled(receivers, mask, theirs, chosen.mask[donors], chosen.scores[donors])
    found = exam.classes_of(given, mask)
    by_chance = exam.classes_of(_filled(receivers, mask, theirs, others, None), mask)
    return {
        "follows": float(np.mean(found == classes[donors])),
        "stays": float(np.mean(found == classes[rows])),
        "follows_unselected": float(np.mean(by_chance == classes[donors])),
        "examples": len(rows),
    }


def _filled(
    receivers: Features, mask: np.ndarray, donors: Features, kept: np.ndarray, scores: np.ndarray | None
) -> Features:
    """The kept positions of each receiver with its donor's kept content in reading order.

    Of more than fit the best-scored are taken (without scores the first), fewer are repeated.
    """
    content = receivers.content.copy()
    for row in range(len(receivers)):
        ours, theirs = np.flatnonzero(mask[row]), np.flatnonzero(kept[row])
        if len(theirs) > len(ours) and scores is not None:
            theirs = np.sort(theirs[np.argsort(-scores[row, theirs], kind="stable")[: len(ours)]])
        if len(theirs):
            content[row, ours] = donors.content[row, theirs[np.arange(len(ours)) % len(theirs)]]
    return replace(receivers, content=content)


def _follows_check(structure: dict[str, Any], separable: bool) -> results.Check:
    name, figures = "the answer follows the selected content", structure.get("selected_swap")
    if not separable:
        return results.not_applicable(name, UNSEPARABLE, limit=0.0)
    if figures is None:
        return results.not_applicable(name, "every prediction has the same class, so there is no donor", limit=0.0)
    lead = figures["follows"] - figures["stays"]
    words = (
        f"given the selected content of an example of another class, {figures['follows']:.1%} turn to that class, "
        f"{figures['stays']:.1%} stay as before (limit: more follow than stay)"
    )
    return results.verdict(name, lead > 0, words, lead, 0.0)
