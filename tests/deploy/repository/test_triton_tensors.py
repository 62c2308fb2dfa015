"""Tensors between Triton's stub and NumPy: by DLPack where the stub misreads arrays, and strings in its memory."""

import ctypes
import struct

import numpy as np
import pytest
import triton_stub

from rekd_deploy.repository.backend import strings, tensors


def frozen(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("array", [
    np.arange(6).reshape(2, 3), np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)[:, ::2],
    np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4), np.array([[1.5], [2.5]], np.float32).T, np.empty((0, 3)),
    frozen(np.arange(4).reshape(2, 2)), np.array([[7]], np.int32)], ids=str)  # fmt: skip
def test_numbers_go_by_dlpack_and_come_back(monkeypatch, array):
    monkeypatch.setattr(tensors, "BY_DLPACK", True)
    monkeypatch.setattr(triton_stub, "MISREADS", True)
    tensor = tensors.as_tensor(triton_stub, "name", array)
    found = tensors.as_array(tensor)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype and tensor.name() == "name"
    named = ctypes.pythonapi.PyCapsule_IsValid
    assert named(ctypes.py_object(tensor.capsule), b"used_dltensor"), "NumPy would write a complaint into the log"
    monkeypatch.setattr(tensors, "BY_DLPACK", False)
    assert array.size == 0 or not np.array_equal(tensors.as_array(tensors.as_tensor(triton_stub, "n", array)), array)


def test_strings_go_by_the_stubs_own_functions(monkeypatch):
    array = np.array([["ä".encode()], [b""]], object)
    for way in (True, False):
        monkeypatch.setattr(tensors, "BY_DLPACK", way)
        tensor = tensors.as_tensor(triton_stub, "name", array)
        assert tensors.as_array(tensor, string=True) is array


class Memory:
    """An object as pybind11 lays it out: behind its head the address of the C++ object."""

    __slots__ = ("a_content", "array", "kept", "name", "other")  # the first is where the address is

    def __init__(self, name, numpy_array):
        data = serialized(numpy_array) if numpy_array.dtype == object else numpy_array
        self._fill(numpy_array, data, 0)

    def _fill(self, array, data, size):
        # bytes hold their content behind four words
        address = data.ctypes.data if isinstance(data, np.ndarray) else id(data) + bytes.__basicsize__ - 1
        self.array, self.kept = array, data
        self.a_content = struct.pack("16Q", *range(10**9, 10**9 + 6), address, 0, 1, 2, 3, size, 0, 0, 0, 0)

    @classmethod
    def from_dlpack(cls, name, capsule):
        array = np.from_dlpack(triton_stub.Exporter(capsule))
        tensor = cls.__new__(cls)
        Memory._fill(tensor, array, array, array.nbytes)
        return tensor

    def as_numpy(self):
        return self.array


def serialized(array):
    return b"".join(struct.pack("<I", len(each)) + each for each in array.reshape(-1).tolist())


@pytest.fixture
def mended():
    kind = type("Mended", (Memory,), {"__slots__": ()})
    assert strings.mend(kind, serialized) and kind.__basicsize__ == strings._SIMPLE
    return kind


@pytest.mark.parametrize("texts", [[b"a good film", b"", "東京".encode()], [b"x" * 70_000], []])
def test_strings_are_read_from_the_tensors_memory_and_their_size_written_there(mended, texts):
    array = np.empty((len(texts), 1), object)
    array[:, 0] = texts
    tensor = mended("text", array)
    assert len(serialized(array)) in list(strings.fields_of(tensor))
    tensor.array = strings.Unread().reshape([len(texts), 1])  # what the stub has of a request
    assert tensor.as_numpy().tolist() == array.tolist()


def test_numbers_are_refused_rather_than_misread_and_a_sound_stub_is_left_alone(mended, monkeypatch):
    with pytest.raises(TypeError, match="from_dlpack"):
        mended("name", np.arange(3))
    with pytest.raises(TypeError, match=r"numpy\.from_dlpack"):
        mended.from_dlpack("name", np.arange(3, dtype=np.int64).__dlpack__()).as_numpy()
    class Sound(Memory):
        __slots__ = ()
        def __init__(self, name, numpy_array):
            self._fill(numpy_array, numpy_array, numpy_array.nbytes)
    assert not strings.mend(Sound, serialized) and Sound.as_numpy is Memory.as_numpy
    class Other(Memory):
        __slots__ = ("further",)
    with pytest.raises(ImportError, match="use NumPy 1"):
        strings.mend(Other, serialized)
    class Without(Memory):
        __slots__ = ()
        @classmethod
        def from_dlpack(cls, name, capsule):
            tensor = cls.__new__(cls)
            tensor._fill(np.arange(3), np.arange(3), 24)
            return tensor
    with pytest.raises(ImportError, match="use NumPy 1"):
        strings.mend(Without, serialized)
