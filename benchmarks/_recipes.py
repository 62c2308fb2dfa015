"""Which cells a comparison of classifiers, rationale extraction and distillation is made of, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from _cells import ROOT, Cell, Table, execute, source_hash
from _models import run_cell

from rekd_train.config.run import RunConfig
from rekd_train.files import write_text

Rows = list[tuple[str, str, float | None]]
"""Cell, title, target rate (None: reads everything)."""


def distillation_cells(
    student: RunConfig,
    teacher: RunConfig,
    seed: int,
    unequal: RunConfig | None = None,
    teacher_seed: int | None = None,
) -> list[Cell]:
    """One seed of a student beside its teacher: alone and distilled, reading everything or a rationale.

    RE and REKD start from the same warm start; the plain classifiers get as many epochs as warm start and
    rationale stage together. What is compacted is the very pair of the row above it.

    Args:
        unequal: a pair of a small selector and a larger predictor, trained from the same teacher, if there is one.
        teacher_seed: the students of every seed learn from the teacher of this one; None: each from its own.
    """
    own = teacher_seed in (None, seed)
    taught = "teacher" if own else f"teacher@{teacher_seed}"
    stages = student.stages
    epochs = stages.classifier_epochs + stages.rationale_epochs
    plain = {"masked_share": 0.0, "rationale_epochs": 0.0, "compact_epochs": 0.0}
    classifier = changed(student, seed, stages={**plain, "classifier_epochs": epochs})
    with_kd = changed(student, seed, stages={**plain, "classifier_epochs": epochs}, distillation={"classifier": True})
    teacher_epochs = teacher.stages.classifier_epochs + teacher.stages.rationale_epochs
    extraction = changed(student, seed, stages={"compact_epochs": 0.0})
    compaction = {"epochs": stages.compact_epochs}

    def train(name: str, config: dict[str, Any], **needs: str) -> Cell:
        return Cell(name, seed, "train", config, needs)

    def masks(name: str, which: str, predictor: str) -> Cell:
        return Cell(name, seed, "masks", None, {"predictor": predictor, "like": "rekd_compact"}, {"which": which})

    teachers = [
        train("teacher_cls", changed(teacher, seed, stages={**plain, "classifier_epochs": teacher_epochs})),
        train("teacher", changed(teacher, seed)),
    ]
    cells = [
        *(teachers if own else []),
        train("cls", classifier),
        train("cls_kd", with_kd, teacher=taught.replace("teacher", "teacher_cls")),
        train("warm", changed(student, seed, stages={"rationale_epochs": 0.0, "compact_epochs": 0.0})),
        train("re", extraction, warm_start="warm", compare=taught),
        Cell("re_compact", seed, "compact", None, {"start": "re", "compare": taught}, compaction),
        train("rekd", extraction, warm_start="warm", teacher=taught),
        Cell("rekd_compact", seed, "compact", None, {"start": "rekd", "teacher": taught}, compaction),
        masks("random_mask", "random", "rekd_compact"),
        masks("first_k", "first", "rekd_compact"),
        masks("random_mask_warm", "random", "warm"),
        masks("first_k_warm", "first", "warm"),
    ]
    if unequal is not None:
        cells.append(train("unequal", changed(unequal, seed), teacher=taught))
    return cells


def distillation_rows(
    student: RunConfig, teacher: RunConfig, features: str, unequal: RunConfig | None = None
) -> Rows:
    """Titles and targets of those cells; ``features`` is what they are called, words or patches."""
    target = student.selection.target
    rows: Rows = [
        ("teacher_cls", "teacher's size, classifier (CLS)", None),
        ("teacher", "teacher pair (RE, compacted)" if teacher.stages.compact_epochs else "teacher pair (RE)",
         teacher.selection.target),
        ("cls", "CLS", None),
        ("cls_kd", "CLS + KD (from the teacher-size CLS)", None),
        ("warm", "warm start: CLS, random masks in part of its batches", None),
        ("re", "RE", target),
        ("re_compact", "RE compacted", target),
        ("rekd", "REKD", target),
        ("rekd_compact", "REKD compacted", target),
        ("random_mask", f"random {features}, read by REKD compacted", target),
        ("first_k", f"first {features}, read by REKD compacted", target),
        ("random_mask_warm", f"random {features}, read by the warm start", target),
        ("first_k_warm", f"first {features}, read by the warm start", target),
    ]  # fmt: skip
    if unequal is not None:
        sizes = " and ".join(
            f"{role} {backbone.layers} x {backbone.width}"
            for role, backbone in (("selector", unequal.selector), ("predictor", unequal.predictor))
        )
        rows.append(("unequal", f"REKD compacted, {sizes}", unequal.selection.target))
    return rows


COMPARISONS = [
    ("rekd", "re", "Does distillation help? REKD - RE"),
    ("rekd_compact", "re_compact", "... compacted: REKD - RE"),
    ("cls_kd", "cls", "Does plain distillation help? CLS + KD - CLS"),
    ("rekd_compact", "rekd", "What does compaction cost? REKD compacted - REKD"),
    ("rekd_compact", "cls", "What does the rationale cost? REKD compacted - CLS"),
    ("rekd_compact", "cls_kd", "... against CLS + KD"),
    ("rekd_compact", "teacher", "REKD compacted - teacher pair"),
    ("rekd_compact", "random_mask", "Is it the choice of features? REKD compacted - random mask, same predictor"),
    ("rekd_compact", "random_mask_warm", "... - random mask, predictor trained on random masks"),
    ("rekd_compact", "first_k", "... - first features, same predictor"),
    ("unequal", "rekd_compact", "What is a smaller selector with a larger predictor worth? Unequal - equal sizes"),
]


def mosaic_cells(config: RunConfig, seed: int) -> list[Cell]:
    """One seed of a pair on mosaics, beside classifiers that read everything: the mosaic, or the true tile alone."""
    epochs = config.stages.classifier_epochs + config.stages.rationale_epochs
    plain = {
        "masked_share": 0.0, "rationale_epochs": 0.0, "compact_epochs": 0.0, "classifier_epochs": epochs,
    }  # fmt: skip
    given = changed(config, seed, stages=plain, data={"other_tiles": "blank"})
    sizes = {"predictor": "mosaic", "like": "mosaic"}
    return [
        Cell("given", seed, "train", given),
        Cell("cls", seed, "train", changed(config, seed, stages=plain)),
        Cell("mosaic", seed, "train", changed(config, seed)),
        Cell("random_mask", seed, "masks", None, sizes, {"which": "random"}),
    ]


def mosaic_rows(config: RunConfig) -> Rows:
    """Titles and targets of those cells."""
    return [
        ("given", "CLS that is given the true tile (the others are black)", None),
        ("cls", "CLS that reads the whole mosaic", None),
        ("mosaic", "RE compacted", config.selection.target),
        ("random_mask", "random patches, read by RE compacted", config.selection.target),
    ]


MOSAIC_COMPARISONS = [
    ("mosaic", "given", "What does finding the tile cost? RE compacted - CLS that is given it"),
    ("mosaic", "cls", "RE compacted - CLS that reads everything"),
    ("mosaic", "random_mask", "Is it the choice of patches? RE compacted - random mask, same predictor"),
]


def run_table(
    cells: Sequence[Cell],
    render: Callable[[dict[str, dict[int, dict[str, Any]]]], list[str]],
    *,
    results: Path,
    work: Path,
    jobs: int,
    device: str,
    draws: int,
    only: str,
    table_only: bool,
    any_code: bool,
) -> None:
    """Run what is not finished, then write ``results``.md from all that is.

    Raises:
        typer.Exit: with code 1 if a cell failed.
    """
    cells = [replace(cell, options={**cell.options, "draws": draws}) for cell in chosen(cells, only)]
    code, settings = source_hash(ROOT / "rekd_train"), {"device": device, "draws": draws}
    table = Table(cells, results, work, code, settings, any_code=any_code or table_only)
    failures = 0 if table_only else execute(table, run_cell, jobs, typer.echo)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        result = table.result(cell)
        if result is not None:
            found.setdefault(cell.name, {})[cell.seed] = result
    if found:
        write_text(results.with_suffix(".md"), "\n".join(render(found)) + "\n")
        typer.echo(f"{results.with_suffix('.md')}: {sum(map(len, found.values()))} of {len(cells)} cells")
    if failures:
        raise typer.Exit(1)


def seeds_of(text: str) -> list[int]:
    """'1,2,3' as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' is no list of whole numbers such as 2026,2027", param_hint="--seeds"
        ) from None


def chosen(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The named cells and all that they need; empty: all."""
    names = {name for name in only.split(",") if name}
    unknown = names - {cell.name for cell in cells}
    if unknown:
        known = ", ".join(dict.fromkeys(cell.name for cell in cells))
        raise typer.BadParameter(f"no cell '{', '.join(sorted(unknown))}'; cells: {known}", param_hint="--only")
    if not names:
        return list(cells)
    for cell in reversed(cells):
        if cell.name in names:
            names |= {name.partition("@")[0] for name in cell.needs.values()}
    return [cell for cell in cells if cell.name in names]


def changed(config: RunConfig, seed: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with another seed and other settings in some sections.

    Without those that are the defaults: a field that is added later leaves finished cells finished. Nor does a preset's
    word about itself begin them anew.
    """
    values = config.model_dump(mode="json", exclude={"source"})
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return RunConfig.model_validate({**values, "seed": seed}).model_dump(mode="json", exclude_defaults=True)
