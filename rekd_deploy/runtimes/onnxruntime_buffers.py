"""What a ``DeviceChain`` keeps for one shape of batch and length: buffers, bound to each of its graphs. torch-free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.contract.signature import GraphSignature, TensorSpec
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import onnx_runtime


@dataclass(frozen=True)
class Graph:
    """One step."""

    model: Path | bytes
    """File, or its content."""
    signature: GraphSignature
    name: str
    """How messages call it."""


class Shape:
    """Buffers of one bucket.

    Args:
        axes: size of each symbolic axis.
        kind, index: the device.
        number: of its captured graphs.
        captured: names of the graphs that are captured.
    """

    def __init__(
        self, sessions: Sequence[Any], graphs: Sequence[Graph], axes: dict[str, int], kind: str, index: int,
        number: int, captured: Collection[str],
    ) -> None:
        runtime = onnx_runtime()
        self._on_cpu = kind == "cpu"
        replayed = runtime.RunOptions()
        replayed.add_run_config_entry("gpu_graph_id", str(number))
        self.buffers: dict[str, Any] = {}
        self._steps = []
        for session, graph in zip(sessions, graphs, strict=True):
            binding = session.io_binding()
            for spec in (*graph.signature.inputs, *graph.signature.outputs):
                if spec.name not in self.buffers:  # what an earlier step gave is read where it lies
                    sizes = [axes.get(axis, axis) for axis in spec.shape]
                    self.buffers[spec.name] = runtime.OrtValue.ortvalue_from_shape_and_type(
                        sizes, np.dtype(spec.dtype).type, kind, index
                    )
            for spec in graph.signature.inputs:
                binding.bind_ortvalue_input(spec.name, self.buffers[spec.name])
            for spec in graph.signature.outputs:
                binding.bind_ortvalue_output(spec.name, self.buffers[spec.name])
            self._steps.append((session, binding, replayed if graph.name in captured else None))

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        for name, array in inputs.items():
            self.buffers[name].update_inplace(np.ascontiguousarray(array))
        for session, binding, options in self._steps:
            session.run_with_iobinding(binding, options)
        # on a CPU what ONNX Runtime hands out is the buffer itself
        return {name: np.array(self.buffers[name].numpy(), copy=self._on_cpu) for name in outputs}


def inputs_of(graphs: Sequence[Graph]) -> tuple[TensorSpec, ...]:
    """What no earlier graph gives."""
    given: set[str] = set()
    needed: dict[str, TensorSpec] = {}
    for graph in graphs:
        needed |= {spec.name: spec for spec in graph.signature.inputs if spec.name not in given}
        given |= {spec.name for spec in graph.signature.outputs}
    return tuple(needed.values())


def axes_of(specs: Sequence[TensorSpec], inputs: Arrays) -> dict[str, int]:
    """Size of every symbolic axis."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def filled(array: np.ndarray, rows: int) -> np.ndarray:
    """(rows, ...): the last row repeated; nothing is copied where nothing is missing."""
    missing = rows - len(array)
    return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
