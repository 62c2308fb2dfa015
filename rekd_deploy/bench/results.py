"""What a measurement leaves behind: one JSON file with figures, how they came about, what they mean. torch-free.

    format, version   "rekd-bench", 1; the version rises whenever a key changes its meaning
    kind              the sub-command: accuracy, faithfulness, ...
    command           the command line, to be typed again
    hardware          processor, cores that may be used, memory, GPUs
    versions          rekd, Python and the libraries that shape a figure
    inputs            by role ('repository', 'checkpoint', 'data', ...): name and SHA-256 of what was measured
    settings          what was chosen: examples, seeds, limits
    figures           what was measured; each kind documents its own
    checks            in plain words what passed, failed, or was not applicable, each with its limit

Figures name no machine-specific path, so results can be committed and compared.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rekd_deploy.errors import BenchmarkError
from rekd_deploy.runtimes.onnxruntime import available_cores
from rekd_train.cli.command import finite
from rekd_train.files import sha256, write_json

FORMAT = "rekd-bench"
VERSION = 1
LIBRARIES = (
    "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "nvidia-pytriton",
    "tritonclient", "transformers", "timm", "tokenizers", "scikit-learn", "numpy",
)  # fmt: skip
_GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is to do; commands make bars of it."""


def silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Strict):
    """One verdict."""

    name: str
    outcome: Literal["passed", "failed", "not applicable"]
    words: str = Field(description="the finding in a sentence")
    value: float | None = Field(None, description="what was compared with the limit")
    limit: float | None = Field(None, description="what it was compared with")


def not_applicable(name: str, why: str, limit: float | None = None) -> Check:
    """A check that cannot be made here."""
    return Check(name=name, outcome="not applicable", words=why, limit=limit)


class Input(_Strict):
    """Something that was measured or measured with."""

    name: str = Field(description="of a file or folder, without its path; of a data set its origin")
    sha256: str = Field("", description="of its content; empty where it has none to hash, as a server")


class Result(_Strict):
    """One measurement, as its file holds it."""

    format: Literal["rekd-bench"] = FORMAT
    version: Literal[1] = VERSION
    kind: str
    command: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, Input]
    settings: dict[str, Any] = {}
    figures: dict[str, Any]
    checks: list[Check] = []

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.outcome == "failed"]


def result(
    kind: str, figures: Mapping[str, Any], *, inputs: Mapping[str, Input], settings: Mapping[str, Any] | None = None,
    checks: Sequence[Check] = (),
) -> Result:  # fmt: skip
    """A measurement made here and now: hardware, versions and the command are this process's."""
    return Result(
        kind=kind, command=shlex.join(["rekd-bench", *sys.argv[1:]]), hardware=hardware(), versions=versions(),
        inputs=dict(inputs), settings=finite(dict(settings or {})), figures=finite(dict(figures)),
        checks=[Check(**finite(check.model_dump())) for check in checks],
    )  # fmt: skip


def write_result(path: Path, measured: Result) -> Path:
    """Write a result file by renaming a finished one; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measured.model_dump(mode="json"))
    return path


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        BenchmarkError: the file is missing, damaged or of another version.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BenchmarkError(f"{path} is no result of rekd-bench; fix: give a file that rekd-bench wrote")
        if document.get("version") != VERSION:
            raise BenchmarkError(
                f"{path} has version {document.get('version')}; this rekd reads {VERSION}; fix: measure again"
            )
        return Result.model_validate(document)
    except FileNotFoundError:
        raise BenchmarkError(f"{path} does not exist; fix: rekd-bench KIND --output {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BenchmarkError(f"{path} is damaged: {problem}; fix: measure again") from None


# what was measured, without paths, with a digest


def repository_input(root: Path) -> Input:
    """A model repository; its manifest's digest stands for the whole, since the manifest has those of all files."""
    from rekd_deploy.repository.reader import MANIFEST

    return Input(name=Path(root).resolve().name, sha256=sha256(Path(root) / MANIFEST))


def checkpoint_input(path: Path) -> Input:
    """A checkpoint."""
    from rekd_train.checkpoints.checkpoint import checkpoint_hash

    return Input(name=Path(path).resolve().name, sha256=checkpoint_hash(path))


def items_input(items: Sequence[Any], origin: str, labels: np.ndarray | None = None) -> Input:
    """Texts or images of the requests, and their labels (n,) where they have some."""
    digest = hashlib.sha256(b"" if labels is None else labels.astype(np.int64).tobytes())
    for item in items:
        content = item.tobytes() if isinstance(item, np.ndarray) else str(item).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return Input(name=origin, sha256=digest.hexdigest())


# the machine


def hardware() -> dict[str, Any]:
    """This machine: ``processor``, ``machine``, ``cores`` that may be used, ``memory_gb``, ``gpus``."""
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        memory = None
    names = _cpu_lines("model name")
    processor = names[0] if names else platform.processor() or platform.machine()
    return {"processor": processor, "machine": platform.machine(), "cores": available_cores(), "memory_gb": memory,
            "gpus": _nvidia_smi("name,driver_version")}  # fmt: skip


def versions() -> dict[str, str]:
    """rekd, Python and the installed ones of ``LIBRARIES``."""
    from rekd_train import __version__

    found = {"rekd": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_state() -> dict[str, Any]:
    """``load`` (processes that want to run, mean of a minute), ``cpu_mhz`` (mean of the cores), ``gpus``.

    Read before and after a measurement; what cannot be read is left out.
    """
    state: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if clocks := _cpu_lines("cpu MHz"):
        state["cpu_mhz"] = round(sum(map(float, clocks)) / len(clocks))
    rows = csv.reader(_nvidia_smi(",".join(_GPU_STATE)), skipinitialspace=True)
    if gpus := [dict(zip(_GPU_STATE, row, strict=False)) for row in rows]:
        state["gpus"] = gpus
    return state


def _cpu_lines(name: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]


def _nvidia_smi(columns: str) -> list[str]:
    """A line of CSV for each NVIDIA GPU; no library is loaded that would take the GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={columns}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


# tables


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(name, value) of every number; nested names joined by spaces, lists left to the JSON but for curves."""
    rows: list[tuple[str, ...]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and {"rates", "accuracies"} <= set(value):
            pairs = zip(value["rates"], value["accuracies"], strict=True)
            rows += [(f"{name} at {rate:.0%}", _shown(found)) for rate, found in pairs]
            rows += [(f"{name} {key}", _shown(value[key])) for key in ("area", "note") if key in value]
        elif isinstance(value, Mapping):
            rows += [(f"{name} {inner}", text) for inner, text in figure_rows(value)]
        elif not isinstance(value, (list, tuple)):
            rows.append((name, _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
