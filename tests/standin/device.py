"""What the programs beside it share: the CUDA that pretends, and chains of graphs to run on it."""

import ctypes
import pickle
from pathlib import Path

from rekd_deploy.runtimes.base import Graph

cuda = ctypes.CDLL("standin.so")
cuda.standin_count.restype = cuda.standin_live.restype = ctypes.c_long


def counted(work, kinds=("launch", "capture", "replay")):
    """How often each kind of call was made meanwhile."""
    cuda.standin_reset()
    work()
    return {kind: cuda.standin_count(kind.encode()) for kind in kinds}


def fail(kind, number):
    """From now on the call of a kind with that number fails, counted from 1."""
    cuda.standin_reset()
    cuda.standin_fail(kind.encode(), ctypes.c_long(number))


def graphs_in(folder):
    return [Graph(*parts) for parts in pickle.loads((Path(folder) / "chain.pickle").read_bytes())]
