"""The two steps as modules that can be exported: positional tensors in, named tensors out.

Everything that decides a prediction is inside: the decision rule in the selector's graph, the temperature of
the probabilities in the predictor's. Inputs and outputs follow ``rekd_deploy.contract.signature`` in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rekd_deploy.contract.signature import GraphSignature, PairSignature, signature_of
from rekd_train.models.base import apply_policy, kept_positions, selection_scores
from rekd_train.models.rationalizer import Rationalizer


def pair_signature(rationalizer: Rationalizer) -> PairSignature:
    """The tensors of a model's served pair."""
    settings, operator = rationalizer.preprocessor.settings, rationalizer.predictor.operator
    return signature_of(settings, rationalizer.policy, rationalizer.capacity, operator, len(rationalizer.labels))


def graph_modules(rationalizer: Rationalizer) -> dict[str, nn.Module]:
    """The modules of a pair by role: 'selector' and 'predictor'."""
    return {"selector": SelectorGraph(rationalizer), "predictor": PredictorGraph(rationalizer)}


def head_layers(rationalizer: Rationalizer) -> dict[str, int]:
    """How many linear layers the head of each step has."""
    heads = {"selector": rationalizer.selector.head, "predictor": rationalizer.predictor.head}
    return {role: sum(isinstance(module, nn.Linear) for module in head) for role, head in heads.items()}


class SelectorGraph(nn.Module):
    """Features -> the noise-free rationale; selector, policy and capacity K are the model's own, not copies.

    Texts of every length get all K slots here; the graph's are cut afterwards (``tracing.cut_to_length``).
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

        Of ``input_ids`` and ``attention_mask``, (B, N) int64, or of ``pixels``, (B, height, width, channels) uint8.
        """
        inputs = _named(self.signature, tensors)
        scores = selection_scores(self.selector(inputs))
        selectable = _selectable(self.selector.backbone, inputs, self.policy.selectable)
        mask = apply_policy(scores, selectable, self.policy, self.capacity)
        if self.compact:
            return scores, mask, *kept_positions(mask, self.capacity)
        return scores, mask, mask & selectable  # the same mask, but a tensor of its own


class PredictorGraph(nn.Module):
    """The rationale -> classes; the predictor is the model's own, not a copy.

    With the operator 'compact', features that are not kept never enter the computation; with 'zero', the paper's, all
    features do, blanked where they are not kept.
    """

    def __init__(self, rationalizer: Rationalizer) -> None:
        super().__init__()
        self.signature: GraphSignature = pair_signature(rationalizer).predictor
        self.predictor = rationalizer.predictor
        self.selectable = rationalizer.policy.selectable
        self.temperature = float(rationalizer.probability_temperature)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) float32, calibrated probabilities (B, C) float32.

        For 'compact' of ``input_ids`` or ``pixels``, then ``positions``, (B, K) int64, kept positions in ascending
        order, 0 in unused slots, and ``kept``, (B, K) bool, whether a slot is used; for 'zero' of the selector's inputs
        and ``keep``, (B, N) bool.
        """
        inputs = _named(self.signature, tensors)
        if self.predictor.operator == "compact":
            logits = self.predictor.gathered(inputs, inputs.pop("positions"), inputs.pop("kept"))
        else:
            keep = inputs.pop("keep")
            selectable = _selectable(self.predictor.backbone, inputs, self.selectable)
            logits = self.predictor(inputs, keep.float(), selectable)
        return logits, torch.softmax(logits / self.temperature, dim=-1)


def _named(signature: GraphSignature, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The inputs by name; bytes become float32 before anything else: TensorRT does nothing else to them."""
    return {
        spec.name: tensor.float() if tensor.dtype == torch.uint8 else tensor
        for spec, tensor in zip(signature.inputs, tensors, strict=True)
    }


def _selectable(backbone, inputs: dict[str, Tensor], rule: str) -> Tensor:
    own = backbone.selectable(inputs)
    return torch.ones_like(own) if rule == "all" else own


class OnnxLstm(nn.Module):
    """Stands for a one-layer, one-way ``nn.LSTM``, batch first and with biases, in an exported graph."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.width = lstm.hidden_size
        self.register_buffer("input_weights", self._ordered(lstm.weight_ih_l0)[None])
        self.register_buffer("state_weights", self._ordered(lstm.weight_hh_l0)[None])
        biases = torch.cat([self._ordered(lstm.bias_ih_l0), self._ordered(lstm.bias_hh_l0)])
        self.register_buffer("biases", biases[None])

    def forward(self, content: Tensor) -> tuple[Tensor, None]:
        """(B, N, H) states; nothing else is read."""
        batch, length = content.shape[:2]
        read = (content.transpose(0, 1), self.input_weights, self.state_weights, self.biases)
        states = torch.onnx.ops.symbolic(
            "LSTM", read, {"hidden_size": self.width}, dtype=content.dtype, shape=(length, 1, batch, self.width)
        )
        return states.squeeze(1).transpose(0, 1), None

    def _ordered(self, weights: Tensor) -> Tensor:
        """Gates from PyTorch's order (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
        entry, forget, cell, output = weights.detach().split(self.width)
        return torch.cat([entry, output, forget, cell]).clone()


@contextmanager
def onnx_lstms(module: nn.Module) -> Iterator[None]:
    """Inside ``with``, every LSTM of the module is an ``OnnxLstm``: torch.export would fix the length."""
    found = {name: child for name, child in module.named_modules(remove_duplicate=False) if isinstance(child, nn.LSTM)}
    try:
        for name, child in found.items():
            module.set_submodule(name, OnnxLstm(child))
        yield
    finally:
        for name, child in found.items():
            module.set_submodule(name, child)
