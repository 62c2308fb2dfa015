"""The text or image endpoint, one model of Triton's python backend: bytes in, label and rationale out.

A request is prepared, selected, predicted and spelt out in one step. On CPUs the graphs run in this very process;
where others run them better (a GPU, another backend) the models that are there are asked. Requests come one by one:
Triton fails a whole batch where the bytes of one request do not add up.

This file is copied into the repository as ``<model>/<version>/model.py``, and beside it that of the graphs' models as
``triton_component.py`` with what it needs, and the very modules of rekd_train that prepare and spell out, so that a
server without rekd runs the same preprocessing as everyone else.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[Sequence[str], Arrays], list[np.ndarray]]
"""Outputs of these names, from inputs by name."""

LARGEST_TEXT = 1 << 20
"""Bytes of the longest text that is looked at; the model reads a few hundred words."""
LARGEST_IMAGE = 50_000_000
"""Pixels of the largest image that is decoded."""


class TritonPythonModel:
    """The class that Triton's stub process looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Build the preprocessing from the files beside this one, and open the graphs that are there."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        folder, version = Path(args["model_repository"]) / args["model_version"], int(args["model_version"])
        sys.path.insert(0, str(folder))  # the modules of the model, not those of whatever rekd is installed
        config = json.loads(args["model_config"])
        self._input = config["input"][0]["name"]
        self._component, self._tensors = map(importlib.import_module, ("triton_component", "triton_tensors"))
        served = json.loads((folder / "served.json").read_text(encoding="utf-8"))
        self._encoded, self._labels = preparation(served, folder), served["labels"]
        self._steps = [(self._runner(step, folder, version, config), step) for step in served["steps"]]
        self._refused = importlib.import_module("rekd_train.errors").InputError

    def execute(self, requests: Sequence) -> list:
        """Answer each request, in order; one with bad values gets an error of its own."""
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        code, refusal = self._triton.TritonError, self._component.refusal
        try:
            content = self._triton.get_input_tensor_by_name(request, self._input)
            outputs = self._answer(self._tensors.as_array(content, string=True))
        except self._refused as error:
            return refusal(self._triton, request, str(error), code.INVALID_ARG)
        except Exception as error:  # one request's trouble must not become its neighbours'
            return refusal(self._triton, request, f"{type(error).__name__}: {error}", code.INTERNAL)
        as_tensor, names = self._tensors.as_tensor, request.requested_output_names()
        return self._triton.InferenceResponse([as_tensor(self._triton, name, outputs[name]) for name in names])

    def _answer(self, content: np.ndarray) -> Arrays:
        """(B, 1) bytes -> the outputs by name."""
        encoded = self._encoded(content)
        arrays = dict(encoded.inputs)
        for run, step in self._steps:
            outputs = run(step["outputs"], {name: arrays[name] for name in step["inputs"]})
            arrays |= zip(step["outputs"], outputs, strict=True)
        return as_tensors(encoded, self._labels, arrays)

    def _runner(self, step: Mapping[str, Any], folder: Path, version: int, config: Mapping[str, Any]) -> Run:
        """What runs a step: its graph, if it lies in a folder of its name, or a request to the model of that name."""
        if (graph := folder / step["model"]).is_dir():
            graphs = importlib.import_module("triton_graphs")
            component = self._component
            return graphs.OnnxGraph(graph, component.threads_of(config), component.shortest_of(config)).run
        triton, tensors = self._triton, self._tensors

        def asked(names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
            given = [tensors.as_tensor(triton, name, array) for name, array in inputs.items()]
            response = triton.InferenceRequest(
                model_name=step["model"], model_version=version, requested_output_names=names, inputs=given
            ).exec()
            if response.has_error():
                raise RuntimeError(response.error().message())
            return [tensors.as_array(triton.get_output_tensor_by_name(response, name)) for name in names]

        return asked


def preparation(served: Mapping[str, Any], folder: Path) -> Callable[[np.ndarray], Any]:
    """What makes ``EncodedTexts`` or ``EncodedImages`` of (B, 1) bytes; InputError: what cannot be used.

    ``served`` has the ``settings`` of the preprocessing, and of texts ``familiarity``; ``folder`` tokenizer.json.
    """
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in served["settings"].items()}
    if settings["kind"] == "image":
        from rekd_train.inputs.image import ImagePreprocessor, ImageSettings

        images = ImagePreprocessor(ImageSettings(**settings))
        return lambda column: images([opened_image(each, number) for number, each in enumerate(column.reshape(-1), 1)])
    from rekd_train.inputs.familiarity import Familiarity
    from rekd_train.inputs.text import TextPreprocessor, TextSettings

    familiarity = Familiarity.unpacked(served["familiarity"]) if served["familiarity"] else None
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    texts = TextPreprocessor(tokenizer_json, TextSettings(**settings), familiarity)
    return lambda column: texts(decoded(column))


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


def as_tensors(encoded: Any, labels: Sequence[str], arrays: Arrays) -> Arrays:
    """The predictions of a batch as tensors: ``label``, ``rationale`` (JSON), ``rate``, ``truncated``, and ``doubt``
    where it is known: (B, 1) each; ``probabilities`` (B, C)."""
    predictions = encoded.predictions(labels, arrays["probabilities"], arrays["mask"], arrays["scores"])
    parts = [json.dumps([vars(part) for part in each.rationale], ensure_ascii=False) for each in predictions]
    columns = {
        "label": ([each.label.encode("utf-8") for each in predictions], object),
        "rationale": ([part.encode("utf-8") for part in parts], object),
        "rate": ([each.rate for each in predictions], np.float32),
        "truncated": ([each.truncated for each in predictions], bool),
        "doubt": ([each.doubt for each in predictions], np.float32),
    }
    found = {name: np.array(values, kind).reshape(-1, 1) for name, (values, kind) in columns.items()}
    return {**found, "probabilities": np.ascontiguousarray(arrays["probabilities"], np.float32)}
