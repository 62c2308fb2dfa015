"""Ranges that activations take on calibration examples: read once, stored in the graph, never taken from a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import onnx_runtime

_KEPT = 1 << 15
"""Values of one tensor and example that enter the search for its range."""
_SHARES = np.linspace(0.4, 1.0, 25)
"""Ranges that are tried, as shares of the whole one."""


@dataclass(frozen=True)
class Range:
    """Scale and zero point of 8-bit values: unsigned, or signed around 0."""

    scale: np.float32
    zero_point: np.uint8 | np.int8


def calibrated_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Arrays], *, symmetric: bool = False
) -> dict[str, Range]:
    """The range of each tensor that loses least on the examples.

    Args:
        model: a float32 graph.
        tensors: names of float32 tensors in it.
        batches: inputs of the graph; one example each, so that no padding is measured.
        symmetric: signed values, 0 stands for 0; else unsigned ones.
    """
    runtime = onnx_runtime()
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.ClearField("output")
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # sums that are split among threads may differ in their last bit, and the scales with them
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    for inputs in batches:
        found = session.run(list(tensors), {name: array for name, array in inputs.items() if name in wanted})
        for name, values in zip(tensors, found, strict=True):
            seen[name].append(_some(values.ravel()))
    return {name: best_range(np.concatenate(values), symmetric=symmetric) for name, values in seen.items()}


def _some(values: np.ndarray) -> np.ndarray:
    """Evenly spaced values and the two extremes."""
    step = -(-values.size // _KEPT)
    return np.concatenate([values[::step], [values.min(), values.max()]]).astype(np.float32)


def best_range(values: np.ndarray, *, symmetric: bool = False) -> Range:
    """The range around 0 with the least squared error; values beyond it are held at its ends."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    least_value, most, range_of = (-127, 127, _symmetric_range) if symmetric else (0, 255, _range)
    best, least = range_of(low, high), np.inf
    for share in _SHARES[::-1]:
        candidate = range_of(low * share, high * share)
        quantised = np.clip(np.rint(values / candidate.scale) + int(candidate.zero_point), least_value, most)
        error = float(np.mean(((quantised - int(candidate.zero_point)) * candidate.scale - values) ** 2))
        if error < least:
            best, least = candidate, error
    return best


def _symmetric_range(low: float, high: float) -> Range:
    return Range(np.float32(max(-low, high, 127e-8) / 127), np.int8(0))


def _range(low: float, high: float) -> Range:
    scale = np.float32(max((high - low) / 255, 1e-8))
    return Range(scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255)))
