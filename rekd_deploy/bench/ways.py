"""Ways to answer a batch besides the engines: the PyTorch modules that the graphs were made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rekd_deploy.runtimes.base import Arrays

Way = Callable[[int], object]
"""Answers a batch; the number says which of the batches at hand."""


def eager(modules: Sequence, signatures: Sequence, batches: Sequence[Arrays]) -> Way:
    """The modules of ``rekd_deploy.graphs.modules`` as PyTorch runs them, without a compiler.

    Args:
        modules: in order, each taking its signature's inputs.
        signatures: a ``GraphSignature`` of each.
        batches: inputs by name; taken in turn.
    """
    import torch

    tensors = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]

    def answer(turn: int) -> dict:
        known = dict(tensors[turn % len(tensors)])
        with torch.inference_mode():
            for module, signature in zip(modules, signatures, strict=True):
                outputs = module(*(known[spec.name] for spec in signature.inputs))
                known |= dict(zip((spec.name for spec in signature.outputs), outputs, strict=True))
        return known

    return answer
