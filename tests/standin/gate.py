"""The parity gate on the CUDA provider; runs under the stand-in, which computes nonsense.

python gate.py CKPT REPO      one JSON line: why the gate refuses, what was asked of the device, what was not captured
"""

import json
import sys
from pathlib import Path

from device import counted

from rekd_deploy.errors import ParityError
from rekd_deploy.parity.examples import parity_examples
from rekd_deploy.parity.gate import check_parity
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.checkpoints.checkpoint import load

chains, said = [], []


class Seen(DeviceChain):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        chains.append(self)


def refused():
    try:
        check_parity(rationalizer, graphs, examples, device="cuda")
    except ParityError as error:
        said.append(str(error))


onnxruntime_device.DeviceChain = Seen
checkpoint, root = map(Path, sys.argv[1:])
rationalizer = load(checkpoint)
graphs = {role: root / f"rekd_{role}" / "1" / "model.onnx" for role in ("selector", "predictor")}
examples = parity_examples(checkpoint, rationalizer.preprocessor)
counts = counted(refused)
print(json.dumps({"said": said[0], "uncaptured": [chain.uncaptured for chain in chains], **counts}))
