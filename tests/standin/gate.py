"""The parity gate on the CUDA provider; runs under the stand-in, which computes nonsense.

python gate.py CKPT REPO      one JSON line: why the gate refuses, what was asked of the device, what was not captured
"""

import ctypes
import json
import sys
from pathlib import Path

from rekd_deploy.errors import ParityError
from rekd_deploy.parity import gate as parity
from rekd_deploy.parity.examples import parity_examples
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.checkpoints.checkpoint import load

cuda = ctypes.CDLL("libcuda.so.1")
cuda.standin_count.restype = ctypes.c_long
chains = []


class Seen(DeviceChain):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        chains.append(self)


onnxruntime_device.DeviceChain = Seen
rationalizer, root = load(Path(sys.argv[1])), Path(sys.argv[2])
graphs = {role: root / f"rekd_{role}" / "1" / "model.onnx" for role in ("selector", "predictor")}
examples = parity_examples(Path(sys.argv[1]), rationalizer.preprocessor, class_names=rationalizer.labels)
cuda.standin_reset()
said = None
try:
    parity.check_parity(rationalizer, graphs, examples, device="cuda")
except ParityError as error:
    said = str(error)
counted = {kind: cuda.standin_count(kind.encode()) for kind in ("launch", "capture", "replay")}
print(json.dumps({"said": said, "uncaptured": [chain.uncaptured for chain in chains], **counted}))
