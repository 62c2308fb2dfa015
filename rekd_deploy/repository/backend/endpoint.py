"""First and last step of the text or image endpoint: bytes to tensors, tensors to answers, in Triton's python backend.

This file is copied into the repository as ``<model>/<version>/model.py``, and beside it ``triton_tensors.py`` and the
very modules of rekd_train that it imports, so that a server without rekd runs the same preprocessing as everyone else.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

LARGEST_TEXT = 1 << 20
"""Bytes of the longest text that is looked at; the model reads a few hundred words."""
LARGEST_IMAGE = 50_000_000
"""Pixels of the largest image that is decoded."""
_PADDING = -1
"""In the last column of ``tokens``."""
_ID_LENGTH, _LINE_LENGTH = 128, 1000
"""Of what clients send, at most this many characters reach the log."""


class TritonPythonModel:
    """The class that Triton's stub process looks for; the parameter ``step`` says which of the two steps it is."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Build the preprocessing from the files beside this one."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(folder))  # the modules of the model, not those of whatever rekd is installed
        config = json.loads(args["model_config"])
        self._inputs = {tensor["name"]: tensor["data_type"] == "TYPE_STRING" for tensor in config["input"]}
        self._tensors = importlib.import_module("triton_tensors")
        served = json.loads((folder / "served.json").read_text(encoding="utf-8"))
        self._answer = build_step(config["parameters"]["step"]["string_value"], served, folder)
        self._refused = importlib.import_module("rekd_train.errors").InputError

    def execute(self, requests: Sequence) -> list:
        """Answer each request, in order; one with bad values gets an error of its own."""
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        code = self._triton.TritonError
        try:
            given = {name: self._triton.get_input_tensor_by_name(request, name) for name in self._inputs}
            as_array = self._tensors.as_array
            outputs = self._answer({name: as_array(given[name], string) for name, string in self._inputs.items()})
        except self._refused as error:
            return self._error(request, str(error), code.INVALID_ARG)
        except Exception as error:  # one request's trouble must not become its neighbours'
            return self._error(request, f"{type(error).__name__}: {error}", code.INTERNAL)
        as_tensor, names = self._tensors.as_tensor, request.requested_output_names()
        return self._triton.InferenceResponse([as_tensor(self._triton, name, outputs[name]) for name in names])

    def _error(self, request, reason: str, code: int):
        name = ascii(request.request_id())[1:-1][:_ID_LENGTH]  # as the graphs' models log it
        self._triton.Logger.log_warn(" ".join(f"[request id: {name or '<none>'}] {reason}".split())[:_LINE_LENGTH])
        return self._triton.InferenceResponse(error=self._triton.TritonError(reason, code))


def build_step(step: str, served: Mapping, folder: Path) -> Callable[[Arrays], Arrays]:
    """The function of a step, 'prepare' or 'answer': arrays by name in, arrays by name out.

    ``served`` has ``settings`` of the preprocessing and ``labels``; ``folder`` tokenizer.json, if it prepares texts.
    """
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in served["settings"].items()}
    labels = served["labels"]
    if settings["kind"] == "text":
        from rekd_train.inputs.familiarity import Familiarity
        from rekd_train.inputs.text import EncodedTexts, TextPreprocessor, TextSettings

        if step == "prepare":
            tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
            familiarity = Familiarity.unpacked(served["familiarity"]) if served.get("familiarity") else None
            texts = TextPreprocessor(tokenizer_json, TextSettings(**settings), familiarity)
            return lambda arrays: prepared_texts(texts, arrays)

        def encoded(arrays: Arrays):
            encodings = [Tokens(row) for row in arrays["tokens"]]
            return EncodedTexts({}, decoded(arrays["text"]), encodings, arrays["cut"].reshape(-1).tolist())
    else:
        from rekd_train.inputs.image import EncodedImages, ImagePreprocessor, ImageSettings

        images = ImagePreprocessor(ImageSettings(**settings))
        if step == "prepare":
            return lambda arrays: prepared_images(images, arrays)

        def encoded(arrays: Arrays):
            return EncodedImages({}, [tuple(size) for size in arrays["sizes"].tolist()], images.settings)

    return lambda arrays: as_tensors(encoded(arrays), labels, arrays)


def prepared_texts(preprocessor, arrays: Arrays) -> Arrays:
    """``text`` (B, 1) UTF-8 -> ``input_ids``, ``attention_mask`` (B, N) int64; ``tokens`` (B, N, 4) int32, see
    ``Tokens``; ``cut`` (B, 1) bool, whether the text was longer; ``doubt`` (B, 1) float32, where it is known."""
    texts = decoded(arrays["text"])
    encoded = preprocessor.batch(texts, preprocessor.encode_checked(texts))
    tokens = np.full((*encoded.inputs["input_ids"].shape, 4), _PADDING, np.int32)
    for row, encoding in zip(tokens, encoded.encodings, strict=True):
        size = len(encoding)
        row[:size, :2] = encoding.offsets
        row[:size, 2] = [-1 if word is None else word for word in encoding.word_ids]
        row[:size, 3] = encoding.special_tokens_mask
    doubts = {} if encoded.doubts is None else {"doubt": np.array([[each] for each in encoded.doubts], np.float32)}
    cut = np.array([[each] for each in encoded.truncated], bool)
    return {**encoded.inputs, "tokens": tokens, "cut": cut, **doubts}


class Tokens:
    """One text's tokens, as ``EncodedTexts`` reads them of an encoding, from (N, 4) int32.

    First character and one past the last, number of the word (-1: none), 1 for a special token and -1 for padding.
    """

    def __init__(self, row: np.ndarray) -> None:
        starts, ends, words, special = row[row[:, 3] != _PADDING].T.tolist()
        self.offsets = list(zip(starts, ends, strict=True))
        self.word_ids = [None if word < 0 else word for word in words]
        self.special_tokens_mask = special
        self.tokens = [""] * len(special)  # no answer shows them

    def __len__(self) -> int:
        return len(self.offsets)


def prepared_images(preprocessor, arrays: Arrays) -> Arrays:
    """``image`` (B, 1), files as bytes -> ``pixels`` (B, H, W, C) uint8, ``sizes`` (B, 2) int64 (width, height)."""
    opened = [opened_image(content, number) for number, content in enumerate(arrays["image"].reshape(-1), 1)]
    encoded = preprocessor(opened)
    return {**encoded.inputs, "sizes": np.array(encoded.sizes, np.int64).reshape(-1, 2)}


def decoded(column: np.ndarray) -> list[str]:
    """Texts of a tensor of bytes; InputError: too long, or not UTF-8; it names the text, counted from 1."""
    from rekd_train.errors import InputError

    texts = []
    for number, content in enumerate(column.reshape(-1), 1):
        if len(content) > LARGEST_TEXT:
            raise InputError(f"text {number} has {len(content)} bytes; at most {LARGEST_TEXT} are looked at")
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"text {number} is not UTF-8: byte {error.start + 1} is wrong") from None
    return texts


def opened_image(content: bytes, number: int):
    """A JPEG or PNG file as a Pillow image, not yet decoded; InputError: neither of the two, or too many pixels."""
    from PIL import Image, UnidentifiedImageError

    from rekd_train.errors import InputError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit below
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"image {number} cannot be read: {reason}") from None
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        raise InputError(f"image {number} has {width} x {height} pixels; at most {LARGEST_IMAGE} are decoded")
    return image


def as_tensors(encoded, labels: Sequence[str], arrays: Arrays) -> Arrays:
    """The predictions of a batch as tensors: ``label``, ``rationale`` (JSON), ``rate``, ``truncated``: (B, 1) each;
    ``probabilities`` (B, C)."""
    predictions = encoded.predictions(labels, arrays["probabilities"], arrays["mask"], arrays["scores"])
    parts = [json.dumps([vars(part) for part in each.rationale], ensure_ascii=False) for each in predictions]
    return {
        "label": np.array([[each.label.encode("utf-8")] for each in predictions], object),
        "rationale": np.array([[part.encode("utf-8")] for part in parts], object),
        "rate": np.array([[each.rate] for each in predictions], np.float32),
        "truncated": np.array([[each.truncated] for each in predictions], bool),
        "probabilities": np.ascontiguousarray(arrays["probabilities"], np.float32),
    }
