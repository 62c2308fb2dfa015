"""Requests that no server should answer: made of a good one by one change each, and put on the wire in two ways."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Tensor:
    """One input as it goes on the wire."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Tensor:
        return cls(name, {"int64": "INT64", "uint8": "UINT8"}[array.dtype.name], array.shape, array.tobytes())


@dataclass(frozen=True)
class Request:
    """A request, good or bad."""

    model: str
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    version: str = ""
    note: str = field(default="good", compare=False)

    def changed(self, note: str, index: int = 0, **values) -> Request:
        """With other values in one tensor."""
        tensors = list(self.tensors)
        tensors[index] = replace(tensors[index], **values)
        return replace(self, tensors=tuple(tensors), note=f"{note} {self.tensors[index].name}")

    def http(self) -> tuple[str, bytes, dict[str, str]]:
        """Path, body and headers, with Triton's binary extension."""
        document = {
            "inputs": [
                {"name": each.name, "datatype": each.datatype, "shape": each.shape,
                 "parameters": {"binary_data_size": len(each.content)}}
                for each in self.tensors
            ]
        }  # fmt: skip
        header = json.dumps(document | ({"outputs": [{"name": n} for n in self.outputs]} if self.outputs else {}))
        body = header.encode() + b"".join(tensor.content for tensor in self.tensors)
        version = f"/versions/{self.version}" if self.version else ""
        return f"/v2/models/{self.model}{version}/infer", body, {"Inference-Header-Content-Length": str(len(header))}

    def grpc(self):
        """The message."""
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        message = ModelInferRequest(model_name=self.model, model_version=self.version)
        for tensor in self.tensors:
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            message.raw_input_contents.append(tensor.content)
        for name in self.outputs:
            message.outputs.add(name=name)
        return message


def general_changes(good: Request) -> Iterator[Request]:
    """What is wrong whatever the model reads: types, ranks, lengths, names, batches, outputs."""
    for index, tensor in enumerate(good.tensors):
        rows, *rest = tensor.shape
        for datatype in ("FP32", "BOOL", "", "INT63"):
            yield good.changed(f"type '{datatype}' of", index, datatype=datatype)
        for shape in ((), (rows, *rest, 1), (1, rows, *rest), (2**31, *rest)):
            yield good.changed(f"shape {shape} of", index, shape=shape)
        for content in (b"", tensor.content[:-3], tensor.content + b"\x01"):
            yield good.changed(f"{len(content)} bytes of", index, content=content)
        yield good.changed("batch 65 of", index, shape=(65, *rest), content=tensor.content * 65)
        yield good.changed("another name for", index, name="surprise")
        yield replace(good, tensors=good.tensors[:index] + good.tensors[index + 1 :], note=f"without {tensor.name}")
    empty = tuple(replace(tensor, shape=(0, *tensor.shape[1:]), content=b"") for tensor in good.tensors)
    yield replace(good, tensors=empty, note="an empty batch")
    yield replace(good, outputs=("surprise",), note="an unknown output")
    yield replace(good, model="nonesuch", note="an unknown model")
    yield replace(good, version="99", note="an unknown version")


def token_changes(good: Request, vocabulary: int, longest: int) -> Iterator[Request]:
    """Ids, masks and lengths that the model cannot read; ``good`` has input_ids and attention_mask (B, N)."""
    rows, columns = good.tensors[0].shape
    for index, values in enumerate(((-1, -vocabulary, vocabulary, 2**31, 2**62, -(2**63)), (-1, 2, 2**40, -(2**63)))):
        for value in values:
            array = np.frombuffer(good.tensors[index].content, np.int64).copy()
            array[value % array.size] = value
            yield good.changed(f"{value} in", index, content=array.tobytes())
    mask = np.frombuffer(good.tensors[1].content, np.int64).reshape(rows, columns).copy()
    mask[1] = 0
    yield good.changed("an empty row of", 1, content=mask.tobytes())
    for width in (1, columns - 1, columns + 1):
        ones = np.ones((rows, width), np.int64)
        yield good.changed(f"{width} columns of", 1, shape=ones.shape, content=ones.tobytes())
    for width in (0, longest + 1, 10 * longest):
        ones = np.ones((rows, width), np.int64)
        tensors = tuple(replace(tensor, shape=ones.shape, content=ones.tobytes()) for tensor in good.tensors)
        yield replace(good, tensors=tensors, note=f"{width} columns of everything")
    for name in ("positions", "kept", "keep"):
        yield replace(good, outputs=(name,), note=f"the handed over {name}")


def byte_changes(good: Request, bad: dict[str, bytes]) -> Iterator[Request]:
    """Contents that cannot be read, alone and among good ones; and lengths that lie. ``good`` has one (1, 1) tensor."""
    (tensor,) = good.tensors
    for note, content in bad.items():
        yield good.changed(f"{note} as", content=as_bytes(content))
        yield good.changed(f"{note} among", shape=(3, 1), content=tensor.content + as_bytes(content) + tensor.content)
    payload = tensor.content[4:]
    for claimed in (0, len(payload) - 1, len(payload) + 1, 2**32 - 1):
        yield good.changed(f"a length of {claimed} for", content=struct.pack("<I", claimed) + payload)
    yield good.changed("one of two rows for", shape=(2, 1))


def as_bytes(content: bytes) -> bytes:
    """An element of a BYTES tensor."""
    return struct.pack("<I", len(content)) + content


def bad_texts() -> dict[str, bytes]:
    """Bytes that are no text."""
    broken = {"nothing": b"", "white space": b" \t\n ", "too long": b"x" * (2**20 + 1)}
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe6\x9d"):
        broken[str(bad)] = b"A wonderful " + bad + b" film"
    return broken | {"a cut character": "très bien 🎬".encode()[:-1]}


def bad_images() -> dict[str, bytes]:
    """Bytes that are no JPEG or PNG file, or a broken one."""
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    broken = {"nothing": b"", "no image": b"hello" * 100, "a GIF": written(picture, "GIF")}
    for kind in ("JPEG", "PNG"):
        whole = written(picture, kind)
        broken |= {f"{share:.0%} of a {kind}": whole[: int(share * len(whole))] for share in (0.02, 0.3, 0.8)}
    broken["a PNG of 4 billion pixels"] = whole[:16] + struct.pack(">II", 2**16, 2**16) + whole[24:]
    broken["a PNG of no width"] = whole[:16] + struct.pack(">II", 0, 40) + whole[24:]
    return broken | {"a PNG with noise in its pixels": whole[:60] + bytes(range(200)) + whole[260:]}


def written(picture: Image.Image, kind: str) -> bytes:
    """A picture as a file."""
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()
