"""Requests that no server should answer: made of a good one by one change each, and put on the wire in two ways."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

HUGE = (65, 1000, 10**6, 2**31)
"""Batches above the server's largest; the last ones are claimed, not sent."""
_OTHER_TYPES = {
    "FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "INT32": np.int32, "UINT64": np.uint64, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": bool, "INT64": np.int64,
}


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
        inputs = [
            {
                "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(tensor.content)},
            }
            for tensor in self.tensors
        ]
        document = {"inputs": inputs, "outputs": [{"name": name} for name in self.outputs]}
        header = json.dumps(document if self.outputs else {"inputs": inputs}).encode()
        version = f"/versions/{self.version}" if self.version else ""
        body = header + b"".join(tensor.content for tensor in self.tensors)
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
        count = int(np.prod(tensor.shape))
        for datatype, kind in _OTHER_TYPES.items():
            if datatype != tensor.datatype:
                values = np.full(count, np.nan if np.issubdtype(kind, np.floating) else 1).astype(kind)
                yield good.changed(f"{datatype} for", index, datatype=datatype, content=values.tobytes())
        for datatype in ("", "INT63", "int64", "BF16"):
            yield good.changed(f"type '{datatype}' of", index, datatype=datatype)
        rows, *rest = tensor.shape
        for shape in ((), (count,), (rows, *rest, 1), (1, rows, *rest), (rows, 1, *rest)):
            if shape != tensor.shape:
                yield good.changed(f"shape {shape} of", index, shape=shape)
        for cut in (1, 3, len(tensor.content) // 2, len(tensor.content)):
            yield good.changed(f"{cut} bytes too few of", index, content=tensor.content[: len(tensor.content) - cut])
        for more in (1, 8, 1000):
            yield good.changed(f"{more} bytes too many of", index, content=tensor.content + b"\x01" * more)
        for size in HUGE:
            content = tensor.content * size if size < 10_000 else tensor.content
            yield good.changed(f"batch {size} of", index, shape=(size, *rest), content=content)
        yield good.changed("no row of", index, shape=(0, *rest), content=b"")
        yield good.changed("another name for", index, name="surprise")
        yield good.changed("no name for", index, name="")
        yield replace(good, tensors=good.tensors[:index] + good.tensors[index + 1 :], note=f"without {tensor.name}")
        yield replace(good, tensors=(*good.tensors, tensor), note=f"{tensor.name} twice")
    for size in HUGE[:2]:
        tensors = tuple(
            replace(tensor, shape=(size, *tensor.shape[1:]), content=tensor.content * size) for tensor in good.tensors
        )
        yield replace(good, tensors=tensors, note=f"batch {size} of everything")
    empty = tuple(replace(tensor, shape=(0, *tensor.shape[1:]), content=b"") for tensor in good.tensors)
    yield replace(good, tensors=empty, note="an empty batch")
    yield replace(good, tensors=(), note="nothing")
    yield replace(good, outputs=("surprise",), note="an unknown output")
    yield replace(good, model="nonesuch", note="an unknown model")
    yield replace(good, version="99", note="an unknown version")


def token_changes(good: Request, vocabulary: int, longest: int, generator: np.random.Generator) -> Iterator[Request]:
    """Ids, masks and lengths that the model cannot read; ``good`` has input_ids and attention_mask (B, N)."""
    rows, columns = good.tensors[0].shape
    wrong = (-1, -vocabulary, -vocabulary - 1, vocabulary, vocabulary + 1, 2**31, 2**62, -(2**63))
    for value in (*wrong, *generator.integers(-(2**63), -1, 8).tolist(), *generator.integers(1000, 2**62, 8).tolist()):
        yield _with_value(good, 0, value, f"id {value} in", generator)
    for value in (-1, 2, 7, 2**40, -(2**63)):
        yield _with_value(good, 1, value, f"{value} in", generator)
    mask = np.frombuffer(good.tensors[1].content, np.int64).reshape(rows, columns).copy()
    mask[int(generator.integers(rows))] = 0
    yield good.changed("an empty row of", 1, content=mask.tobytes())
    for width in (1, columns - 1, columns + 1, 2 * columns):
        ones = np.ones((rows, width), np.int64)
        yield good.changed(f"{width} columns of", 1, shape=ones.shape, content=ones.tobytes())
    for width in (0, longest + 1, 10 * longest):
        ones = np.ones((rows, width), np.int64)
        yield replace(
            good, tensors=tuple(replace(t, shape=ones.shape, content=ones.tobytes()) for t in good.tensors),
            note=f"{width} columns of everything",
        )
    for name in ("positions", "kept", "keep"):
        yield replace(good, outputs=(name,), note=f"the handed over {name}")


def _with_value(good: Request, index: int, value: int, note: str, generator: np.random.Generator) -> Request:
    array = np.frombuffer(good.tensors[index].content, np.int64).copy()
    array[int(generator.integers(array.size))] = value
    return good.changed(note, index, content=array.tobytes())


def byte_changes(good: Request, bad: dict[str, bytes]) -> Iterator[Request]:
    """Contents that cannot be read, alone and among good ones; and lengths that lie. ``good`` has one (1, 1) tensor."""
    (tensor,) = good.tensors
    for note, content in bad.items():
        yield good.changed(f"{note} as", content=as_bytes(content))
        yield good.changed(f"{note} among", shape=(3, 1), content=tensor.content + as_bytes(content) + tensor.content)
    payload = tensor.content[4:]
    for claimed in (0, 1, len(payload) - 1, len(payload) + 1, 2**31, 2**32 - 1):
        yield good.changed(f"a length of {claimed} for", content=struct.pack("<I", claimed) + payload)
    yield good.changed("half a length for", content=tensor.content[:2])
    for rows in (2, 3):
        yield good.changed(f"one of {rows} rows for", shape=(rows, 1))
    yield good.changed("two of one row for", content=tensor.content * 2)


def as_bytes(*contents: bytes) -> bytes:
    """Elements of a BYTES tensor."""
    return b"".join(struct.pack("<I", len(content)) + content for content in contents)


def bad_texts(generator: np.random.Generator) -> dict[str, bytes]:
    """Bytes that are no text."""
    broken = {"nothing": b"", "white space": b" \t\n ", "too long": b"x" * (2**20 + 1)}
    good = "A wonderful film, très bien 🎬".encode()
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe6\x9d"):
        place = int(generator.integers(len("A wonderful film")))
        broken[f"{bad!r} at {place}"] = good[:place] + bad + b" " + good[place:]
    broken["a cut character"] = good[:-1]
    return broken


def bad_images(generator: np.random.Generator) -> dict[str, bytes]:
    """Bytes that are no JPEG or PNG file, or a broken one."""
    picture = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    broken = {"nothing": b"", "no image": b"hello" * 100, "a GIF": written(picture, "GIF"),
              "a BMP": written(picture, "BMP"), "a TIFF": written(picture, "TIFF")}
    for kind in ("JPEG", "PNG"):
        whole = written(picture, kind)
        for share in (0.02, 0.1, 0.3, 0.5, 0.8):
            broken[f"{share:.0%} of a {kind}"] = whole[: int(share * len(whole))]
    whole = written(picture, "PNG")
    broken["a PNG of 4 billion pixels"] = whole[:16] + struct.pack(">II", 2**16, 2**16) + whole[24:]
    broken["a PNG of no width"] = whole[:16] + struct.pack(">II", 0, 40) + whole[24:]
    broken["a PNG with noise in its pixels"] = whole[:60] + generator.bytes(len(whole) - 80) + whole[-20:]
    return broken


def written(picture: Image.Image, kind: str) -> bytes:
    """A picture as a file."""
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()
