"""Sessions of ONNX Runtime on a GPU: what they need of the machine, and that they are really there. torch-free."""

from __future__ import annotations

import ctypes
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from typing import Any

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.onnxruntime import onnx_runtime
from rekd_train.errors import MissingExtraError, install_command

PROVIDER = "CUDAExecutionProvider"


def check_cuda() -> None:
    """Load what the CUDA provider needs.

    Raises:
        MissingExtraError: the ONNX Runtime that is installed serves no GPUs.
        EngineError: there is no driver, or a library is missing.
    """
    if PROVIDER not in onnx_runtime().get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "gpu")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError(
            "there is no NVIDIA driver on this machine (libcuda.so.1); fix: install it, or device 'cpu'"
        ) from None
    onnx_runtime().set_default_logger_severity(4)  # it warns at each session; what fails is raised
    if missing := _missing_library():
        raise EngineError(f"ONNX Runtime cannot use the GPU: {missing}; fix: {install_command('gpu')}")


def cuda_session(content: bytes | str, options: Any, *, device: int, captured: bool) -> Any:
    """An ``InferenceSession`` on a GPU.

    Args:
        content: the graph, or its file.
        options: ``SessionOptions``.
        captured: CUDA graphs are captured and replayed, one for each ``gpu_graph_id`` of the run options.

    Raises:
        EngineError: ONNX Runtime would run it on the CPU; whatever else ONNX Runtime raises passes through.
    """
    settings = {"device_id": str(device), "enable_cuda_graph": str(int(captured)), "use_tf32": "0"}
    session = onnx_runtime().InferenceSession(content, options, providers=[(PROVIDER, settings)], enable_fallback=0)
    if session.get_providers()[0] != PROVIDER:  # ONNX Runtime falls back without a word
        raise EngineError(
            f"ONNX Runtime would run it on the CPU, not on GPU {device}; fix: {install_command('gpu')}, a driver for "
            "its CUDA, or device 'cpu'"
        )
    return session


def forget_errors() -> None:
    """Clear what a failed call left in this thread: ONNX Runtime would take it for a failure of its next kernel."""
    with suppress(OSError):  # found by name, since it is loaded already
        ctypes.CDLL(f"libcudart.so.{onnx_runtime().cuda_version.split('.')[0]}").cudaGetLastError()


def reason_of(error: Exception) -> str:
    """The first line of what ONNX Runtime raised, with the fix where it is known."""
    text = str(error).strip()
    if "cuDNN is unavailable" in text:
        return f"cuDNN is missing; fix: {install_command('gpu')}"
    if found := re.search(r"Invalid device ID: (\d+), must be between 0 \(inclusive\) and (\d+)", text):
        return f"there is no GPU {found[1]}; this machine has {found[2]}; fix: choose another"
    if "graph capture" in text:
        return (
            "some of its operators have no kernels for GPUs, as those of int8; fix: export it again, with --precision "
            "fp32 or fp16"
        )
    # 900: something was asked for while capturing, which is memory that was not left before
    if any(sign in text for sign in ("Failed to allocate memory", "out of memory", "CUDA failure 900")):
        return "the GPU has no memory left; fix: smaller batches, or end what else runs there"
    return text.splitlines()[0] if text else type(error).__name__


@cache
def _missing_library() -> str:
    """What ONNX Runtime says about the first of CUDA's libraries that it cannot load, or ''."""
    with redirect_stdout(StringIO()) as told:
        onnx_runtime().preload_dlls()
    return next((line.strip() for line in told.getvalue().splitlines() if line.startswith("Failed to load")), "")
