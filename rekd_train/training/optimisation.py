"""AdamW with the usual parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from rekd_train.config.run import OptimisationConfig
from rekd_train.models.text import TextBackbone


def optimiser_for(module: nn.Module, settings: OptimisationConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    Word embeddings have their own rate; biases, norms and word embeddings do not decay, unless everything does.
    """
    decay = settings.weight_decay
    gentle = decay if settings.decay_everything else 0.0
    # the same three groups whatever the rates are, so that a run may go on with other rates
    groups = {
        "matrices": {"params": [], "lr": settings.learning_rate, "weight_decay": decay},
        "vectors": {"params": [], "lr": settings.learning_rate, "weight_decay": gentle},
        "embeddings": {
            "params": [],
            "lr": settings.embedding_learning_rate or settings.learning_rate,
            "weight_decay": gentle,
        },
    }
    tables = {id(table) for table in word_tables(module)}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = "embeddings" if id(parameter) in tables else "matrices" if parameter.ndim > 1 else "vectors"
            groups[kind]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups.values() if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=fused,
    )


def word_tables(module: nn.Module) -> list[nn.Parameter]:
    """The word embeddings within a module, of whatever family its networks are."""
    return [part.table.weight for part in module.modules() if isinstance(part, TextBackbone)]
