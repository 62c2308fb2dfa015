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

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rekd_deploy.errors import BenchmarkError
from rekd_deploy.runtimes.onnxruntime import available_cores
from rekd_train.cli.command import finite
from rekd_train.files import write_json

FORMAT = "rekd-bench"
VERSION = 1
LIBRARIES = (
    "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "nvidia-pytriton",
    "tritonclient", "transformers", "timm", "tokenizers", "scikit-learn", "numpy",
)  # fmt: skip

Outcome = Literal["passed", "failed", "not applicable"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Strict):
    """One verdict."""

    name: str
    outcome: Outcome
    words: str = Field(description="the finding in a sentence")
    value: float | None = Field(None, description="what was held against the limit")
    limit: float | None = Field(None, description="what it was held against")


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
    kind: str,
    figures: Mapping[str, Any],
    *,
    inputs: Mapping[str, Input],
    settings: Mapping[str, Any] | None = None,
    checks: Sequence[Check] = (),
    arguments: Sequence[str] | None = None,
) -> Result:
    """A measurement made here and now: hardware and versions are read off this machine.

    Args:
        arguments: of the command, without the program's name; None: of this process.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    return Result(
        kind=kind,
        command=shlex.join(["rekd-bench", *typed]),
        hardware=hardware(),
        versions=versions(),
        inputs=dict(inputs),
        settings=finite(dict(settings or {})),
        figures=finite(dict(figures)),
        checks=[Check(**finite(check.model_dump())) for check in checks],
    )


def write_result(path: Path, measured: Result) -> Path:
    """Write a result file by renaming a finished one; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measured.model_dump(mode="json"))
    return path


def read_result(path: Path, kind: str | None = None) -> Result:
    """Read a result file.

    Args:
        kind: which kind is wanted; None: any.

    Raises:
        BenchmarkError: the file is missing, damaged, of another version or kind.
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
        found = Result.model_validate(document)
    except FileNotFoundError:
        raise BenchmarkError(f"{path} does not exist; fix: rekd-bench KIND --output {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BenchmarkError(f"{path} is damaged: {problem}; fix: measure again") from None
    if kind is not None and found.kind != kind:
        raise BenchmarkError(f"{path} holds '{found.kind}'; wanted is '{kind}'")
    return found


def hardware() -> dict[str, Any]:
    """This machine: ``processor``, ``machine``, ``cores`` that may be used, ``memory_gb``, ``gpus``."""
    return {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores": available_cores(),
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
    }


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU; asked without loading a library that would take it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
