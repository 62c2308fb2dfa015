"""The two steps as modules that can be exported: positional tensors in, named tensors out.

Everything that decides an answer is inside: the decision rule in the selector's graph, the temperature of
the probabilities in the predictor's. Inputs and outputs follow ``rekd_deploy.contract.signature`` in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rekd_deploy.contract.signature import (
    GraphSignature,
    PairSignature,
    Slots,
    image_pair_signature,
    text_pair_signature,
)
from rekd_deploy.errors import ExportError
from rekd_train.models.gates import apply_policy, kept_positions, selection_scores
from rekd_train.models.rationalizer import Rationalizer


def pair_signature(rationalizer: Rationalizer) -> PairSignature:
    """The tensors of a model's served pair.

    Raises:
        ExportError: the model's preprocessing cannot be served.
    """
    kind = rationalizer.preprocessor.settings.kind
    compact = rationalizer.predictor.operator == "compact"
    if kind == "text":
        slots = Slots.of(rationalizer.policy, rationalizer.capacity) if compact else None
        return text_pair_signature(slots, len(rationalizer.labels))
    if kind == "image":
        slots = rationalizer.capacity if compact else None
        return image_pair_signature(rationalizer.preprocessor.settings, slots, len(rationalizer.labels))
    raise ExportError(
        f"a model with the preprocessing '{kind}' has no tokenizer to serve it with; fix: import it again with "
        "--tokenizer FILE (tokenizer.json or vocab.txt)"
    )


def graph_modules(rationalizer: Rationalizer) -> dict[str, nn.Module]:
    """The modules of a pair by role: 'selector' and 'predictor'."""
    compact = rationalizer.predictor.operator == "compact"
    predictor = CompactPredictorGraph if compact else ZeroPredictorGraph
    return {"selector": SelectorGraph(rationalizer), "predictor": predictor(rationalizer)}


def head_layers(rationalizer: Rationalizer) -> dict[str, int]:
    """How many linear layers the head of each step has."""
    return {
        role: sum(isinstance(module, nn.Linear) for module in getattr(rationalizer, role).head)
        for role in ("selector", "predictor")
    }


class SelectorGraph(nn.Module):
    """Features -> the noise-free rationale.

    Args:
        rationalizer: its selector, policy and capacity K are taken, not copied.

    Texts of every length get all K slots here; the graph's are cut afterwards (``rekd_deploy.graphs.slots``).
    """

    def __init__(self, rationalizer: Rationalizer) -> None:
        super().__init__()
        self.signature: GraphSignature = pair_signature(rationalizer).selector.with_all_slots()
        self.selector = rationalizer.selector
        self.policy = rationalizer.policy
        self.capacity = rationalizer.capacity
        self.compact = rationalizer.predictor.operator == "compact"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Scores (B, N) float32, mask (B, N) bool; positions (B, K) int64 and kept (B, K) bool, or keep (B, N) bool.

        Args:
            tensors: ``input_ids`` and ``attention_mask``, (B, N) int64, right-padded, 1 for real tokens; or
                ``pixels``, (B, height, width, channels) uint8.
        """
        inputs = _named(self.signature, tensors)
        scores = selection_scores(self.selector(inputs))
        selectable = _selectable(self.selector.backbone, inputs, self.policy.selectable)
        mask = apply_policy(scores, selectable, self.policy, self.capacity)
        if self.compact:
            return scores, mask, *kept_positions(mask, self.capacity)
        return scores, mask, mask & selectable  # the same mask, but a tensor of its own


class _PredictorGraph(nn.Module):
    """What both kinds share.

    Args:
        rationalizer: its predictor and probability temperature are taken, not copied.

    Raises:
        ExportError: the predictor was trained with the other operator.
    """

    operator: str

    def __init__(self, rationalizer: Rationalizer) -> None:
        super().__init__()
        predictor = rationalizer.predictor
        if predictor.operator != self.operator:
            raise ExportError(
                f"the predictor was trained with the operator '{predictor.operator}'; served with '{self.operator}' it "
                "would answer differently; fix: for 'compact' run `rekd-train compact` on the checkpoint"
            )
        self.signature: GraphSignature = pair_signature(rationalizer).predictor
        self.predictor = predictor
        self.selectable = rationalizer.policy.selectable
        self.temperature = float(rationalizer.probability_temperature)

    def _answer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) float32, calibrated probabilities (B, C) float32."""
        return logits, torch.softmax(logits / self.temperature, dim=-1)


class CompactPredictorGraph(_PredictorGraph):
    """Kept features -> classes; features that are not kept never enter the computation."""

    operator = "compact"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) float32, calibrated probabilities (B, C) float32.

        Args:
            tensors: ``input_ids`` or ``pixels``; ``positions``, (B, K) int64, kept positions in ascending order, 0 in
                unused slots; ``kept``, (B, K) bool, whether a slot is used.
        """
        inputs = _named(self.signature, tensors)
        return self._answer(self.predictor.gathered(inputs, inputs.pop("positions"), inputs.pop("kept")))


class ZeroPredictorGraph(_PredictorGraph):
    """All features, blanked where they are not kept -> classes: the paper's predictor, at full length."""

    operator = "zero"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) float32, calibrated probabilities (B, C) float32.

        Args:
            tensors: the selector's inputs; ``keep``, (B, N) bool.
        """
        inputs = _named(self.signature, tensors)
        keep = inputs.pop("keep")
        selectable = _selectable(self.predictor.backbone, inputs, self.selectable)
        return self._answer(self.predictor(inputs, keep.float(), selectable))


def _named(signature: GraphSignature, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The inputs by name; bytes become float32 before anything else: TensorRT does nothing else to them."""
    return {
        spec.name: tensor.float() if tensor.dtype == torch.uint8 else tensor
        for spec, tensor in zip(signature.inputs, tensors, strict=True)
    }


def _selectable(backbone, inputs: dict[str, Tensor], rule: str) -> Tensor:
    own = backbone.selectable(inputs)
    return torch.ones_like(own) if rule == "all" else own
