"""Ways to answer a batch: graphs one after the other, or the PyTorch modules that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rekd_deploy.engines.base import Arrays, Runner

Way = Callable[[int], object]
"""Answers a batch; the number says which of the batches at hand."""


def run_chain(runners: Sequence[Runner], inputs: Arrays) -> Arrays:
    """Every tensor that a line of graphs was given or gave; each takes what it needs of those before it."""
    known = dict(inputs)
    for runner in runners:
        known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
    return known


def eager(modules: Sequence, signatures: Sequence, batches: Sequence[Arrays]) -> Way:
    """The modules of ``rekd_deploy.graphs`` as PyTorch runs them, without a compiler.

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
