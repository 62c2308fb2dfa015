"""The one declaration of every tensor that graphs, configs and clients exchange. torch-free.

Dummy inputs, ONNX axis names, config.pbtxt and the client's checks all derive from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rekd_train.inputs.image import ImageSettings
    from rekd_train.inputs.policy import SelectionPolicy
    from rekd_train.inputs.text import TextSettings

BATCH, LENGTH, SLOTS = "batch", "length", "slots"
SHORTEST = 3
"""Tokens of the shortest text: [CLS], one, [SEP]; the graphs are exported for no less."""
MILLION = 1_000_000

DataType = Literal["int64", "float32", "bool", "uint8"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of one tensor; a str axis is symbolic, an int fixed. Axis 0 is the batch."""

    name: str
    dtype: DataType
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class Slots:
    """How many slots, K, a compacted predictor has for texts of a padded length.

    No rationale of a text of that length holds more. A function of the shape alone: no shape depends on the data.
    """

    parts_per_million: int
    """K = floor(share * length), at least ``least``, at most ``most``; this is the share."""
    least: int
    most: int
    """K of the longest text."""

    @classmethod
    def of(cls, policy: SelectionPolicy, most: int) -> Slots:
        """The slots of a decision rule; ``most`` is its capacity."""
        share = MILLION if policy.budget_parts_per_million is None else policy.budget_parts_per_million
        return cls(share, max(policy.minimum, 1), most)

    def at(self, length: int) -> int:
        """K for texts padded to ``length`` tokens."""
        return min(max(length * self.parts_per_million // MILLION, self.least), self.most)

    @property
    def axis(self) -> str | int:
        """The axis in a tensor's shape: a number where every length has the same K."""
        return SLOTS if self.at(SHORTEST) < self.most else self.most


@dataclass(frozen=True)
class GraphSignature:
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: Slots | None = None
    """The rule of the axis 'slots'; None: no tensor has it."""

    def sizes_at(self, spec: TensorSpec, length: int) -> tuple[int | str, ...]:
        """The shape of a tensor for texts padded to ``length``: only the batch stays symbolic."""
        known = {LENGTH: length} if self.slots is None else {LENGTH: length, SLOTS: self.slots.at(length)}
        return tuple(known.get(axis, axis) for axis in spec.shape)

    def with_all_slots(self) -> GraphSignature:
        """The same with K of the longest text for every length."""
        sizes = {} if self.slots is None else {SLOTS: self.slots.most}

        def fixed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(spec, shape=tuple(sizes.get(axis, axis) for axis in spec.shape)) for spec in specs)

        return GraphSignature(fixed(self.inputs), fixed(self.outputs))


@dataclass(frozen=True)
class PairSignature:
    """The tensors of a served pair: selector -> predictor.

    A compacted predictor is handed ``positions`` and ``kept``, one that blanks ('zero') ``keep``, a copy of ``mask``.
    None is an ensemble output: Triton's core answers "unexpected deadlock" when an ensemble output also feeds a later
    step and a client requests only some outputs.
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
        """What a client sends, and what no later step reads; a single graph of both steps has these tensors, too."""
        public = tuple(spec for spec in self.selector.outputs if spec not in self.handover)
        return GraphSignature(self.selector.inputs, public + self.predictor.outputs)

    def graph(self, role: str) -> GraphSignature:
        """The signature of the graph 'selector', 'predictor' or 'single'."""
        return {"selector": self.selector, "predictor": self.predictor, "single": self.ensemble}[role]


def text_pair_signature(slots: Slots | int | None, classes: int) -> PairSignature:
    """Signature of a text pair.

    Args:
        slots: K of a compacted predictor, by length or one number for all; None: it blanks what is not kept ('zero').
        classes: C.
    """
    inputs = tuple(TensorSpec(name, "int64", (BATCH, LENGTH)) for name in ("input_ids", "attention_mask"))
    return _pair(inputs, LENGTH, slots, classes)


def image_pair_signature(settings: ImageSettings, slots: int | None, classes: int) -> PairSignature:
    """Signature of an image pair: uint8 pixels of the model's size; arguments as ``text_pair_signature``."""
    pixels = TensorSpec("pixels", "uint8", (BATCH, settings.height, settings.width, settings.channels))
    return _pair((pixels,), settings.rows * settings.columns, slots, classes)


def signature_of(
    settings: TextSettings | ImageSettings, policy: SelectionPolicy, capacity: int, operator: str, classes: int
) -> PairSignature:
    """Signature of a pair, by the settings of its preprocessing and the predictor's operator, 'compact' or 'zero'."""
    slots = capacity if operator == "compact" else None
    if settings.kind == "image":
        return image_pair_signature(settings, slots, classes)
    return text_pair_signature(None if slots is None else Slots.of(policy, slots), classes)


def _pair(
    inputs: tuple[TensorSpec, ...], features: str | int, slots: Slots | int | None, classes: int
) -> PairSignature:
    """The pair over these inputs; N is the axis ``features``."""
    axis = slots.axis if isinstance(slots, Slots) else slots
    read = inputs if axis is None else inputs[:1]  # gathered tokens are real: no attention mask
    if axis is None:
        handover = (TensorSpec("keep", "bool", (BATCH, features)),)
    else:
        handover = (TensorSpec("positions", "int64", (BATCH, axis)), TensorSpec("kept", "bool", (BATCH, axis)))
    rule = slots if isinstance(slots, Slots) and axis == SLOTS else None
    rationale = (TensorSpec("scores", "float32", (BATCH, features)), TensorSpec("mask", "bool", (BATCH, features)))
    answer = tuple(TensorSpec(name, "float32", (BATCH, classes)) for name in ("logits", "probabilities"))
    return PairSignature(
        GraphSignature(inputs, rationale + handover, rule), GraphSignature(read + handover, answer, rule)
    )
