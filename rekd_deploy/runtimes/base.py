"""What every engine is: a context manager that runs one graph on NumPy arrays. torch-free."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError

Arrays = dict[str, np.ndarray]


class Runner(ABC):
    """Runs one graph. Threads, memory and devices are held only inside ``with``.

    Args:
        signature: inputs are checked against it, outputs come in its order.
        name: how messages call the graph.
    """

    def __init__(self, signature: GraphSignature, name: str) -> None:
        self.signature = signature
        self.name = name
        self._active = False

    def __enter__(self) -> Self:
        if self._active:
            raise EngineError(f"{self.name} is already running; use one `with` block at a time")
        self._activate()
        self._active = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._active = False
        self._deactivate()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name; EngineError outside ``with``, for inputs that do not fit, and where the engine fails."""
        if not self._active:
            raise EngineError(f"{self.name} is not running; use it inside a `with` block")
        check_inputs(inputs, self.signature, self.name)
        return self._run({spec.name: inputs[spec.name] for spec in self.signature.inputs})

    @abstractmethod
    def _activate(self) -> None:
        """Load the graph; raise EngineError where that fails."""

    @abstractmethod
    def _deactivate(self) -> None:
        """Release everything that ``_activate`` took."""

    @abstractmethod
    def _run(self, inputs: Arrays) -> Arrays:
        """Run on inputs that fit the signature."""


@dataclass(frozen=True)
class Graph:
    """One step of a chain."""

    model: Path | bytes
    """File, or its content."""
    signature: GraphSignature
    name: str
    """How messages call it."""


class Chain(AbstractContextManager, Protocol):
    """Runs graphs one after the other; each reads what it needs of the chain's inputs and of earlier outputs."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Every output of every graph by name."""


class RunnerChain:
    """A ``Chain`` of runners; what one gives passes through this process to the next."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._runners = list(runners)
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for runner in self._runners:
                stack.enter_context(runner)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.close()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Every output of every graph by name; raises what the runners raise."""
        known = dict(inputs)
        for runner in self._runners:
            known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
        return {spec.name: known[spec.name] for runner in self._runners for spec in runner.signature.outputs}


def parse_device(device: str) -> tuple[str, int]:
    """'cpu', 'cuda' or 'cuda:N' -> kind and index; EngineError for anything else."""
    found = re.fullmatch(r"(cpu)|cuda(?::([0-9]+))?", device)
    if found is None:
        raise EngineError(f"there is no device '{device}'; devices: cpu, cuda, cuda:N")
    return found[1] or "cuda", int(found[2] or 0)


def check_inputs(inputs: Mapping[str, np.ndarray], signature: GraphSignature, name: str) -> None:
    """Compare arrays with the signature, its fixed axes, and those that must agree; EngineError names every mistake."""
    wanted = {spec.name for spec in signature.inputs}
    mistakes = [f"input '{missing}' is missing" for missing in sorted(wanted - set(inputs))]
    mistakes += [f"input '{unknown}' is unknown" for unknown in sorted(set(inputs) - wanted)]
    sizes: dict[str, tuple[int, str]] = {}
    for spec in (spec for spec in signature.inputs if spec.name in inputs):
        array = inputs[spec.name]
        if array.dtype.name != spec.dtype:
            mistakes.append(f"input '{spec.name}' is {array.dtype.name}, not {spec.dtype}")
        if array.ndim != len(spec.shape):
            mistakes.append(f"input '{spec.name}' has the shape {array.shape}, not {spec.shape}")
            continue
        for axis, size in zip(spec.shape, array.shape, strict=True):
            limit, source = (axis, "the graph") if isinstance(axis, int) else sizes.setdefault(axis, (size, spec.name))
            if size != limit:
                mistakes.append(f"input '{spec.name}' has the shape {array.shape}; {source} says {limit}, not {size}")
            elif size == 0:
                mistakes.append(f"input '{spec.name}' has the shape {array.shape}; an axis is empty")
    if mistakes:
        raise EngineError(f"{name}: " + "; ".join(mistakes))
