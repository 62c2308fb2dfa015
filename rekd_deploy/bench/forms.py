"""What can be timed: forms of one model, by what runs them, in which precision; and which is held against which."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

COMPACTED, ZEROED = "compacted", "zeroed"
CLASSIFIER, LARGE_CLASSIFIER = "classifier", "classifier of the teacher's size"
PYTORCH, COMPILED, PYTORCH_GRAPHS = "PyTorch", "torch.compile", "PyTorch, CUDA graphs"
ONNX_CPU, ONNX_CUDA, ONNX_GRAPHS = "ONNX Runtime", "ONNX Runtime CUDA", "ONNX Runtime, CUDA graphs"


@dataclass(frozen=True)
class Form:
    """One way to compute an answer."""

    runtime: str
    model: str
    """``COMPACTED`` and ``ZEROED`` are pairs, ``CLASSIFIER`` is their predictor alone, reading everything."""
    precision: str = "fp32"
    graphs: int = 2
    """1: both steps in one graph, or a classifier."""
    kept: int | None = None
    """K of a compacted pair."""

    @property
    def name(self) -> str:
        """For people; different forms have different names."""
        slots = "" if self.kept is None else f", K {self.kept}"
        joined = ", one graph" if self.graphs == 1 and self.model in (COMPACTED, ZEROED) else ""
        return f"{self.runtime} {self.precision}, {self.model}{slots}{joined}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **asdict(self)}


class NotRun(NamedTuple):
    """A form that was not timed, and why."""

    name: str
    reason: str


def comparisons(forms: Sequence[Form]) -> list[tuple[Form, Form]]:
    """Each form with those it is held against: what differs in one thing, and what the paper's system would cost."""
    known = set(forms)
    pairs = []
    for form in forms:
        against = []
        if form.model in (COMPACTED, ZEROED):
            if form.model == COMPACTED:
                against += [replace(form, model=ZEROED, kept=None), Form(PYTORCH, ZEROED)]
            against += [replace(form, model=model, kept=None, graphs=1) for model in (CLASSIFIER, LARGE_CLASSIFIER)]
            against.append(replace(form, graphs=2))
        against += [replace(form, precision="fp32"), replace(form, runtime=PYTORCH)]
        pairs += [(form, other) for other in dict.fromkeys(against) if other in known and other != form]
    return pairs


class Stopwatch:
    """Milliseconds of the steps of one answer."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.steps: dict[str, float] = {}
        """Wall clock, by step; empty where the steps are not waited for one by one."""
        self.device: dict[str, float] = {}
        """By step, from events on the device; empty on a CPU."""
        self._last = clock()

    def lap(self, step: str) -> None:
        """The step has just ended."""
        now = self._clock()
        self.steps[step] = 1000 * (now - self._last)
        self._last = now


class Way:
    """A form that can be called; remembers the steps of every call.

    Args:
        run: answers the batch of a turn, tells the stopwatch when each step ends, and returns the class logits
            (B, C).
    """

    def __init__(self, form: Form, run: Callable[[int, Stopwatch], np.ndarray]) -> None:
        self.form = form
        self._run = run
        self.watches: list[Stopwatch] = []

    def __call__(self, turn: int) -> np.ndarray:
        watch = Stopwatch()
        logits = self._run(turn, watch)
        self.watches.append(watch)
        return logits

    def last(self, rounds: int, clock: str = "steps") -> dict[str, np.ndarray]:
        """Milliseconds (rounds,) by step of the last calls; ``clock``: 'steps' (wall) or 'device'."""
        rows: list[Mapping[str, float]] = [getattr(watch, clock) for watch in self.watches[-rounds:]]
        return {step: np.array([row[step] for row in rows]) for step in rows[0]}
