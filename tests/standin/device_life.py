"""The life of a DeviceChain under the stand-in: what it asks of the GPU, and what it does when the GPU fails.

python device_life.py FOLDER LSTMS      graphs and signatures (chain.pickle) in each; one JSON document of what was seen
"""

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import device
import numpy as np

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.onnxruntime_cuda import PROVIDER
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain

KINDS = "malloc free host_malloc host_free to_device to_host on_device launch capture replay".split()
graphs, lstms = map(device.graphs_in, sys.argv[1:])
found = {"failures": {}, "live": [], "kept": 0}


def inputs(batch, length):
    return {"input_ids": np.full((batch, length), 5), "attention_mask": np.ones((batch, length), np.int64)}


def counted(work, *shape):
    return {kind: count for kind, count in device.counted(lambda: work(inputs(*shape)), KINDS).items() if count}


def failure(kind, number, shape, warm):
    """What is said when that call of a kind fails, and whether it came to that; the next request works."""
    with DeviceChain(graphs) as chain:
        if warm:  # the first of a new shape, not the first of all
            chain.run(inputs(2, 16))
        device.fail(kind, number)
        said = []
        try:
            chain.run(inputs(*shape))
        except EngineError as error:
            said = [str(error)]
        reached = device.cuda.standin_count(kind.encode()) >= number
        device.cuda.standin_reset()
        assert chain.run(inputs(2, 16))["scores"].shape == (2, 16)
        return said, reached


with DeviceChain(graphs, batches=(1, 4), outputs=("scores", "mask", "probabilities")) as chain:
    for name, shape in (("first", (3, 16)), ("again", (4, 16)), ("longer", (4, 32)), ("back", (2, 16))):
        found[name] = counted(chain.run, *shape)
    with ThreadPoolExecutor(4) as threads:
        work = [(1 + turn % 4, (16, 32)[turn % 2]) for turn in range(200)]
        shapes = [outputs["scores"].shape for outputs in threads.map(chain.run, [inputs(*shape) for shape in work])]
    with ThreadPoolExecutor(1) as threads:
        found["another thread"] = counted(lambda given, run=chain.run: threads.submit(run, given).result(), 4, 16)
    found["tf32"] = [session.get_provider_options()[PROVIDER]["use_tf32"] for session in chain._sessions]
    found |= {"threads": shapes == work, "read": sorted(chain.run(inputs(1, 16)))}
with DeviceChain(graphs, captured=False) as chain:
    found["uncaptured"] = counted(chain.run, 3, 16)
foreseen, onnxruntime_device.copying_operator = onnxruntime_device.copying_operator, lambda model: ""
with DeviceChain(lstms) as chain:
    runs = [counted(chain.run, 3, 16) for _ in range(2)]
    found["refused"] = {"uncaptured": chain.uncaptured, "runs": runs}
onnxruntime_device.copying_operator = foreseen

onnxruntime_device._MOST_SHAPES = 3
for _ in range(4):
    with DeviceChain(graphs) as chain:
        for number in range(250):
            chain.run(inputs(1 + number % 7 if number % 10 == 0 else 1, 16))
            found["kept"] = max(found["kept"], len(chain._shapes))
    del chain
    gc.collect()
    found["live"].append(device.cuda.standin_live())
for kind in ("malloc", "host_malloc", "to_device", "to_host", "replay", "capture"):
    found["failures"][kind], reached, number = [], True, 1
    while reached:
        (cold, _), (warm, reached) = (failure(kind, number, (300 + 10 * number, 48), warm) for warm in (False, True))
        found["failures"][kind] += cold + warm
        number += 1
found["failures"]["launch"] = [failure("launch", number, (2, 16), False)[0][0] for number in (1, 50, 150, 300)]
print(json.dumps(found))
