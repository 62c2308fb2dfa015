"""What a DeviceChain says where something is missing; runs under the stand-in.

python refusals.py FOLDER      one JSON line: the error, or null
"""

import json
import pickle
import sys
from pathlib import Path

import numpy as np

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain

graphs = [Graph(*parts) for parts in pickle.loads((Path(sys.argv[1]) / "chain.pickle").read_bytes())]
said = None
try:
    with DeviceChain(graphs) as chain:
        chain.run({"input_ids": np.full((2, 16), 5), "attention_mask": np.ones((2, 16), np.int64)})
except EngineError as error:
    said = str(error)
print(json.dumps(said))
