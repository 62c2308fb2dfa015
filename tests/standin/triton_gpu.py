"""The model.py of a repository under the stand-in, as Triton's python backend runs it on a GPU.

python triton_gpu.py FOLDER [alike]      of one model, with its configuration as config.json; a JSON document of what
was seen, with 'alike' of two requests of one shape alone
"""

import json
import os
import sys
import weakref
from functools import partial
from pathlib import Path

import device
import numpy as np
import onnxruntime

os.environ["ORT_ENABLE_CUDNN_FLASH_ATTENTION"] = "0"  # which the stand-in has not
KINDS = "to_device to_host launch capture replay".split()
folder = Path(sys.argv[1])
GPU = {"model_instance_kind": "GPU", "model_instance_device_id": "0"}
sys.path.insert(0, str(Path(__file__).parents[1] / "deploy" / "repository"))
import triton_stub  # noqa: E402

sys.modules["triton_python_backend_utils"] = triton_stub
model = triton_stub.initialised(folder, (folder / "config.json").read_text(), GPU)


def ask(*shapes):
    """The answers to requests of these shapes that wait together, and what was asked of the GPU."""
    given = [{"input_ids": np.full(shape, 5), "attention_mask": np.ones(shape, np.int64)} for shape in shapes]
    requests, answers = [triton_stub.Request(arrays, ["mask", "probabilities"]) for arrays in given], []
    counts = device.counted(lambda: answers.extend(model.execute(requests)), KINDS)
    shapes = [{name: array.shape for name, array in each.outputs.items()} for each in answers]
    return {"shapes": shapes, "errors": [each.error and str(each.error) for each in answers], **counts}


if "alike" in sys.argv:
    print(json.dumps({"first": ask((3, 16)), "again": ask((3, 16)), "warnings": triton_stub.LOGGED}))
    sys.exit()
found = {"first": ask((3, 16)), "again": ask((2, 16)), "joined": ask((2, 16), (1, 16))}
found |= {"one": ask((1, 16)), "one again": ask((1, 16)), "kept": [], "rebound": []}
run = model._graph.run


def failing(kind, names, inputs):
    device.fail(kind, 1)
    session = weakref.ref(model._graph._session)
    try:
        return run(names, inputs)
    except Exception:
        found["kept"].append(session() is not None)
        raise


for kind in ("replay", "to_device", "to_host"):
    model._graph.run = partial(failing, kind)
    failed = ask((1, 16))
    model._graph.run = run
    found[kind] = [failed, ask((1, 16)), ask((1, 16))]
run.__func__.__globals__["_MOST_SHAPES"] = 2
found |= {"second": ask((1, 20)), "beyond": ask((1, 24)), "beyond again": ask((1, 24))}
model.finalize()

# as Triton's onnxruntime backend binds: other buffers at each request, outputs to a device, no number of a graph
provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), providers=[provider], enable_fallback=0)
for shape in ((1, 16), (1, 16), (2, 24)):
    binding = session.io_binding()
    for given in session.get_inputs():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(shape, np.int64), "cuda", 0)
        binding.bind_ortvalue_input(given.name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    counts = device.counted(partial(session.run_with_iobinding, binding))
    answered = any(output.has_value() for output in binding.get_outputs())
    found["rebound"].append([counts["launch"], counts["replay"], answered])
print(json.dumps(found))
