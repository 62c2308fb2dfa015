"""Requests that no server should answer: made of a good one by one change each."""

import io
import json
import struct

import numpy as np
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest


def of_arrays(model, **arrays):
    """A request of tensors by name; an array of bytes is (1, 1) of BYTES."""
    message = ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        kind, shape = ("BYTES", (1, 1)) if isinstance(array, bytes) else (array.dtype.name.upper(), array.shape)
        message.inputs.add(name=name, datatype=kind, shape=shape)
        message.raw_input_contents.append(as_bytes(array) if kind == "BYTES" else array.tobytes())
    return message


def changed(good, index=0, content=None, **fields):
    """With another content, or other fields, of one tensor."""
    message = ModelInferRequest.FromString(good.SerializeToString())
    for field in fields:
        message.inputs[index].ClearField(field)
    message.inputs[index].MergeFrom(type(message.inputs[index])(**fields))
    if content is not None:
        message.raw_input_contents[index] = content
    return message


def over_http(message):
    """Path, body and headers of the same request, with Triton's binary extension."""
    contents = message.raw_input_contents
    sizes = [{"parameters": {"binary_data_size": len(content)}} for content in contents]
    inputs = [
        {"name": each.name, "datatype": each.datatype, "shape": list(each.shape), **size}
        for each, size in zip(message.inputs, sizes, strict=True)
    ]
    outputs = {"outputs": [{"name": each.name} for each in message.outputs]} if message.outputs else {}
    header = json.dumps({"inputs": inputs, **outputs}).encode()
    path = f"/v2/models/{message.model_name}/versions/{message.model_version}".removesuffix("/versions/")
    return f"{path}/infer", header + b"".join(contents), {"Inference-Header-Content-Length": len(header)}


def general_changes(good):
    """What is wrong whatever the model reads: types, ranks, lengths, names, batches, outputs."""
    for index, (tensor, content) in enumerate(zip(good.inputs, good.raw_input_contents, strict=True)):
        rows, *rest = tensor.shape
        changes = [{"datatype": each} for each in ("FP32", "BOOL", "", "INT63")]
        changes += [{"shape": each} for each in ((), (rows, *rest, 1), (1, rows, *rest), (2**31, *rest))]
        changes += [{"content": each} for each in (b"", content[:-3], content + b"\x01")]
        changes += [{"shape": (65, *rest), "content": content * 65}, {"name": "surprise"}]
        yield from (changed(good, index, **each) for each in changes)
        without = changed(good)
        del without.inputs[index], without.raw_input_contents[index]
        yield without
    empty = changed(good)
    for index, tensor in enumerate(good.inputs):
        empty = changed(empty, index, b"", shape=(0, *tensor.shape[1:]))
    yield empty
    for other in ({"model_name": "nonesuch"}, {"model_version": "99"}, {"outputs": [{"name": "surprise"}]}):
        message = changed(good)
        message.MergeFrom(ModelInferRequest(**other))
        yield message


def token_changes(good, longest):
    """Texts without tokens or too long, and what steps hand over; more that cannot be read: test_triton_model."""
    for width in (0, longest + 1):
        odd = np.ones((2, width), np.int64)
        yield changed(changed(good, 1, odd.tobytes(), shape=odd.shape), 0, odd.tobytes(), shape=odd.shape)
    for name in ("positions", "kept", "keep"):
        message = changed(good)
        message.outputs.add(name=name)
        yield message


def byte_changes(good, bad):
    """Contents that cannot be read, alone and among good ones; and lengths that lie. ``good`` has one (1, 1) tensor."""
    (whole,) = good.raw_input_contents
    for content in map(as_bytes, bad):
        yield changed(good, content=content)
        yield changed(good, content=whole + content + whole, shape=(3, 1))
    payload = whole[4:]
    for claimed in (0, len(payload) - 1, len(payload) + 1, 2**32 - 1):
        yield changed(good, content=struct.pack("<I", claimed) + payload)
    yield changed(good, shape=(2, 1))


def as_bytes(content):
    """An element of a BYTES tensor."""
    return struct.pack("<I", len(content)) + content


def written(picture, kind):
    """A picture, or its pixels, as a file."""
    stream = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(stream, kind)
    return stream.getvalue()
