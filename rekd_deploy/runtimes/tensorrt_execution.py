"""Runs a TensorRT engine on the GPU, with NumPy arrays in and out.

This file is copied beside ``model.py`` into repositories whose python backend runs engines, so it stands alone: NumPy,
the engine's library, and the CUDA driver through ctypes. For the names of variables see ``tensorrt_build.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

_TYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": np.bool_,
}


class ExecutionError(Exception):
    """The engine, its library or the GPU failed; one line that says why and what to do."""


class Cuda:
    """Device memory, one stream and the copies between host and device, on a GPU; ExecutionError if there is none."""

    def __init__(self, device: int = 0) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            missing = "there is no NVIDIA driver on this machine (libcuda.so.1)"
            fix = "run engines on a machine with an NVIDIA GPU, or the ONNX graphs here"
            raise ExecutionError(f"{missing}; fix: {fix}") from None
        self._call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if device >= count.value:
            raise ExecutionError(f"there is no GPU {device}; this machine has {count.value}; fix: choose another")
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(device))
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        # the device's own context: the one that the engine's library uses, too
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(0))
        self._buffers: dict[str, tuple[ctypes.c_void_p, int]] = {}

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.value or 0

    @property
    def capability(self) -> str:
        """Compute capability of the GPU, such as 'sm89'."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._device)
        return f"sm{major.value}{minor.value}"

    @property
    def name(self) -> str:
        """The GPU's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, ctypes.c_int(256), self._device)
        return text.value.decode()

    def enter(self) -> None:
        """Make this GPU the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def buffer(self, key: str, size: int) -> int:
        """Address of at least ``size`` bytes of device memory, kept under ``key`` until ``close``."""
        if size > self._buffers.get(key, (None, -1))[1]:
            if key in self._buffers:
                self._call("cuMemFree_v2", self._buffers.pop(key)[0])
            address = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
            self._buffers[key] = (address, size)
        return self._buffers[key][0].value

    def upload(self, array: np.ndarray, address: int) -> None:
        """Copy a contiguous array to the device, in the stream; the array must live until ``wait``."""
        host, device, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", device, host, size, self._stream)

    def download(self, address: int, array: np.ndarray) -> None:
        """Copy from the device into a contiguous array, in the stream; it is filled after ``wait``."""
        host, device, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", host, device, size, self._stream)

    def wait(self) -> None:
        """Until all that was put into the stream is done."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Release everything, from whichever thread."""
        self.enter()
        for address, _ in self._buffers.values():
            self._call("cuMemFree_v2", address)
        self._buffers.clear()
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, function: str, *arguments) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            reason = (text.value or b"unknown").decode()
            raise ExecutionError(f"the CUDA driver failed in {function}: {reason} (error {code})")


class EngineExecution:
    """An engine ready to run; its device memory lives until ``close``.

    Args:
        api: the module ``tensorrt`` or ``tensorrt_rtx``.
        plan: content of the engine file.
        logger, reason: an ``ILogger`` of that module, and the first useful line that it was told.
        device: index of the GPU.

    Raises:
        ExecutionError: there is no such GPU, or the engine cannot be loaded on it.
    """

    def __init__(self, api: Any, plan: bytes, logger: Any, reason: Callable[[], str], device: int) -> None:
        self._cuda = Cuda(device)
        try:
            self._load(api, plan, logger, reason)
        except BaseException:
            self._cuda.close()
            raise
        self._profile = 0
        self._lock = Lock()

    def _load(self, api: Any, plan: bytes, logger: Any, reason: Callable[[], str]) -> None:
        cuda = self._cuda
        self._runtime = api.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise ExecutionError(
                f"the engine cannot be loaded on {cuda.name} ({cuda.capability}): {reason()}; fix: build it "
                "with the version of the library that runs it, for this GPU"
            )
        self._engine, self._context = engine, context
        self.types: dict[str, np.dtype] = {}
        """Of every tensor, by name."""
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            self.types[name] = np.dtype(_TYPES[engine.get_tensor_dtype(name).name])
        self.inputs = [name for name in self.types if engine.get_tensor_mode(name) == api.TensorIOMode.INPUT]
        self.outputs = [name for name in self.types if name not in self.inputs]
        self.profiles: list[dict[str, list[tuple[int, ...]]]] = [
            {name: [tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)] for name in self.inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        """Smallest, tuned and largest shape by input, of every profile."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """All outputs by name, or ExecutionError; one thread at a time, since context and buffers are shared."""
        with self._lock:
            return self._run(inputs)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        context, cuda = self._context, self._cuda
        if context is None:
            raise ExecutionError("the engine is closed; fix: open it again")
        cuda.enter()
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs}
        for name, array in arrays.items():
            if array.dtype != self.types[name]:
                raise ExecutionError(f"the input {name} is {array.dtype}, the engine takes {self.types[name]}")
        self._choose_profile({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            address = cuda.buffer(name, array.nbytes)
            cuda.upload(array, address)
            if not (context.set_input_shape(name, array.shape) and context.set_tensor_address(name, address)):
                raise ExecutionError(f"the engine refuses the shape {array.shape} of {name}")
        outputs = {name: np.empty(tuple(context.get_tensor_shape(name)), self.types[name]) for name in self.outputs}
        for name, array in outputs.items():
            context.set_tensor_address(name, cuda.buffer(name, array.nbytes))
        if not context.execute_async_v3(cuda.stream):
            raise ExecutionError("the engine failed to run; fix: build it again for this machine")
        for name, array in outputs.items():
            cuda.download(cuda.buffer(name, array.nbytes), array)
        cuda.wait()
        return outputs

    @property
    def gpu(self) -> str:
        """The GPU's name and compute capability."""
        return f"{self._cuda.name} ({self._cuda.capability})"

    def close(self) -> None:
        """Release the engine and all device memory, after the request that runs."""
        with self._lock:
            self._context = self._engine = self._runtime = None
            self._cuda.close()

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        index = next((index for index, profile in enumerate(self.profiles) if _accepts(profile, shapes)), None)
        if index is None:
            largest = {name: limits[2] for name, limits in self.profiles[-1].items()}
            raise ExecutionError(f"the shapes {dict(shapes)} are outside the engine's profiles (up to {largest})")
        if index != self._profile:
            context = self._context
            if not context.set_optimization_profile_async(index, self._cuda.stream):
                raise ExecutionError(f"the engine's profile {index} cannot be chosen")
            self._profile = index


def _accepts(profile: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        len(shape) == len(profile[name][0])
        and all(low <= size <= high for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True))
        for name, shape in shapes.items()
    )
