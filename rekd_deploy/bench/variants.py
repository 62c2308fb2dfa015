"""What can be timed: variants of one model; a checkpoint's networks in every arrangement, and PyTorch running them.

Times do not depend on weights, so the same networks stand for what was not trained: a pair whose predictor blanks
instead of gathering, and a classifier that reads everything, which is that predictor alone with nothing blanked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor

    from rekd_train.models.rationalizer import Rationalizer

    Logits = Callable[[dict[str, Tensor]], Tensor]

COMPACTED, ZEROED = "compacted", "zeroed"
CLASSIFIER, LARGE_CLASSIFIER = "classifier", "classifier of the teacher's size"
PYTORCH, COMPILED, PYTORCH_GRAPHS = "PyTorch", "torch.compile", "PyTorch, CUDA graphs"
ONNX_CPU, ONNX_CUDA, ONNX_GRAPHS = "ONNX Runtime", "ONNX Runtime CUDA", "ONNX Runtime, CUDA graphs"
BOTH, PREDICTOR, SINGLE = ("selector", "predictor"), ("predictor",), ("single",)


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


class Runnable(NamedTuple):
    """A variant that can be run."""

    variant: Variant
    run: Callable[[int], np.ndarray]
    """Computes the batch of a round; class logits (B, C)."""


@dataclass(frozen=True)
class Networks:
    """Networks that run one after another."""

    model: str
    pair: Rationalizer
    roles: tuple[str, ...]

    def variant(self, runtime: str, precision: str = "fp32") -> Variant:
        """These networks on a runtime."""
        kept = self.pair.capacity if self.model == COMPACTED else None
        return Variant(runtime, self.model, precision, len(self.roles), kept)


def all_kept(encoded: Arrays, signature: GraphSignature) -> Arrays:
    """The inputs of a predictor that may read everything, which makes it a plain classifier.

    Args:
        encoded: the selector's inputs.
        signature: the predictor's; the width of ``keep`` is fixed for images, for texts it is theirs.
    """
    first = next(iter(encoded.values()))
    width = next(spec.shape[1] for spec in signature.inputs if spec.name == "keep")
    return encoded | {"keep": np.ones((len(first), width if isinstance(width, int) else first.shape[1]), bool)}


def networks_of(pair: Rationalizer, teacher: Rationalizer | None = None) -> list[Networks]:
    """Every arrangement of a checkpoint's networks; the first is the one it was trained for.

    Args:
        teacher: gives the size of the larger classifier.

    Raises:
        BenchmarkError: the teacher reads something else.
    """
    own = ZEROED if pair.predictor.operator == "zero" else COMPACTED
    zeroed, compacted = _with_operator(pair, "zero"), _with_operator(pair, "compact")
    found = [Networks(COMPACTED, compacted, BOTH), Networks(ZEROED, zeroed, BOTH),
             Networks(CLASSIFIER, zeroed, PREDICTOR)]  # fmt: skip
    found.sort(key=lambda each: each.model != own)
    if teacher is not None:
        if pair.preprocessor.fingerprint != teacher.preprocessor.fingerprint:
            raise BenchmarkError(
                "the teacher's preprocessing is another, so its classifier cannot be timed on the same tensors; fix: a "
                "teacher with the same tokenizer and max_length, or leave it out"
            )
        found.append(Networks(LARGE_CLASSIFIER, _with_operator(teacher, "zero"), PREDICTOR))
    return found


def _with_operator(pair: Rationalizer, operator: str) -> Rationalizer:
    """The pair with a predictor of this operator; the networks themselves are shared."""
    if pair.predictor.operator == operator:
        return pair
    predictor = copy.copy(pair.predictor)
    predictor.operator = operator
    parts = (pair.selector, predictor, pair.policy, pair.preprocessor, pair.labels, pair.probability_temperature)
    return type(pair)(*parts).eval()


# PyTorch


def runtimes_of(device: str) -> list[str]:
    """The PyTorch runtimes that a device can have."""
    return [PYTORCH, COMPILED, *([PYTORCH_GRAPHS] if device == "cuda" else [])]


def pytorch_runnables(
    networks: Networks, batches: Sequence[Arrays], device: str, runtimes: Sequence[str], *, backend: str = "inductor",
    precision: str = "fp32",
) -> tuple[list[Runnable], list[NotRun]]:
    """The networks on PyTorch, in those of ``runtimes_of`` that are wanted. Without TF32.

    Each has run once, so that what does not work is known.

    Args:
        batches: tensors by name, all of one shape. They lie on the device before any clock starts.
        device: 'cpu' or 'cuda'.
        backend: of torch.compile.
        precision: 'fp32' or 'fp16'; in 'fp16' the networks themselves are float16 from then on.
    """
    import torch

    from rekd_deploy.graphs.modules import graph_modules, pair_signature

    signatures = [pair_signature(networks.pair).graph(role) for role in networks.roles]
    modules = [graph_modules(networks.pair)[role].eval().to(device) for role in networks.roles]
    if networks.roles != BOTH:
        batches = [all_kept(batch, signatures[0]) for batch in batches]
    placed = [{name: torch.from_numpy(array).to(device) for name, array in batch.items()} for batch in batches]
    if precision == "fp16":
        modules = [module.half() for module in modules]
    found, not_run = [], []
    for runtime in runtimes:
        variant, steps = networks.variant(runtime, precision), modules
        try:
            if runtime == COMPILED:
                torch.compiler.reset()  # a shape at a time: dynamic shapes would be a handicap
                steps = [torch.compile(module, backend=backend, dynamic=False) for module in modules]
            call = _in_order(steps, signatures)
            if runtime == PYTORCH_GRAPHS:
                call = _captured(call, placed[0])
            found.append(Runnable(variant, lambda number, call=call: call(placed[number % len(placed)]).cpu().numpy()))
            found[-1].run(0)
        except Exception as error:  # whatever a compiler or the driver raises: the others are still worth timing
            found = [each for each in found if each.variant != variant]
            not_run.append(NotRun(variant.name, _said(error)))
    return found, not_run


def _in_order(modules: Sequence[Any], signatures: Sequence[GraphSignature]) -> Logits:
    import torch

    @torch.inference_mode()
    def call(inputs: dict[str, Tensor]) -> Tensor:
        known = dict(inputs)
        for module, signature in zip(modules, signatures, strict=True):
            outputs = module(*(known[spec.name] for spec in signature.inputs))
            known |= dict(zip((spec.name for spec in signature.outputs), outputs, strict=True))
        return known["logits"]

    return call


def _captured(call: Logits, example: dict[str, Tensor]) -> Logits:
    """The call recorded once as a CUDA graph; inputs are copied into the tensors that it was recorded with."""
    import torch

    inputs = {name: tensor.clone() for name, tensor in example.items()}
    side = torch.cuda.Stream()  # what is allocated at first use must not be recorded
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call(inputs)

    def replay(given: dict[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            tensor.copy_(given[name])
        graph.replay()
        return logits

    return replay


def _said(error: Exception) -> str:
    """Kind and first line; the second, too, where the first only leads to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
