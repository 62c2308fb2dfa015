"""ONNX Runtime on a GPU: what it needs of the machine, its sessions, and buffers that stay there. torch-free."""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Graph, parse_device
from rekd_deploy.runtimes.onnxruntime import onnx_runtime
from rekd_train.errors import MissingExtraError, install_command

PROVIDER = "CUDAExecutionProvider"
_DRIVER_TOO_OLD, _NO_GPU = 35, 100
"""cudaErrorInsufficientDriver, cudaErrorNoDevice."""
_TO_HOST, _FOR_ALL_CONTEXTS = 2, 1
"""cudaMemcpyDeviceToHost, cudaHostAllocPortable."""
_COPYING = ("LSTM", "GRU", "RNN")
"""Operators whose kernels copy the lengths of the rows from host memory, which is given back after the run."""


def check_device(device: str) -> None:
    """``check_cuda`` where a device is a GPU; EngineError for a name that is none."""
    if (parsed := parse_device(device))[0] == "cuda":
        check_cuda(parsed[1])


def check_cuda(index: int = 0) -> None:
    """Load what the CUDA provider needs, and find the GPU.

    Raises:
        MissingExtraError, EngineError: no ONNX Runtime for GPUs, no driver, an old one, no library, or no such GPU.
    """
    if PROVIDER not in onnx_runtime().get_available_providers():
        # the one for CPUs is there, and the two overwrite each other's files
        raise MissingExtraError("onnxruntime-gpu", "gpu", before="pip uninstall -y onnxruntime, then ")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        missing = "there is no NVIDIA driver on this machine (libcuda.so.1)"
        raise EngineError(f"{missing}; fix: install it, or device 'cpu'") from None
    onnx_runtime().set_default_logger_severity(4)  # it warns at each session; what fails is raised
    if missing := _missing_library():
        raise EngineError(f"ONNX Runtime cannot use the GPU: {missing}; fix: {install_command('gpu')}")
    _check_gpu(index)


def cuda_session(model: bytes | Path, options: Any, *, device: int, captured: bool) -> Any:
    """An ``InferenceSession`` on a GPU; ``captured``: one CUDA graph for each ``gpu_graph_id`` of the run options.

    Raises:
        EngineError: ONNX Runtime would run it on the CPU; whatever else ONNX Runtime raises passes through.
    """
    settings = {"device_id": str(device), "enable_cuda_graph": str(int(captured)), "use_tf32": "0"}
    content = model if isinstance(model, bytes) else str(model)
    session = onnx_runtime().InferenceSession(content, options, providers=[(PROVIDER, settings)], enable_fallback=0)
    if session.get_providers()[0] != PROVIDER:  # ONNX Runtime falls back without a word
        fix = f"{install_command('gpu')}, a driver for its CUDA, or device 'cpu'"
        raise EngineError(f"ONNX Runtime would run it on the CPU, not on GPU {device}; fix: {fix}")
    return session


def copying_operator(model: bytes | Path) -> str:
    """The first operator of a graph that must not be captured, or '': a driver need not refuse its capture."""
    # field 4 of a node's message, so that the package onnx need not be there
    content = model if isinstance(model, bytes) else model.read_bytes()
    return next((name for name in _COPYING if bytes((0x22, len(name))) + name.encode() in content), "")


def refused_capture(error: Exception) -> str:
    """What ONNX Runtime could not capture, from what it raised, or ''; a lack of memory is not meant."""
    found = re.search(r"CUDA failure 90\d:.*expr=(cuda(?:Memcpy|Memset|\w*Synchronize)\w*)", str(error), re.DOTALL)
    operator = re.search(r"while running (\w+) node", str(error))
    return f"its {operator[1] if operator else 'step'} calls {found[1]}" if found else ""


def forget_errors() -> None:
    """Clear what a failed call left in this thread: ONNX Runtime would take it for a failure of its next kernel."""
    with suppress(OSError):
        _cuda_runtime().cudaGetLastError()


def _cuda_runtime() -> ctypes.CDLL:
    """CUDA's runtime, found by name since it is loaded already."""
    return ctypes.CDLL(f"libcudart.so.{onnx_runtime().cuda_version.split('.')[0]}")


def _named(code: int) -> str:
    """What CUDA's runtime calls an error, and its number."""
    text = _cuda_runtime().cudaGetErrorString
    text.restype = ctypes.c_char_p
    return f"{text(code).decode()} ({code})"


def _check_gpu(index: int) -> None:
    """Raise EngineError where the driver does not serve this CUDA, or there is no GPU of that number."""
    runtime, count = _cuda_runtime(), ctypes.c_int()
    if code := runtime.cudaGetDeviceCount(ctypes.byref(count)):
        runtime.cudaGetLastError()
        if code == _DRIVER_TOO_OLD:
            version = onnx_runtime().cuda_version
            raise EngineError(f"the NVIDIA driver is too old for CUDA {version}; fix: update it, or device 'cpu'")
        if code != _NO_GPU:
            raise EngineError(f"CUDA does not start: {_named(code)}; fix: see what nvidia-smi says, or device 'cpu'")
    if count.value == 0:
        raise EngineError("the driver shows no GPU; fix: see nvidia-smi and CUDA_VISIBLE_DEVICES, or device 'cpu'")
    if index >= count.value:
        raise EngineError(f"there is no GPU {index}; this machine has {count.value}; fix: choose another")


def reason_of(error: Exception) -> str:
    """The first line of what ONNX Runtime raised, with the fix where it is known."""
    text = str(error).strip()
    if "cuDNN is unavailable" in text:
        return f"cuDNN is missing; fix: {install_command('gpu')}"
    if "graph capture" in text:
        fix = "export it again, with --precision fp32 or fp16"
        return f"some of its operators have no kernels for GPUs, as those of int8; fix: {fix}"
    if found := refused_capture(error):
        return f"it cannot be captured as a CUDA graph: {found}; fix: run it without capture"
    # any other 900 is of memory requested while capturing, since none was left before
    if any(sign in text for sign in ("Failed to allocate memory", "out of memory", "CUDA failure 900")):
        return "the GPU has no memory left; fix: smaller batches, or end what else runs there"
    return text.splitlines()[0] if text else type(error).__name__


@cache
def _missing_library() -> str:
    """What ONNX Runtime says about the first of CUDA's libraries that it cannot load, or ''."""
    with redirect_stdout(StringIO()) as output:
        onnx_runtime().preload_dlls()
    return next((line.strip() for line in output.getvalue().splitlines() if line.startswith("Failed to load")), "")


class _Pinned:
    """Page-locked host memory, which ONNX Runtime's binding cannot allocate; freed with this object."""

    def __init__(self, sizes: Sequence[int], dtype: np.dtype) -> None:
        pointer, count = ctypes.c_void_p(), int(np.prod(sizes)) * dtype.itemsize
        _checked("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(count), _FOR_ALL_CONTEXTS)
        weakref.finalize(self, _cuda_runtime().cudaFreeHost, pointer)
        memory = (ctypes.c_char * count).from_address(pointer.value or 0)
        self.array = np.frombuffer(memory, dtype).reshape(sizes)

    def read(self, buffer: Any) -> np.ndarray:
        """A copy of what lies in an OrtValue on the GPU."""
        target, size = ctypes.c_void_p(self.array.ctypes.data), ctypes.c_size_t(self.array.nbytes)
        _checked("cudaMemcpy", target, ctypes.c_void_p(buffer.data_ptr()), size, _TO_HOST)
        return self.array.copy()


def _checked(function: str, *arguments: Any) -> None:
    """Call CUDA's runtime; EngineError with what it says."""
    runtime = _cuda_runtime()
    if code := getattr(runtime, function)(*arguments):
        runtime.cudaGetLastError()
        fix = "smaller batches, or end what else runs on this machine and its GPU"
        raise EngineError(f"CUDA failed in {function}: {_named(code)}; fix: {fix}")


class Shape:
    """What a ``DeviceChain`` keeps for one shape of batch and length: buffers, bound to each of its graphs.

    Args:
        axes: size of each symbolic axis.
        kind, index: the device.
        number, captured: id of its captured graphs, and their names.
    """

    def __init__(
        self, sessions: Sequence[Any], graphs: Sequence[Graph], axes: dict[str, int], kind: str, index: int,
        number: int, captured: Collection[str],
    ) -> None:
        runtime = onnx_runtime()
        self._on_cpu, self._index = kind == "cpu", index
        self._host: dict[str, _Pinned] = {}
        self._types: dict[str, np.dtype] = {}
        replayed = runtime.RunOptions()
        replayed.add_run_config_entry("gpu_graph_id", str(number))
        self.buffers: dict[str, Any] = {}
        self._steps = []
        for session, graph in zip(sessions, graphs, strict=True):
            binding = session.io_binding()
            for spec in (*graph.signature.inputs, *graph.signature.outputs):
                if spec.name not in self.buffers:  # what an earlier step gave is read where it lies
                    self._types[spec.name] = np.dtype(spec.dtype)
                    self.buffers[spec.name] = runtime.OrtValue.ortvalue_from_shape_and_type(
                        [axes.get(axis, axis) for axis in spec.shape], self._types[spec.name].type, kind, index
                    )
            for spec in graph.signature.inputs:
                binding.bind_ortvalue_input(spec.name, self.buffers[spec.name])
            for spec in graph.signature.outputs:
                binding.bind_ortvalue_output(spec.name, self.buffers[spec.name])
            self._steps.append((session, binding, replayed if graph.name in captured else None))

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """The outputs of these names; no others leave the device."""
        if not self._on_cpu:
            _checked("cudaSetDevice", self._index)
        for name, array in inputs.items():
            if self._on_cpu:
                self.buffers[name].update_inplace(np.ascontiguousarray(array))
            else:
                np.copyto(self._pinned(name).array, array)
                self.buffers[name].update_inplace(self._pinned(name).array)
        for session, binding, options in self._steps:
            session.run_with_iobinding(binding, options)
        if self._on_cpu:  # what ONNX Runtime hands out is the buffer itself
            return {name: np.array(self.buffers[name].numpy()) for name in outputs}
        return {name: self._pinned(name).read(self.buffers[name]) for name in outputs}

    def _pinned(self, name: str) -> _Pinned:
        if name not in self._host:
            self._host[name] = _Pinned(self.buffers[name].shape(), self._types[name])
        return self._host[name]
