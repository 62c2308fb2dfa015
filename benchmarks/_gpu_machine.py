"""What a GPU machine has, what it lacks, and what is to be done about it. torch-free."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from _gpu_graphs import Pair
from _models import processor

from rekd_deploy.bench.results import nvidia_smi
from rekd_deploy.runtimes.onnxruntime import onnx_runtime
from rekd_deploy.runtimes.onnxruntime_cuda import check_cuda
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.errors import RekdError, install_command

LEAST_MEMORY, LEAST_DISK = 8000, 4000
"""Free megabytes."""
OLDEST_DRIVERS = {"12": 525, "13": 580}
"""By the CUDA that ONNX Runtime was built for, NVIDIA's table of compatibility."""
PACKAGES = "rekd-rationales numpy torch onnxruntime-gpu onnxruntime tensorrt tensorrt-cu13 tensorrt-rtx-cu13".split()
_GPU = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")


def hardware() -> dict[str, Any]:
    """GPU, driver, processor and versions; what cannot be read is left out."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "gpu": gpu(), "stand_in": stands_in(), "state": {"load": os.getloadavg()[0], **gpu(_STATE)}}


def gpu(columns: Sequence[str] = _GPU) -> dict[str, str]:
    """The first GPU that CUDA sees, as nvidia-smi tells of it; empty where that says nothing."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    rows = nvidia_smi(*columns, options=[f"--id={visible.split(',')[0]}"] if visible else [])
    return dict(zip(columns, rows[0], strict=False)) if rows else {}


def stands_in() -> bool:
    """Whether CUDA is the one of the tests, which only pretends."""
    try:
        return hasattr(ctypes.CDLL("libcuda.so.1"), "standin_live")
    except OSError:
        return False


def no_torch_cuda() -> str:
    """Why PyTorch cannot use the GPU here, or ''."""
    try:
        import torch
    except ModuleNotFoundError:
        return "PyTorch is not installed"
    except (ImportError, OSError) as error:  # a library of CUDA that it wants, for one
        return f"PyTorch cannot be loaded: {str(error).splitlines()[0]}"
    if torch.cuda.is_available():
        return ""
    return f"PyTorch {torch.__version__} has no CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"


def lacks(pair: Pair, output: Path) -> tuple[list[str], list[str]]:
    """What stands in the way of everything, and what only makes steps poorer; a line each, with the fix."""
    fatal, poorer = [], []
    try:
        check_cuda()
        release = getattr(onnx_runtime(), "cuda_version", "") or ""
        told = gpu()
        if not told:
            poorer.append("nvidia-smi does not answer: driver and memory are unknown; fix: install the driver's tools")
        else:
            driver, oldest = told["driver_version"], OLDEST_DRIVERS.get(release.split(".")[0], 0)
            if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < oldest:
                fatal.append(f"the driver {driver} is too old for CUDA {release}; fix: {oldest} or later")
            if told["memory.free"].isdigit() and int(told["memory.free"]) < LEAST_MEMORY:
                fatal.append(f"{told['memory.free']} MB of the GPU are free, {LEAST_MEMORY} are needed; fix: end what "
                             "else runs there (nvidia-smi names it)")  # fmt: skip
        if not fatal:
            (graph,) = pair.graphs("fp32", ["selector"])
            with DeviceChain([graph]) as chain:
                chain.run(_smallest(pair))
    except RekdError as error:
        fatal.append(str(error))
    if (free := _too_full(output)) is not None:
        fatal.append(f"{free} MB of the disk under {output} are free; fix: make room for {LEAST_DISK} MB")
    if reason := no_torch_cuda():
        poorer.append(f"{reason}: its steps are skipped unless --pytorch names a Python with one for the driver's CUDA")
    if not any(_has(name) for name in ("tensorrt", "tensorrt_rtx")):
        poorer.append(f"TensorRT is not installed, its step is skipped; fix: {install_command('tensorrt')}")
    return fatal, poorer


def _smallest(pair: Pair) -> dict[str, Any]:
    import numpy as np

    sizes = {"batch": 1, "length": 16}
    return {
        spec.name: np.ones([sizes.get(axis, axis) for axis in spec.shape], spec.dtype)
        for spec in pair.signature.selector.inputs
    }


def _too_full(output: Path) -> int | None:
    free = shutil.disk_usage(output).free // 1_000_000
    return free if free < LEAST_DISK else None


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
