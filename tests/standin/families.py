"""Whether chains of graphs run captured; runs under the stand-in.

python families.py FOLDER ...      one JSON line a chain (chain.pickle): what was not captured, what two runs asked for
"""

import ctypes
import json
import pickle
import sys
from pathlib import Path

import numpy as np

from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain

cuda = ctypes.CDLL("libcuda.so.1")
cuda.standin_count.restype = ctypes.c_long


def counted(work, *arguments):
    cuda.standin_reset()
    work(*arguments)
    return {kind: cuda.standin_count(kind.encode()) for kind in ("launch", "capture", "replay")}


for folder in sys.argv[1:]:
    graphs = [Graph(*parts) for parts in pickle.loads((Path(folder) / "chain.pickle").read_bytes())]
    first = graphs[0].signature
    sizes = {spec.name: [2, *first.sizes_at(spec, 16)[1:]] for spec in first.inputs}
    inputs = {spec.name: np.ones(sizes[spec.name], spec.dtype) for spec in first.inputs}
    with DeviceChain(graphs) as chain:
        found = [counted(chain.run, inputs) for _ in range(2)]
    print(json.dumps({"uncaptured": chain.uncaptured, "runs": found}), flush=True)
