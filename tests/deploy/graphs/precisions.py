"""Tiny pairs in every precision, traced once, and a check that an answer has no neighbours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
from families import KINDS, some_images

from rekd_deploy.export.graphs import guarded_pair
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.precision import Conversion, convert_pair
from rekd_deploy.graphs.tracing import traced_graphs, write_graphs
from rekd_deploy.parity.examples import generated_images, texts_from_vocabulary
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner


@cache
def model_of(kind: str):
    return KINDS[kind]()


@cache
def traced(kind: str, fused: bool) -> dict[str, onnx.ModelProto]:
    """The float32 graphs. Do not change them."""
    return traced_graphs(model_of(kind), fused=fused)


@cache
def traced_for_gpu(kind: str) -> dict[str, onnx.ModelProto]:
    """The float32 graphs that are fused for GPUs. Do not change them."""
    return traced_graphs(model_of(kind), gpu=True)


def graph_files(model, folder: Path, **how) -> dict[str, Path]:
    """Files of a model's float32 graphs; ``how``: ``fused`` and ``gpu`` of ``traced_graphs``."""
    return write_graphs(traced_graphs(model, **how), folder, pair_signature(model), False, how.get("fused", True))


def gpu_graphs(kind: str, precision: str, folder: Path) -> list[Path]:
    """Files of all that ONNX Runtime runs on a GPU, each with both steps in one graph, too.

    'plain' is fused for GPUs, 'guarded' what Triton runs by itself, 'python' what lies in the usual repository.
    """
    model, signature = model_of(kind), pair_signature(model_of(kind))
    models = convert_pair(
        traced_for_gpu(kind), precision, signature, head_layers(model), model.preprocessor, examples_of(model),
        fused=True,
    ).models
    paths = []
    kinds = {
        "plain": models, "guarded": guarded_pair(models, model, signature), "python": converted(kind, precision),
    }
    for name, graphs in kinds.items():
        (folder / name).mkdir()
        paths += write_graphs(graphs, folder / name, signature, True, True).values()
    return paths


def examples_of(model) -> list:
    preprocessor = model.preprocessor
    if preprocessor.settings.kind == "image":
        return list(generated_images(preprocessor.settings))
    return texts_from_vocabulary(preprocessor)


def convert(kind: str, precision: str, fused: bool = True, for_engine: bool = False) -> Conversion:
    model = model_of(kind)
    return convert_pair(
        traced(kind, fused), precision, pair_signature(model), head_layers(model), model.preprocessor,
        examples_of(model), fused=fused, for_engine=for_engine,
    )


@cache
def conversion_of(kind: str, precision: str, fused: bool = True, for_engine: bool = False) -> Conversion:
    """Converted once. Do not change its graphs."""
    return convert(kind, precision, fused, for_engine)


def converted(kind: str, precision: str, fused: bool = True) -> dict[str, onnx.ModelProto]:
    """Graphs that ONNX Runtime can run. Do not change them."""
    conversion = conversion_of(kind, precision, fused)
    return conversion.emulated or conversion.models


def answers(model, graphs: dict[str, onnx.ModelProto], batches: list[list]) -> list[dict[str, np.ndarray]]:
    """Every tensor of a pair's graphs for each batch of texts or images."""
    signature = pair_signature(model)
    found = []
    with (
        OnnxRuntimeRunner(graphs["selector"].SerializeToString(), signature.selector, "selector") as selector,
        OnnxRuntimeRunner(graphs["predictor"].SerializeToString(), signature.predictor, "predictor") as predictor,
    ):
        for batch in batches:
            known = dict(model.preprocessor(batch).inputs)
            for runner in (selector, predictor):
                known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
            found.append(known)
    return found


def assert_no_neighbours(model, graphs: dict[str, onnx.ModelProto], texts: list[str]) -> None:
    """Each example alone is answered bit by bit as in a batch with longer ones and padding."""
    items = texts if model.preprocessor.settings.kind == "text" else some_images()
    together, *alone = answers(model, graphs, [items, *([item] for item in items)])
    for row, single in enumerate(alone):
        real = slice(0, int(single["attention_mask"].sum()) if "attention_mask" in single else None)
        for name in ("mask", "scores"):
            np.testing.assert_array_equal(single[name][0, real], together[name][row, real])
        for name in ("logits", "probabilities"):
            np.testing.assert_array_equal(single[name][0], together[name][row])
