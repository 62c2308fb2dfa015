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
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

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

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is to do; commands make bars of it."""


def silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""


class Check(BaseModel, frozen=True, extra="forbid"):
    """One verdict."""

    name: str
    outcome: Literal["passed", "failed", "not applicable"]
    words: str = Field(description="the finding in a sentence")
    value: float | None = Field(None, description="what was compared with the limit")
    limit: float | None = Field(None, description="what it was compared with")


def verdict(name: str, passed: bool, words: str, value: float | None = None, limit: float | None = None) -> Check:
    """A check that passed or failed."""
    return Check(name=name, outcome="passed" if passed else "failed", words=words, value=value, limit=limit)


def not_applicable(name: str, why: str, limit: float | None = None) -> Check:
    """A check that cannot be made here."""
    return Check(name=name, outcome="not applicable", words=why, limit=limit)


class Input(BaseModel, frozen=True, extra="forbid"):
    """Something that was measured or measured with."""

    name: str = Field(description="of a file or folder, without its path; of a data set its origin")
    sha256: str = Field("", description="of its content; empty where it has none to hash, as a server")


class Result(BaseModel, frozen=True, extra="forbid"):
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measured.model_dump(mode="json"))
    return path


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        BenchmarkError: the file is missing, damaged or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BenchmarkError(f"{path} is no result of rekd-bench; fix: give a file that rekd-bench wrote")
        if (version := document.get("version")) != VERSION:
            raise BenchmarkError(f"{path} has version {version}; this rekd reads {VERSION}; fix: measure again")
        return Result.model_validate(document)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}; fix: give a file of rekd-bench") from None
    except ValueError as error:  # of JSON, UTF-8 or a field
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        memory, lines = None, []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return {"processor": processor, "machine": platform.machine(), "cores": available_cores(), "memory_gb": memory,
            "gpus": [", ".join(row) for row in nvidia_smi("name", "driver_version")]}  # fmt: skip


def nvidia_smi(*columns: str, options: Sequence[str] = ()) -> list[list[str]]:
    """What nvidia-smi tells of each GPU; empty without it. No library is loaded that would take the GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))


def versions() -> dict[str, str]:
    """rekd, Python and the installed ones of ``LIBRARIES``."""
    from rekd_train import __version__

    found = {"rekd": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
