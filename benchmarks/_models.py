"""What a cell does: train, compact or measure one model, and the figures that come of it."""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from _cells import ROOT


def run_cell(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out one cell and measure it on test.

    Kinds:
        train: ``train_run`` by the configuration; roles 'teacher' and 'warm_start' are used if they are filled, the
            options ``knowledge``, a file of recorded knowledge, ``warm_start``, a checkpoint, ``half`` of it, and
            ``brief``: measured in one pass, without the report.
        given: ``options['checkpoint']``, measured in one pass.
        compact: ``compact_run`` of the role 'start' for ``options['epochs']``, distilled from 'teacher' if filled.
        masks: the predictor of the role 'predictor' reads as many features of each example as the pair of the
            role 'like' keeps: ``options['which']`` 'random' or 'first'.

    Args:
        job: as ``_cells.Table.job`` makes it; ``device`` as in ``rekd-train evaluate``.

    Returns:
        ``accuracy``, ``rate``, the whole ``report``, ``correct`` (hexadecimal, one bit an example), ``seconds``
        and ``environment``.
    """
    from rekd_train.runs import compact_run, train_run

    start = time.perf_counter()
    output, needs = Path(job["output"]), {role: Path(path) for role, path in job["needs"].items()}
    if job["kind"] == "train":
        from rekd_train.config.run import RunConfig

        config = RunConfig.model_validate(job["config"])
        roles = {role: needs[role] for role in ("teacher", "warm_start") if role in needs}
        if knowledge := job["options"].get("knowledge"):
            roles["teacher"] = ROOT / knowledge
        if given := job["options"].get("warm_start"):
            roles["warm_start"] = ROOT / given
        resume = _may_resume(output, job["key"])
        half = job["options"].get("half")
        train_run(config, output, **roles, half=half, device=job["device"], resume=resume, overwrite=True)
        if job["options"].get("brief"):
            figures = _briefly(output, job["device"])
        else:
            figures = _measured(output, needs.get("teacher", needs.get("compare")), job)
    elif job["kind"] == "given":
        figures = _briefly(ROOT / job["options"]["checkpoint"], job["device"])
    elif job["kind"] == "compact":
        epochs = job["options"]["epochs"]
        options = {"epochs": epochs, "device": job["device"], "overwrite": True}
        compact_run(needs["start"], output, teacher=needs.get("teacher"), **options)
        figures = _measured(output, needs.get("teacher", needs.get("compare")), job)
    else:
        figures = _masked(needs["predictor"], needs["like"], job)
    return {**figures, "seconds": round(time.perf_counter() - start, 1), "environment": environment(job["device"])}


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    import tokenizers
    import torch
    import transformers

    import rekd_train
    from rekd_train.training.runtime import chosen_device

    chosen = chosen_device(device)
    return {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "rekd": rekd_train.__version__,
    }


def bits(correct: np.ndarray) -> str:
    """(n,) bool as hexadecimal digits; ``from_bits`` is the inverse."""
    return np.packbits(correct).tobytes().hex()


def from_bits(text: str, count: int) -> np.ndarray:
    """(count,) bool from ``bits``."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)


def _may_resume(output: Path, key: str) -> bool:
    """Whether the state that an interrupted run left behind is of this very cell; notes that from now on it is."""
    from rekd_train.files import write_text
    from rekd_train.training.state import FILE, training_directory

    marker = training_directory(output) / "cell.key"
    if marker.is_file() and marker.read_text(encoding="utf-8") == key:
        return marker.with_name(FILE).exists()
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(marker, key)
    return False


def _measured(path: Path, teacher: Path | None, job: dict[str, Any]) -> dict[str, Any]:
    """The full report of a checkpoint, and which test examples it gets right."""
    from rekd_train.evaluation.forward import run_split
    from rekd_train.evaluation.report import evaluate

    pair, splits = _opened(path, job["device"])
    comparison = _opened(teacher, job["device"])[0] if teacher is not None else None
    report = evaluate(pair, splits, draws=job["draws"], teacher=comparison)
    correct = run_split(pair, splits["test"]).class_logits.argmax(axis=1) == splits["test"].labels
    return {
        "accuracy": report["classification"]["accuracy"], "rate": report["rate"]["rate"], "examples": len(correct),
        "correct": bits(correct), "report": report,
    }  # fmt: skip


@lru_cache
def _briefly(path: Path, device: str) -> dict[str, Any]:
    """The figures of one pass over test; one checkpoint may stand beside every seed."""
    from rekd_train.evaluation.forward import measure, run_split

    pair, splits = _opened(path, device)
    outputs = run_split(pair, splits["test"])
    correct = outputs.class_logits.argmax(axis=1) == splits["test"].labels
    return {**measure(pair, splits["test"], outputs), "correct": bits(correct)}


def _masked(predictor: Path, like: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Another rationale of the same size, read by the same predictor."""
    import torch

    from rekd_train.evaluation.forward import (
        SplitOutputs,
        decide,
        first_like,
        measure,
        random_like,
        run_masks,
        run_selector,
    )

    pair, splits = _opened(predictor, job["device"])
    model = pair if like == predictor else _opened(like, job["device"])[0]
    test, selector = splits["test"], run_selector(model, splits["test"])
    mask = decide(selector.scores, selector.selectable, model.policy)
    if job["options"]["which"] == "random":
        mask = random_like(mask, selector.selectable, torch.Generator().manual_seed(job["seed"]))
    else:
        mask = first_like(mask, selector.selectable)
    logits = run_masks(pair, test, {"given": mask})["given"]
    outputs = SplitOutputs(logits, *(each.sum(dim=1).numpy() for each in (mask, selector.selectable)))
    return {**measure(pair, test, outputs), "correct": bits(logits.argmax(axis=1) == test.labels)}


def _opened(path: Path, device: str):
    """A checkpoint on its device, with the dev and test splits of its data."""
    from rekd_train.checkpoints import checkpoint, read_description
    from rekd_train.config.run import RunConfig
    from rekd_train.data import encode
    from rekd_train.training.runtime import chosen_device

    pair = checkpoint.load(path).to(chosen_device(device))
    config = RunConfig.model_validate(read_description(path)["training"]["config"])
    data = _data(config.data.model_dump_json())
    return pair, {name: encode(data.splits[name], pair.preprocessor) for name in ("dev", "test")}


@lru_cache(maxsize=1)
def _data(settings: str):
    """A process measures many cells of the same data."""
    from rekd_train.config.run import DataConfig
    from rekd_train.data import load_data

    return load_data(DataConfig.model_validate_json(settings))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
