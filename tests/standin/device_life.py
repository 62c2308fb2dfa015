"""The life of a DeviceChain under the stand-in: what it asks of the GPU, and what it does when the GPU fails.

python device_life.py FOLDER LSTMS      graphs and signatures (chain.pickle) in each; one JSON document of what was seen
"""

import ctypes
import gc
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime_cuda import PROVIDER
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain

KINDS = "malloc free host_malloc host_free to_device to_host on_device launch capture replay".split()
cuda = ctypes.CDLL("libcuda.so.1")
cuda.standin_count.restype = cuda.standin_live.restype = ctypes.c_long
graphs, lstms = (
    [Graph(*parts) for parts in pickle.loads((Path(folder) / "chain.pickle").read_bytes())] for folder in sys.argv[1:]
)
READ = ("scores", "mask", "probabilities")


def inputs(batch, length):
    return {"input_ids": np.full((batch, length), 5), "attention_mask": np.ones((batch, length), np.int64)}


def counted(work):
    """What was asked of the device meanwhile."""
    cuda.standin_reset()
    work()
    return {kind: cuda.standin_count(kind.encode()) for kind in KINDS if cuda.standin_count(kind.encode())}


def failures(kind):
    """What comes of it when the first, second, ... call of a kind fails, and whether the next request works."""
    seen = []
    for number in range(1, 1000):
        with DeviceChain(graphs) as chain:
            chain.run(inputs(2, 16)) if number % 2 else None  # the first of all, or one of a new shape
            cuda.standin_reset()
            cuda.standin_fail(kind.encode(), ctypes.c_long(1 + number // 2))
            try:
                chain.run(inputs(300 + 10 * number, 48))
            except EngineError as error:
                seen.append(str(error))
            else:
                if number % 2 == 0 and cuda.standin_count(kind.encode()) <= number // 2:
                    return seen
            finally:
                cuda.standin_reset()
            assert chain.run(inputs(2, 16))["scores"].shape == (2, 16)
    return seen


found = {}
with DeviceChain(graphs, batches=(1, 4), outputs=READ) as chain:
    found["first"] = counted(lambda: chain.run(inputs(3, 16)))
    found["again"] = counted(lambda: chain.run(inputs(4, 16)))
    found["longer"] = counted(lambda: chain.run(inputs(4, 32)))
    found["back"] = counted(lambda: chain.run(inputs(2, 16)))
    with ThreadPoolExecutor(4) as threads:
        work = [(1 + turn % 4, (16, 32)[turn % 2]) for turn in range(200)]
        shapes = list(threads.map(lambda shape: chain.run(inputs(*shape))["scores"].shape, work))
    found["threads"] = [tuple(shape) for shape in work] == shapes
    with ThreadPoolExecutor(1) as threads:
        found["another thread"] = counted(lambda: threads.submit(chain.run, inputs(4, 16)).result())
    found["tf32"] = [session.get_provider_options()[PROVIDER]["use_tf32"] for session in chain._sessions]
    found["read"] = sorted(chain.run(inputs(1, 16)))
with DeviceChain(graphs, captured=False) as chain:
    found["uncaptured"] = counted(lambda: chain.run(inputs(3, 16)))
foreseen, onnxruntime_device.copying_operator = onnxruntime_device.copying_operator, lambda model: ""
with DeviceChain(lstms) as chain:
    runs = [counted(lambda: chain.run(inputs(3, 16))) for _ in range(2)]
    found["refused"] = {"uncaptured": chain.uncaptured, "runs": runs}
onnxruntime_device.copying_operator = foreseen

onnxruntime_device._MOST_SHAPES = 3
found["live"], found["kept"] = [], 0
for _ in range(4):
    with DeviceChain(graphs) as chain:
        for number in range(250):
            chain.run(inputs(1 + number % 7 if number % 10 == 0 else 1, 16))
            found["kept"] = max(found["kept"], len(chain._shapes))
    del chain
    gc.collect()
    found["live"].append(cuda.standin_live())
FAILING = ("malloc", "host_malloc", "to_device", "to_host", "replay", "capture")
found["failures"] = {kind: failures(kind) for kind in FAILING}
found["failures"]["launch"] = []
for number in (1, 50, 150, 300):  # there are hundreds
    with DeviceChain(graphs) as chain:
        cuda.standin_reset()
        cuda.standin_fail(b"launch", ctypes.c_long(number))
        try:
            chain.run(inputs(2, 16))
            found["failures"]["launch"].append("none")
        except EngineError as error:
            found["failures"]["launch"].append(str(error))
        cuda.standin_reset()
        chain.run(inputs(2, 16))
try:
    with DeviceChain(graphs, device="cuda:3") as chain:
        chain.run(inputs(1, 16))
except EngineError as error:
    found["no such device"] = str(error)
print(json.dumps(found))
