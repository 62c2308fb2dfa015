"""Strings under NumPy 2 in a stub that was built for NumPy 1, such as that of the wheel ``nvidia-pytriton``.

``rekd-serve`` places this file beside the stub and has ``triton_python_backend_utils`` import it. Such a stub hands
``deserialize_bytes_tensor`` the first byte of a tensor over and over, and takes what ``serialize_byte_tensor`` gives
for 0 bytes long: it reads the size of an item where NumPy 1 kept it. So both ends read and write the tensor's memory
itself. Numbers would be as wrong, but have a right way, DLPack: the wrong one is refused here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import numpy as np

_OBJECT = 16
"""Where the address of the C++ object is in an object of pybind11: behind CPython's own head."""
_SIMPLE = 56
"""Bytes of such an object: that head, the address, a shared pointer, weak references, flags."""
_WORDS = 16
"""So much of a tensor's C++ object is looked at: its fields before those for shared memory."""
_PROBE = 12347


class Unread:
    """What the stub is told that a tensor of strings holds, until somebody asks."""

    def reshape(self, shape: list[int]) -> np.ndarray:
        """What the stub calls next."""
        return np.empty(shape, object)


def fields_of(tensor: object) -> ctypes.Array:
    """The fields of a tensor's C++ object, word by word; they can be written to."""
    address = ctypes.c_void_p.from_address(id(tensor) + _OBJECT).value
    return (ctypes.c_uint64 * _WORDS).from_address(address)


def places(tensor: object, array: np.ndarray) -> tuple[int, int]:
    """Which fields are the address and the size of the memory of a tensor that was made of ``array``."""
    fields = list(fields_of(tensor))
    if array.ctypes.data not in fields or array.nbytes not in fields:
        raise ImportError("Triton's stub is not the one that REKD knows; fix: use NumPy 1 with it")
    return fields.index(array.ctypes.data), fields.index(array.nbytes)


def split(content: bytes) -> list[bytes]:
    """Strings as Triton lays them out: four bytes of length, then the bytes."""
    found, start = [], 0
    while start < len(content):
        (size,) = struct.unpack_from("<I", content, start)
        found.append(content[start + 4 : start + 4 + size])
        start += 4 + size
    return found


def mend(tensor_type: type, serialize: Callable[[np.ndarray], bytes]) -> bool:
    """Make strings right in the stub's class of tensors; returns False where nothing has to be mended."""
    if tensor_type.__basicsize__ != _SIMPLE:
        raise ImportError("the tensors of Triton's stub are not those that REKD knows; fix: use NumPy 1 with it")
    probe = np.zeros(_PROBE, np.uint8)
    if probe.nbytes in list(fields_of(tensor_type("probe", probe))):
        return False
    capsule = probe.__dlpack__()
    known = tensor_type.from_dlpack("probe", capsule)
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), b"used_dltensor")
    address, size = places(known, probe)
    as_numpy, initialise = tensor_type.as_numpy, tensor_type.__init__

    def right_as_numpy(self: object) -> np.ndarray:
        wrong = as_numpy(self)
        if wrong.dtype != object:
            raise TypeError("as_numpy is wrong under NumPy 2; fix: numpy.from_dlpack(tensor), or export again")
        fields, right = fields_of(self), np.empty(wrong.size, object)
        right[:] = split(ctypes.string_at(fields[address], fields[size])) if fields[size] else []
        return right.reshape(wrong.shape)

    def right_initialise(self: object, name: str, numpy_array: np.ndarray) -> None:
        if numpy_array.dtype.kind not in "OS":
            raise TypeError("Tensor(...) is wrong under NumPy 2; fix: Tensor.from_dlpack(...), or export again")
        initialise(self, name, numpy_array)
        fields_of(self)[size] = len(serialize(numpy_array))

    tensor_type.as_numpy, tensor_type.__init__ = right_as_numpy, right_initialise
    return True


def mend_stub(utilities: dict) -> None:
    """Called by the stub's module of utilities, with its names, when it has been loaded."""
    from c_python_backend_utils import Tensor

    if int(np.__version__.partition(".")[0]) >= 2 and mend(Tensor, utilities["serialize_byte_tensor"]):
        utilities["deserialize_bytes_tensor"] = lambda encoded: Unread()
