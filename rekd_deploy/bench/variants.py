"""What can be timed: variants of one model; and timing them in rounds on a machine that is not quiet.

Every round runs each variant once, in an order that shifts from round to round, so whatever disturbs the machine
disturbs all alike. A figure is a median over rounds; a comparison is the median of the rounds' own ratios, with an
interval from resampling the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rekd_deploy.bench.results import Check
from rekd_train.errors import ConfigError

COMPACTED, ZEROED = "compacted", "zeroed"
CLASSIFIER, LARGE_CLASSIFIER = "classifier", "classifier of the teacher's size"
PYTORCH, COMPILED, PYTORCH_GRAPHS = "PyTorch", "torch.compile", "PyTorch, CUDA graphs"
ONNX_CPU, ONNX_CUDA, ONNX_GRAPHS = "ONNX Runtime", "ONNX Runtime CUDA", "ONNX Runtime, CUDA graphs"
_RESAMPLES = 2000
_CLASSES_ALIKE = 0.98
"""Share of rows on which float32 variants of one model must agree about the class."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a prediction."""

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
        """For people; different variants have different names."""
        slots = "" if self.kept is None else f", K {self.kept}"
        joined = ", one graph" if self.graphs == 1 and self.model in (COMPACTED, ZEROED) else ""
        return f"{self.runtime} {self.precision}, {self.model}{slots}{joined}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **asdict(self)}


class NotRun(NamedTuple):
    """A variant that was not timed, and why."""

    name: str
    reason: str


def comparisons(variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """Each variant with its baselines: what differs in one thing, and what the paper's system would cost."""
    pairs = []
    for variant in variants:
        others = []
        if variant.model in (COMPACTED, ZEROED):
            if variant.model == COMPACTED:
                others += [replace(variant, model=ZEROED, kept=None), Variant(PYTORCH, ZEROED)]
            others += [replace(variant, model=model, kept=None, graphs=1) for model in (CLASSIFIER, LARGE_CLASSIFIER)]
            others.append(replace(variant, graphs=2))
        others += [replace(variant, precision="fp32"), replace(variant, runtime=PYTORCH)]
        pairs += [(variant, other) for other in dict.fromkeys(others) if other in variants and other != variant]
    return pairs


class Stopwatch:
    """Milliseconds of the steps of one prediction."""

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


class Runnable:
    """A variant that can be called; remembers the steps of every call.

    Args:
        run: computes the batch of a round, tells the stopwatch when each step ends, returns class logits (B, C).
    """

    def __init__(self, variant: Variant, run: Callable[[int, Stopwatch], np.ndarray]) -> None:
        self.variant = variant
        self._run = run
        self.watches: list[Stopwatch] = []

    def __call__(self, number: int) -> np.ndarray:
        watch = Stopwatch()
        logits = self._run(number, watch)
        self.watches.append(watch)
        return logits

    def last(self, rounds: int, clock: str = "steps") -> dict[str, np.ndarray]:
        """Milliseconds (rounds,) by step of the last calls; ``clock``: 'steps' (wall) or 'device'."""
        rows: list[Mapping[str, float]] = [getattr(watch, clock) for watch in self.watches[-rounds:]]
        return {step: np.array([row[step] for row in rows]) for step in rows[0]}


# timing in rounds


@dataclass(frozen=True)
class Timings:
    """Milliseconds, (rounds,) float64, by variant."""

    milliseconds: dict[str, np.ndarray]

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """Time of ``name`` in units of ``baseline``: the median of the rounds' own ratios and its 95 % interval."""
        return median_figures(self.milliseconds[name] / self.milliseconds[baseline], "ratio")


def median_figures(values: np.ndarray, name: str = "p50") -> dict[str, float]:
    """The median of (n,) values under ``name``; ``low`` and ``high`` of its 95 % interval, by resampling them.

    As ``scipy.stats.bootstrap`` finds it; the GPU machine of benchmarks/gpu.py has no scipy.
    """
    drawn = np.random.default_rng(0).integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return {name: float(np.median(values)), "low": float(low), "high": float(high)}


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """``p50``, ``p90``, ``p95``, ``p99`` of (n,) values."""
    return {f"p{level}": float(np.percentile(milliseconds, level)) for level in (50, 90, 95, 99)}


def with_interval(milliseconds: np.ndarray) -> dict[str, float]:
    """Percentiles of (n,) times, and ``low`` and ``high`` of the median."""
    return {**percentiles(milliseconds), **median_figures(milliseconds)}


def in_rounds(
    variants: Mapping[str, Callable[[int], object]], *, rounds: int, warmup_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter, report: Callable[[int], None] = lambda done: None,
) -> Timings:  # fmt: skip
    """Time each variant once a round.

    Args:
        variants: by name; called with the number of the round, so that they may take other inputs each time.
        rounds: at least 3.
        warmup_seconds: each variant runs for so long, and once in any case, before the first round.
        clock: seconds; replaced in tests.
        report: called with the number of rounds that are done.

    Raises:
        ConfigError: too few rounds for a median.
    """
    if rounds < 3:
        raise ConfigError(f"{rounds} rounds are too few for a median; at least 3")
    for variant in variants.values():
        begun = clock()
        variant(0)
        while clock() - begun < warmup_seconds:
            variant(0)
    names = list(variants)
    milliseconds = {name: np.empty(rounds) for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = clock()
            variants[name](number)
            milliseconds[name][number] = 1000 * (clock() - begun)
        report(number + 1)
    return Timings(milliseconds)


# the same predictions?


def classes_alike(runnables: Sequence[Runnable], count: int) -> tuple[int, int]:
    """Rows on which float32 variants of a model predict as the first of them does, and all rows that were compared.

    Args:
        count: how many batches there are.
    """
    same = rows = 0
    first: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for each in (each for each in runnables if each.variant.precision == "fp32"):
        classes = [np.asarray(each(number)).argmax(axis=1) for number in range(count)]
        model = each.variant.model, each.variant.kept
        if model in first:
            same += sum(int((ours == theirs).sum()) for ours, theirs in zip(classes, first[model], strict=True))
            rows += sum(map(len, classes))
        first.setdefault(model, classes)
    return same, rows


def alike_check(alike: Sequence[tuple[int, int]]) -> Check:
    """The check over all cells: what is fast must also be right."""
    same, rows = (sum(counts) for counts in zip(*alike, strict=True))
    name = "what is timed answers alike"
    if not rows:
        return Check(name=name, outcome="not applicable", words="no model was timed in two float32 forms")
    share = same / rows
    return Check(
        name=name, outcome="passed" if share >= _CLASSES_ALIKE else "failed", value=share, limit=_CLASSES_ALIKE,
        words=f"{same:,} of {rows:,} answers have the class of the first float32 form of the same model",
    )  # fmt: skip
