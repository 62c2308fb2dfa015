"""Requests and responses of Triton's HTTP: JSON, and behind it the tensors' bytes (KServe v2 with binary tensors).

tritonclient's own come with an HTTP client on gevent, of which nothing else would be used.
"""

from __future__ import annotations

import json

import numpy as np

from rekd_deploy.client.transport import Arrays, Request

JSON_LENGTH = "Inference-Header-Content-Length"
"""The header that says where the JSON ends."""


def request_body(request: Request) -> tuple[bytes, int]:
    """The body, and the length of its JSON."""
    from tritonclient.utils import np_to_triton_dtype

    inputs, contents = [], []
    for name, array in request.inputs.items():
        contents.append(np.ascontiguousarray(array).tobytes())
        size = {"binary_data_size": len(contents[-1])}
        kind = np_to_triton_dtype(array.dtype)
        inputs.append({"name": name, "shape": list(array.shape), "datatype": kind, "parameters": size})
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
    head = json.dumps({"id": request.request_id, "inputs": inputs, "outputs": outputs}).encode()
    return b"".join([head, *contents]), len(head)


def response_arrays(content: bytes, json_length: str | None, request: Request) -> Arrays:
    """The outputs that were asked for; ``json_length``: of the response's header. Raises whatever is wrong with it."""
    from tritonclient.utils import triton_to_np_dtype

    start = len(content) if json_length is None else int(json_length)
    head = json.loads(content[:start])
    found: dict[str, np.ndarray] = {}
    for output in head["outputs"]:
        kind, shape = np.dtype(triton_to_np_dtype(output["datatype"])), output["shape"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = np.array(output["data"], kind).reshape(shape)
            continue
        found[output["name"]] = np.frombuffer(content[start : start + size], kind).reshape(shape)
        start += size
    arrays = Arrays({name: found[name] for name in request.outputs})
    arrays.version = str(head.get("model_version", ""))
    return arrays

