"""AdamW with the usual parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from rekd_train.config import OptimisationConfig


def optimiser_for(module: nn.Module, settings: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: no decay on biases and norms, own rate for word embeddings."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        rate = settings.learning_rate
        if "word_embeddings" in name:
            rate, decay = settings.embedding_learning_rate or rate, 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()],
        betas=(0.9, 0.98),
        fused=True,
    )
