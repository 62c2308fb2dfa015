"""Tensors of Triton's python backend as NumPy arrays and back; under NumPy 2 by DLPack.

This file is copied beside ``model.py`` as ``triton_tensors.py``. Stubs built for NumPy 1 misread the arrays of NumPy 2
without an error: ``as_numpy`` gives wrong values, ``Tensor(name, array)`` no bytes. A DLPack capsule says itself what
lies where. It knows no strings: those go by the stub's own functions, which ``strings.py`` mends in the wheel's server.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

BY_DLPACK = int(np.__version__.partition(".")[0]) >= 2
_USED = b"used_dltensor"
"""The name of a capsule whose content somebody took. Triton gives it another, which NumPy would complain about."""


def as_array(tensor: Any, string: bool = False) -> np.ndarray:
    """What a request's tensor holds; it may not be written to. ``string``: of type BYTES."""
    return np.from_dlpack(tensor) if BY_DLPACK and not string else tensor.as_numpy()


def as_tensor(triton: Any, name: str, array: np.ndarray) -> Any:
    """A tensor of an answer; ``triton``: the stub's own module, ``array``: of numbers, or of bytes as objects."""
    if not BY_DLPACK or array.dtype == object:
        return triton.Tensor(name, array)
    capsule = np.array(array, order="C").__dlpack__()  # a copy: the strides are plain, and it may be written to
    tensor = triton.Tensor.from_dlpack(name, capsule)
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _USED)
    return tensor
