"""A TensorRT that runs the ONNX graph that an 'engine' names, in memory that only its addresses lead to.

What it checks is real: which tensor is bound where, of which type and shape, in which profile; that what is read was
uploaded, and that everything is given back.
"""

import ctypes
from enum import Enum
from types import SimpleNamespace

import numpy as np

DataType = Enum("DataType", "FLOAT HALF INT64 BOOL UINT8")
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
_ONNX = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT", "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "BOOL": np.bool_, "UINT8": np.uint8}


class FakeDriver:
    """libcuda over host memory; device addresses are host addresses plus an offset, so that mixing them up fails."""

    OFFSET = 1 << 40

    def __init__(self) -> None:
        self.devices, self.out_of_memory = 1, False
        self.blocks: dict[int, ctypes.Array] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*arguments) -> int:
            self.calls.append(name)
            return getattr(type(self), f"_{name}", lambda *rest: 0)(self, *arguments) or 0
        return call

    def _cuDeviceGetCount(self, count) -> None:
        count._obj.value = self.devices

    def _cuDeviceGetAttribute(self, value, attribute, device) -> None:
        value._obj.value = {75: 8, 76: 9}[attribute.value]

    def _cuDeviceGetName(self, text, size, device) -> None:
        text.value = b"Fake RTX"

    def _cuMemAlloc_v2(self, address, size) -> int:
        if self.out_of_memory:
            return 2
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block) + self.OFFSET
        self.blocks[address._obj.value] = block
        return 0

    def _cuMemFree_v2(self, address) -> None:
        del self.blocks[address.value]

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream) -> None:
        ctypes.memmove(self.host(target.value, size.value), source.value, size.value)

    def _cuMemcpyDtoHAsync_v2(self, target, source, size, stream) -> None:
        ctypes.memmove(target.value, self.host(source.value, size.value), size.value)

    def _cuGetErrorString(self, code, text) -> None:
        text._obj.value = b"out of memory"

    def host(self, address: int, size: int) -> int:
        assert size <= len(self.blocks[address]), "a copy beyond its buffer"
        return address - self.OFFSET


class FakeEngine:
    def __init__(self, driver: FakeDriver, graph: str, profiles) -> None:
        import onnxruntime
        self.driver, self.profiles, self.profile = driver, profiles, 0
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        # an order of its own
        self.types = {each.name: _ONNX[each.type] for each in (*self.session.get_outputs(), *self.session.get_inputs())}
        self.num_io_tensors, self.num_optimization_profiles = len(self.types), len(profiles)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.chosen: list[int] = []

    def create_execution_context(self):
        return self

    def get_tensor_name(self, index) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name):
        return DataType[self.types[name]]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.profiles[0] else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index][name]

    def set_optimization_profile_async(self, index, stream) -> bool:
        self.profile = index
        self.chosen.append(index)
        return True

    def set_input_shape(self, name, shape) -> bool:
        low, _, high = self.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name) -> tuple[int, ...]:
        # some sizes are computed from the inputs' shapes, as a real engine does, too
        return self.session.run([name], self.inputs())[0].shape

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: np.ones(self.shapes[name], _NUMPY[self.types[name]]) for name in self.profiles[0]}

    def execute_async_v3(self, stream) -> bool:
        inputs = self.inputs()
        for name, array in inputs.items():
            ctypes.memmove(array.ctypes.data, self.driver.host(self.addresses[name], array.nbytes), array.nbytes)
        names = [name for name in self.types if name not in inputs]
        for name, array in zip(names, self.session.run(names, inputs), strict=True):
            ctypes.memmove(self.driver.host(self.addresses[name], array.nbytes), array.ctypes.data, array.nbytes)
        return True


class FakeLogger:
    ERROR, INTERNAL_ERROR = "error", "internal error"

    def __init__(self, *severity) -> None: ...


class FakeLibrary:
    """A module like ``tensorrt_rtx``; ``plans`` says which graph an engine file's content stands for."""

    DataType, TensorIOMode, ILogger, Logger = DataType, TensorIOMode, FakeLogger, FakeLogger

    def __init__(self, driver: FakeDriver, version: str = "1.7.1.116") -> None:
        self.driver, self.__version__ = driver, version
        self.plans: dict[bytes, tuple[str, list]] = {}
        self.loaded: list[FakeEngine] = []

    def Runtime(self, logger):
        def deserialize(plan: bytes):
            if plan not in self.plans:
                logger.log("error", "the plan is of another version")
                return None
            self.loaded.append(FakeEngine(self.driver, *self.plans[plan]))
            return self.loaded[-1]
        return SimpleNamespace(deserialize_cuda_engine=deserialize)
