"""Whether chains of graphs run captured, and what is said where something is missing; runs under the stand-in.

python chains.py DEVICE FOLDER ...      a JSON line a chain: the error, or what was not captured and two runs asked for
"""

import json
import sys
from functools import partial

import numpy as np
from device import counted, graphs_in

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain

for folder in sys.argv[2:]:
    graphs, found = graphs_in(folder), {"error": None}
    first = graphs[0].signature
    sizes = {spec.name: [2, *first.sizes_at(spec, 16)[1:]] for spec in first.inputs}
    inputs = {spec.name: np.ones(sizes[spec.name], spec.dtype) for spec in first.inputs}
    try:
        with DeviceChain(graphs, device=sys.argv[1]) as chain:
            found["runs"] = [counted(partial(chain.run, inputs)) for _ in range(2)]
            found["uncaptured"] = chain.uncaptured
    except EngineError as error:
        found["error"] = str(error)
    print(json.dumps(found), flush=True)
