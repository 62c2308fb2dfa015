"""The one declaration of every tensor that graphs, configs and clients exchange. torch-free.

Dummy inputs, ONNX axis names, config.pbtxt and the client's checks all derive from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rekd_train.preprocess_image import ImageSettings

BATCH = "batch"
LENGTH = "length"

DataType = Literal["int64", "float32", "bool", "uint8"]


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

    A compacted predictor is handed ``positions`` and ``kept``, one that blanks ('zero') is handed ``keep``, a
    copy of ``mask``. None of them is an ensemble output: Triton's core answers "unexpected deadlock" when an
    ensemble output also feeds a later step and a client asks for only some outputs.
    """

    selector: GraphSignature
    predictor: GraphSignature

    @property
    def handover(self) -> tuple[TensorSpec, ...]:
        """What the selector gives to the predictor alone."""
        read = {spec.name for spec in self.predictor.inputs}
        return tuple(spec for spec in self.selector.outputs if spec.name in read)

    @property
    def ensemble(self) -> GraphSignature:
        """What a client sends and receives: the selector's inputs; the outputs that no later step reads.

        A single graph of both steps has these tensors, too.
        """
        public = tuple(spec for spec in self.selector.outputs if spec not in self.handover)
        return GraphSignature(self.selector.inputs, public + self.predictor.outputs)

    def graph(self, role: str) -> GraphSignature:
        """The signature of the graph 'selector', 'predictor' or 'single'."""
        return {"selector": self.selector, "predictor": self.predictor, "single": self.ensemble}[role]


def text_pair_signature(capacity: int | None, classes: int) -> PairSignature:
    """Signature of a text pair.

    Args:
        capacity: K, slots of a compacted predictor; None: the predictor blanks what is not kept ('zero').
        classes: C.
    """
    input_ids = TensorSpec("input_ids", "int64", (BATCH, LENGTH))
    attention_mask = TensorSpec("attention_mask", "int64", (BATCH, LENGTH))
    # gathered tokens are real tokens, so only the predictor that reads all of them asks for the padding
    read = (input_ids, attention_mask) if capacity is None else (input_ids,)
    return _pair((input_ids, attention_mask), read, LENGTH, capacity, classes)


def image_pair_signature(settings: ImageSettings, capacity: int | None, classes: int) -> PairSignature:
    """Signature of an image pair: uint8 pixels of the model's size; arguments as ``text_pair_signature``."""
    pixels = TensorSpec("pixels", "uint8", (BATCH, settings.height, settings.width, settings.channels))
    return _pair((pixels,), (pixels,), settings.rows * settings.columns, capacity, classes)


def _pair(
    inputs: tuple[TensorSpec, ...],
    read_again: tuple[TensorSpec, ...],
    features: str | int,
    capacity: int | None,
    classes: int,
) -> PairSignature:
    """The pair over these inputs, of which the predictor reads some again; N is the axis ``features``."""
    if capacity is None:
        handover = (TensorSpec("keep", "bool", (BATCH, features)),)
    else:
        handover = (
            TensorSpec("positions", "int64", (BATCH, capacity)), TensorSpec("kept", "bool", (BATCH, capacity)),
        )
    rationale = (TensorSpec("scores", "float32", (BATCH, features)), TensorSpec("mask", "bool", (BATCH, features)))
    answer = tuple(TensorSpec(name, "float32", (BATCH, classes)) for name in ("logits", "probabilities"))
    return PairSignature(
        GraphSignature(inputs, rationale + handover), GraphSignature(read_again + handover, answer)
    )
