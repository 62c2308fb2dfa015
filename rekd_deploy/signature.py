"""The one declaration of every tensor that graphs, configs and clients exchange. torch-free.

Dummy inputs, ONNX axis names, config.pbtxt and the client's checks all derive from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BATCH = "batch"
LENGTH = "length"

DataType = Literal["int64", "float32", "bool"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of one tensor; a str axis is symbolic, an int fixed. Axis 0 is the batch."""

    name: str
    dtype: DataType
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class GraphSignature:
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class PairSignature:
    """The tensors of a served pair: selector -> predictor.

    ``positions`` and ``kept`` are handed from step to step and are not ensemble outputs: Triton's core
    answers "unexpected deadlock" when an ensemble output also feeds a later step and a client asks for
    only some outputs.
    """

    selector: GraphSignature
    predictor: GraphSignature

    @property
    def ensemble(self) -> GraphSignature:
        """What a client sends and receives: the selector's inputs; the outputs that no later step reads."""
        handed_over = {spec.name for spec in self.predictor.inputs}
        public = tuple(spec for spec in self.selector.outputs if spec.name not in handed_over)
        return GraphSignature(self.selector.inputs, public + self.predictor.outputs)


def text_pair_signature(capacity: int, classes: int) -> PairSignature:
    """Signature of a text pair with a compacted predictor.

    Args:
        capacity: K, slots of the compacted predictor.
        classes: C.
    """
    input_ids = TensorSpec("input_ids", "int64", (BATCH, LENGTH))
    attention_mask = TensorSpec("attention_mask", "int64", (BATCH, LENGTH))
    positions = TensorSpec("positions", "int64", (BATCH, capacity))
    kept = TensorSpec("kept", "bool", (BATCH, capacity))
    return PairSignature(
        selector=GraphSignature(
            inputs=(input_ids, attention_mask),
            outputs=(
                TensorSpec("scores", "float32", (BATCH, LENGTH)),
                TensorSpec("mask", "bool", (BATCH, LENGTH)),
                positions,
                kept,
            ),
        ),
        predictor=GraphSignature(
            inputs=(input_ids, positions, kept),
            outputs=(
                TensorSpec("logits", "float32", (BATCH, classes)),
                TensorSpec("probabilities", "float32", (BATCH, classes)),
            ),
        ),
    )
