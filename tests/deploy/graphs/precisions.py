"""Tiny pairs in every precision, traced once, and a check that an answer has no neighbours."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
from families import KINDS, some_images

from rekd_deploy.export.graphs import guarded_pair
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.precision import Conversion, convert_pair
from rekd_deploy.graphs.tracing import traced_graphs, write_graphs
from rekd_deploy.parity.examples import made_up
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

# What is cached is shared: do not change it.


Graphs = dict[str, onnx.ModelProto]


@cache
def model_of(kind: str):
    return KINDS[kind]()


@cache
def traced(kind: str, fused: bool = True, gpu: bool = False) -> Graphs:
    return traced_graphs(model_of(kind), fused=fused, gpu=gpu)


def graph_files(model, folder: Path, **how) -> dict[str, Path]:
    """Files of a model's float32 graphs; ``how``: ``fused`` and ``gpu`` of ``traced_graphs``."""
    return write_graphs(traced_graphs(model, **how), folder, pair_signature(model), False, how.get("fused", True))


def gpu_graphs(kind: str, precision: str, folder: Path) -> list[Path]:
    """Files of all that ONNX Runtime runs on a GPU, each with both steps in one graph, too.

    'plain' is fused for GPUs, 'guarded' what Triton runs by itself, 'python' what lies in the usual repository.
    """
    model = model_of(kind)
    signature, plain = pair_signature(model), convert(kind, precision, models=traced(kind, gpu=True)).models
    kinds = {"plain": plain, "guarded": guarded_pair(plain, model, signature), "python": converted(kind, precision)}
    paths = []
    for name, graphs in kinds.items():
        (folder / name).mkdir()
        paths += write_graphs(graphs, folder / name, signature, True, True).values()
    return paths


def convert(
    kind: str, precision: str, fused: bool = True, for_engine: bool = False, models=None, items=None) -> Conversion:
    model = model_of(kind)
    return convert_pair(models or traced(kind, fused), precision, pair_signature(model), head_layers(model),
                        model.preprocessor, made_up(model.preprocessor) if items is None else items, fused=fused,
                        for_engine=for_engine)  # fmt: skip


conversion_of = cache(convert)


def converted(kind: str, precision: str, fused: bool = True) -> Graphs:
    conversion = conversion_of(kind, precision, fused)
    return conversion.emulated or conversion.models


def run_pair(signature, graphs: Graphs, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    known = dict(inputs)
    for role in ("selector", "predictor"):
        with OnnxRuntimeRunner(graphs[role].SerializeToString(), signature.graph(role), role) as runner:
            known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
    return known


def answers(model, graphs: Graphs, batch: list) -> dict[str, np.ndarray]:
    return run_pair(pair_signature(model), graphs, model.preprocessor(batch).inputs)


def assert_no_neighbours(model, graphs: Graphs, texts: list[str]) -> None:
    """Each example alone is answered bit by bit as in a batch with longer ones and padding."""
    items = texts if model.preprocessor.settings.kind == "text" else some_images()
    together = answers(model, graphs, items)
    for row, item in enumerate(items):
        single = answers(model, graphs, [item])
        real = slice(0, int(single["attention_mask"].sum()) if "attention_mask" in single else None)
        for name in ("mask", "scores"):
            np.testing.assert_array_equal(single[name][0, real], together[name][row, real])
        for name in ("logits", "probabilities"):
            np.testing.assert_array_equal(single[name][0], together[name][row])
