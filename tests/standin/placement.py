"""What ONNX Runtime's CUDA provider does with graphs; runs under the stand-in.

python placement.py model.onnx ...      one JSON line a graph: copies, nodes left on the CPU, whether it may be captured
"""

import json
import os
import re
import sys
import tempfile

import onnxruntime


def session_log(path: str, capture: bool) -> tuple[str, str]:
    """The log of opening a session, and why it could not be opened on the device, or ''."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 0
    saved, problem = os.dup(2), ""
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": str(int(capture))})]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
        except Exception as error:  # the library's exceptions share no root
            problem = str(error).splitlines()[0]
        finally:
            os.dup2(saved, 2)
        log.seek(0)
        return log.read().decode(errors="replace"), problem


for path in sys.argv[1:]:
    (log, problem), (_, refusal) = (session_log(path, capture) for capture in (False, True))
    copies, on_cpu, place = re.search(r"(\d+) Memcpy nodes are added", log), [], ""
    for line in log.splitlines():
        if found := re.search(r"(?:Node\(s\) placed on|All nodes placed on) \[(\w+)\]", line):
            place = found[1]
        elif place == "CPUExecutionProvider" and (found := re.search(r"\]\s{2,}(\w+) \((.*)\)", line)):
            on_cpu.append((found[1], found[2]))
    found = {"path": path, "problem": problem, "placed": bool(place), "on_cpu": on_cpu, "refusal": refusal}
    print(json.dumps(found | {"copies": int(copies[1]) if copies else 0}), flush=True)
