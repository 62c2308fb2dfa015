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
    pairs = zip(message.inputs, message.raw_input_contents, strict=True)
    inputs = [
        {"name": each.name, "datatype": each.datatype, "shape": list(each.shape),
         "parameters": {"binary_data_size": len(content)}}
        for each, content in pairs
    ]  # fmt: skip
    outputs = {"outputs": [{"name": each.name} for each in message.outputs]} if message.outputs else {}
    header = json.dumps({"inputs": inputs, **outputs}).encode()
    version = f"/versions/{message.model_version}" if message.model_version else ""
    body = header + b"".join(message.raw_input_contents)
    return f"/v2/models/{message.model_name}{version}/infer", body, {"Inference-Header-Content-Length": len(header)}


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


def token_changes(good, vocabulary, longest):
    """Ids, masks and lengths that the model cannot read; ``good`` has input_ids and attention_mask (B, N)."""
    rows, columns = good.inputs[0].shape
    for index, values in enumerate(((-1, -vocabulary, vocabulary, 2**31, 2**62, -(2**63)), (-1, 2, 2**40, -(2**63)))):
        for value in values:
            array = np.frombuffer(good.raw_input_contents[index], np.int64).copy()
            array[value % array.size] = value
            yield changed(good, index, array.tobytes())
    mask = np.ones((rows, columns), np.int64)
    mask[1] = 0
    yield changed(good, 1, mask.tobytes())
    for width in (1, columns - 1, columns + 1, 0, longest + 1, 10 * longest):
        ones = np.ones((rows, width), np.int64)
        odd = changed(good, 1, ones.tobytes(), shape=ones.shape)
        yield odd if 0 < width <= columns + 1 else changed(odd, 0, ones.tobytes(), shape=ones.shape)
    for name in ("positions", "kept", "keep"):  # what one step hands to the next
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


def bad_texts():
    """Bytes that are no text."""
    broken = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe6\x9d")
    cut = "très bien 🎬".encode()[:-1]
    return [b"", b" \t\n ", b"x" * (2**20 + 1), cut, *(b"A wonderful " + bad + b" film" for bad in broken)]


def bad_images():
    """Bytes that are no JPEG or PNG file, or a broken one: cut, of 4 billion pixels, of no width, with noise."""
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    jpeg, png = written(picture, "JPEG"), written(picture, "PNG")
    cut = [whole[: int(share * len(whole))] for whole in (jpeg, png) for share in (0.02, 0.3, 0.8)]
    sized = [png[:16] + struct.pack(">II", *size) + png[24:] for size in ((2**16, 2**16), (0, 40))]
    return [b"", b"hello" * 100, written(picture, "GIF"), *cut, *sized, png[:60] + bytes(range(200)) + png[260:]]


def written(picture, kind):
    """A picture, or its pixels, as a file."""
    stream = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(stream, kind)
    return stream.getvalue()
