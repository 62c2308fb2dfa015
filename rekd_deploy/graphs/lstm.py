"""LSTMs as the ONNX operator of that name while a module is exported: torch.export would fix the length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OnnxLstm(nn.Module):
    """Stands for a one-layer, one-way ``nn.LSTM`` in an exported graph; computes nothing itself.

    Args:
        lstm: batch first, with biases.
    """

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
        states = torch.onnx.ops.symbolic(
            "LSTM",
            (content.transpose(0, 1), self.input_weights, self.state_weights, self.biases),
            {"hidden_size": self.width},
            dtype=content.dtype,
            shape=(length, 1, batch, self.width),
        )
        return states.squeeze(1).transpose(0, 1), None

    def _ordered(self, weights: Tensor) -> Tensor:
        """Gates from PyTorch's order (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
        entry, forget, cell, output = weights.detach().split(self.width)
        return torch.cat([entry, output, forget, cell]).clone()


@contextmanager
def onnx_lstms(module: nn.Module) -> Iterator[None]:
    """Inside ``with``, every LSTM of the module is an ``OnnxLstm``."""
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.LSTM)
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, OnnxLstm(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
