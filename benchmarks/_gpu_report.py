"""What ``gpu.py`` wrote on a GPU -> one result with tables, and its goals as checks. torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rekd_deploy.bench.results import Check, Input, Result, not_applicable, verdict
from rekd_deploy.bench.sections import Table, ratio_table
from rekd_deploy.bench.variants import CLASSIFIER, ONNX_GRAPHS, PYTORCH_GRAPHS
from rekd_deploy.errors import BenchmarkError

BELOW_CLASSIFIER = {1: 1.0, 64: 0.25}
"""Batch -> most that a captured pair may take, in times of the captured classifier of its predictor's size."""
OF_PYTORCH = 1.02
"""Most that a captured graph in fp16 may take, in times of the same model in PyTorch with CUDA graphs."""
ORDER = (
    "check", "parity", "latency_fp16", "latency_fp32", "pytorch", "compiled", "concurrency", "training", "tensorrt",
    "imdb",
)  # fmt: skip
_UNFINISHED = {"status": "unfinished", "reason": "", "seconds": 0.0, "cells": [], "not_run": [], "fell_back": []}
_MACHINE = {"processor", "cores", "gpu", "stand_in", "state"}
_PERCENTILES = ("p50", "p90", "p95", "p99")


def read_gpu(folder: Path) -> Result:
    """The steps' files as one result of the kind 'gpu'.

    Raises:
        BenchmarkError: there are none, one is damaged, or one was made where CUDA only pretends.
    """
    steps = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            steps[found["step"]] = _UNFINISHED | found
            pretends = "note" in found or found.get("hardware", {}).get("stand_in", False)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BenchmarkError(f"{path} is no result of benchmarks/gpu.py, or damaged; fix: take it away") from None
        if pretends:
            raise BenchmarkError(f"{path} was made where CUDA only pretends, it has no figures; fix: measure on a GPU")
    steps = dict(sorted(steps.items(), key=lambda each: (ORDER.index(each[0]) if each[0] in ORDER else 0, each[0])))
    measured = [step for step in steps.values() if step.get("hardware")]  # a step without time has not even looked
    if not measured:
        raise BenchmarkError(f"{folder} holds no results of benchmarks/gpu.py; fix: gpu.py run, or give files")
    machine = measured[0]["hardware"]
    versions = {
        name: str(value) for step in measured for name, value in step["hardware"].items() if name not in _MACHINE
    }
    inputs = {
        "gpu": Input(name=_card(measured[0])), "graphs": Input(name="graphs", sha256=measured[0]["graphs"]),
    }  # fmt: skip
    return Result(
        kind="gpu", command=measured[0]["command"], versions=versions, inputs=inputs,
        figures={"tables": [table._asdict() for table in _tables(steps)]},
        hardware={"processor": machine["processor"], "cores": machine["cores"], "gpus": [_card(measured[0])]},
        checks=[_parity_check(steps.get("parity", {})), *_time_checks(steps)],
    )  # fmt: skip


def _tables(steps: Mapping[str, Any]) -> list[Table]:
    tables = []
    columns = ("step", "outcome", "seconds", "what came of it", "where", "command")
    tables.append(Table("Steps", columns, [
        (name, step["status"], f"{step['seconds']:.0f}", step["reason"], _card(step), step["command"])
        for name, step in steps.items()
    ]))  # fmt: skip
    tables.append(Table("Answers on the card against the model's", (
        "graph", "precision", "captured", "positions decided otherwise", "score differs", "logit differs", "verdict",
    ), [
        (f"{each['pair']} {each['role']}", each["precision"], "yes" if each["captured"] else "no", *_judged(each))
        for each in steps.get("parity", {}).get("cells", ())
    ]))  # fmt: skip
    for name, step in steps.items():
        cells = [cell for cell in step["cells"] if "ways" in cell]
        tables.append(ratio_table(cells, f"{name}: ratios of times, from rounds"))
        tables.append(Table(f"{name}: times", ("form", "batch", "length", "p50 ms", *_PERCENTILES[1:]), [
            (way["name"], str(cell["batch"]), str(cell["length"]), *_times(way["milliseconds"]))
            for cell in cells for way in cell["ways"]
        ]))  # fmt: skip
    columns = ("clients in one process", "precision", "graphs", "p50 ms", *_PERCENTILES[1:], "a second", "failed")
    tables.append(Table("Concurrency", columns, [
        (str(cell["concurrency"]), cell["precision"], str(cell["graphs"]), *_times(cell["milliseconds"]),
         f"{cell['per_second']:,.0f}", str(cell["failed"]))
        for cell in steps.get("concurrency", {}).get("cells", ())
    ]))  # fmt: skip
    tables.append(Table("Training", ("student", "precision", "stage", "examples a second", "peak MB"), [
        (cell["student"], cell["precision"], stage, f"{found['examples_per_second']:,.0f}",
         _number(found["peak_mb"], ",.0f"))
        for cell in steps.get("training", {}).get("cells", ()) for stage, found in cell["stages"].items()
    ]))  # fmt: skip
    columns = ("engine", "graph", "positions decided otherwise", "score differs", "logit differs", "verdict")
    tables.append(Table("TensorRT's answers against the model's", columns, [
        (each["product"], f"{each['pair']} {each['role']}", *_judged(each))
        for each in steps.get("tensorrt", {}).get("engines", ())
    ]))  # fmt: skip
    for name, title in (("accuracy", "MiniLM on IMDB"), ("comparisons", "MiniLM on IMDB: differences")):
        found = steps.get("imdb", {}).get(name, {"columns": (), "rows": ()})
        tables.append(Table(title, tuple(found["columns"]), [tuple(row) for row in found["rows"]]))
    not_run = [(f"{name}: {each['name']}", each["reason"]) for name, step in steps.items() for each in step["not_run"]]
    tables.append(Table("Not run here", ("what", "why"), not_run))
    elsewhere = [(name, said) for name, step in steps.items() for said in step["fell_back"]]
    tables.append(Table("Ran elsewhere than it was to", ("step", "what"), elsewhere))
    return [table for table in tables if table.rows]


def _parity_check(step: Mapping[str, Any]) -> Check:
    name, cells, missing = "every graph answers as the model on the GPU", step.get("cells", []), step.get("not_run", [])
    if not cells and not missing:
        return not_applicable(name, "it was not tried", 0)
    wrong = sum(bool(each["beyond"]) for each in cells)
    words = f"{len(cells) - wrong} of {len(cells)} graphs, captured and not, answer as the model"
    words += f"; {len(missing)} did not run"
    return verdict(name, step["status"] == "done" and bool(cells) and not wrong and not missing, words, wrong, 0)


def _time_checks(steps: Mapping[str, Any]) -> Iterator[Check]:
    held = list(_held(steps))
    for precision in ("fp16", "fp32"):
        for batch, limit in BELOW_CLASSIFIER.items():
            best: dict[int, tuple[float, str]] = {}
            for cell, way, baseline, each in held:
                against = baseline["model"] == CLASSIFIER and baseline["runtime"] == ONNX_GRAPHS
                if against and way["precision"] == precision and cell["batch"] == batch:
                    told = each["ratio"], _told(cell, way, each)
                    best[cell["length"]] = min(best.get(cell["length"], told), told)
            yield _ratio_check(
                f"the best captured pair against the classifier, {precision}, batch {batch}", best.values(), limit
            )
    alike = [
        (each["ratio"], _told(cell, way, each)) for cell, way, baseline, each in held
        if way["precision"] == "fp16" and baseline["runtime"] == PYTORCH_GRAPHS and baseline["model"] == way["model"]
    ]  # fmt: skip
    yield _ratio_check("captured graphs against PyTorch with CUDA graphs, fp16", alike, OF_PYTORCH)


def _held(steps: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """(cell, way, baseline, ratio) of ONNX Runtime's captured forms."""
    for step in steps.values():
        for cell in (cell for cell in step["cells"] if "ways" in cell):
            ways = {way["name"]: way for way in cell["ways"]}
            for each in cell["ratios"]:
                if ways[each["way"]]["runtime"] == ONNX_GRAPHS:
                    yield cell, ways[each["way"]], ways[each["baseline"]], each


def _ratio_check(name: str, found: Any, limit: float) -> Check:
    worst, told = max(found, default=(None, ""))
    if worst is None:
        return not_applicable(name, "it was not measured", limit)
    return verdict(name, worst <= limit, f"at worst {told} (limit {limit:g})", worst, limit)


def _told(cell: Mapping[str, Any], way: Mapping[str, Any], each: Mapping[str, Any]) -> str:
    interval = f"{each['low']:.2f} to {each['high']:.2f}"
    return f"{each['ratio']:.3f} ({interval}), {way['name']}, batch {cell['batch']}, length {cell['length']}"


def _judged(each: Mapping[str, Any]) -> tuple[str, ...]:
    found = each["agreement"]
    figures = (_number(found[f"{what}_difference"], ".2g") for what in ("score", "logit"))
    return str(found["flipped_positions"]), *figures, "; ".join(each["beyond"]) or "within the limits"


def _times(milliseconds: Mapping[str, float] | None) -> tuple[str, ...]:
    return tuple("–" if milliseconds is None else f"{milliseconds[key]:.3f}" for key in _PERCENTILES)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _card(step: Mapping[str, Any]) -> str:
    told = step.get("hardware", {}).get("gpu", {})
    return ", driver ".join(filter(None, (told.get("name", "a GPU of unknown name"), told.get("driver_version"))))
