"""The networks of a checkpoint in every arrangement that is timed, and PyTorch running them.

Times do not depend on weights, so the same networks stand for what was not trained: a pair whose predictor blanks
instead of gathering, and a classifier that reads everything, which is that predictor alone with nothing blanked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.variants import (
    CLASSIFIER,
    COMPACTED,
    COMPILED,
    LARGE_CLASSIFIER,
    PYTORCH,
    PYTORCH_GRAPHS,
    ZEROED,
    NotRun,
    Runnable,
    Stopwatch,
    Variant,
)
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor

    from rekd_train.inputs.policy import SelectionPolicy
    from rekd_train.models.base import Predictor
    from rekd_train.models.rationalizer import Rationalizer

BOTH, PREDICTOR, SINGLE = ("selector", "predictor"), ("predictor",), ("single",)
Module = Callable[..., Any]


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

    def modules(self) -> list[Any]:
        """The exportable modules, in order."""
        from rekd_deploy.graphs.modules import graph_modules

        modules = graph_modules(self.pair)
        return [modules[role] for role in self.roles]

    def signatures(self) -> list[GraphSignature]:
        """Of the modules."""
        from rekd_deploy.graphs.modules import pair_signature

        return [pair_signature(self.pair).graph(role) for role in self.roles]

    def inputs(self, encoded: Arrays) -> Arrays:
        """What the first module takes."""
        return encoded if self.roles == BOTH else all_kept(encoded, self.signatures()[0])


def all_kept(encoded: Arrays, signature: GraphSignature) -> Arrays:
    """The inputs of a predictor that may read everything, which makes it a plain classifier.

    Args:
        encoded: the selector's inputs.
        signature: the predictor's; the width of ``keep`` is fixed for images, for texts it is theirs.
    """
    first = next(iter(encoded.values()))
    width = next(spec.shape[1] for spec in signature.inputs if spec.name == "keep")
    return encoded | {"keep": np.ones((len(first), width if isinstance(width, int) else first.shape[1]), bool)}


def networks_of(
    pair: Rationalizer, teacher: Rationalizer | None = None, budgets: Sequence[float] = ()
) -> list[Networks]:
    """Every arrangement of a checkpoint's networks; the first is the one it was trained for.

    Args:
        teacher: gives the size of the larger classifier.
        budgets: other shares of the features that a compacted pair may keep.

    Raises:
        BenchmarkError: a budget is no share, or the teacher reads something else.
    """
    own = ZEROED if pair.predictor.operator == "zero" else COMPACTED
    zeroed, compacted = _with_operator(pair, "zero"), _with_operator(pair, "compact")
    found = [Networks(COMPACTED, compacted, BOTH), Networks(ZEROED, zeroed, BOTH),
             Networks(CLASSIFIER, zeroed, PREDICTOR)]  # fmt: skip
    found.sort(key=lambda each: each.model != own)
    capacities = {compacted.capacity}
    for budget in budgets:
        if not 0 < budget <= 1:
            raise BenchmarkError(f"the budget {budget:g} is no share; give one above 0, at most 1")
        other = _rebuilt(pair, compacted.predictor, pair.policy.model_copy(update={"budget": budget}))
        if other.capacity not in capacities:
            capacities.add(other.capacity)
            found.append(Networks(COMPACTED, other, BOTH))
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
    return _rebuilt(pair, predictor, pair.policy)


def _rebuilt(pair: Rationalizer, predictor: Predictor, policy: SelectionPolicy) -> Rationalizer:
    parts = (pair.selector, predictor, policy, pair.preprocessor, pair.labels, pair.probability_temperature)
    return type(pair)(*parts).eval()


# PyTorch


def pytorch_runnables(
    networks: Networks, batches: Sequence[Arrays], device: str, runtimes: Sequence[str], *, backend: str = "inductor",
    precision: str = "fp32",
) -> tuple[list[Runnable], list[NotRun]]:
    """The networks on PyTorch, in those of ``PYTORCH``, ``COMPILED`` and ``PYTORCH_GRAPHS`` that are wanted.

    Each has run once, so that what does not work is known. Without TF32.

    Args:
        batches: tensors by name, all of one shape. They lie on the device before any clock starts.
        device: 'cpu' or 'cuda'.
        backend: of torch.compile.
        precision: 'fp32' or 'fp16'; in 'fp16' the networks themselves are float16 from then on.
    """
    import torch

    placed = [{name: torch.from_numpy(array).to(device) for name, array in networks.inputs(batch).items()}
              for batch in batches]  # fmt: skip
    modules = [module.eval().to(device) for module in networks.modules()]
    if precision == "fp16":
        modules = [module.half() for module in modules]
    found, not_run = [], []
    for runtime in runtimes:
        variant = networks.variant(runtime, precision)
        try:
            steps: Sequence[Module] = modules
            if runtime == COMPILED:
                torch.compiler.reset()  # a shape at a time: dynamic shapes would be a handicap
                steps = [torch.compile(module, backend=backend, dynamic=False) for module in modules]
            elif runtime == PYTORCH_GRAPHS:
                steps = [_Captured(networks, modules, placed[0])]
            runnable = _on_pytorch(variant, networks, steps, placed, device)
            runnable(0)
        except Exception as error:  # whatever a compiler or the driver raises: the others are still worth timing
            not_run.append(NotRun(variant.name, _said(error)))
        else:
            found.append(runnable)
    return found, not_run


def runtimes_of(device: str) -> list[str]:
    """The PyTorch runtimes that a device can have."""
    return [PYTORCH, COMPILED, *([PYTORCH_GRAPHS] if device == "cuda" else [])]


def _on_pytorch(
    variant: Variant, networks: Networks, steps: Sequence[Module], placed: Sequence[dict[str, Tensor]], device: str
) -> Runnable:
    import torch

    signatures = networks.signatures()
    names = networks.roles if len(steps) == len(networks.roles) else ("all",)

    def on_cpu(number: int, watch: Stopwatch) -> np.ndarray:
        known = dict(placed[number % len(placed)])
        with torch.inference_mode():
            for step, signature, name in zip(steps, signatures, names, strict=True):
                known |= _outputs(step, signature, known)
                watch.lap(name)
        return known["logits"].numpy()

    def on_gpu(number: int, watch: Stopwatch) -> np.ndarray:
        known = dict(placed[number % len(placed)])
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        marks[0].record()
        with torch.inference_mode():
            for index, step in enumerate(steps):
                captured = isinstance(step, _Captured)
                known |= step.replay(known) if captured else _outputs(step, signatures[index], known)
                marks[index + 1].record()
        logits = known["logits"].cpu().numpy()  # waits for the device
        watch.device |= {name: marks[index].elapsed_time(marks[index + 1]) for index, name in enumerate(names)}
        return logits

    return Runnable(variant, on_cpu if device == "cpu" else on_gpu)


class _Captured:
    """Networks recorded once as a CUDA graph; inputs are copied into the tensors that it was recorded with."""

    def __init__(self, networks: Networks, modules: Sequence[Module], example: dict[str, Tensor]) -> None:
        import torch

        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        self._steps = list(zip(modules, networks.signatures(), strict=True))
        side = torch.cuda.Stream()  # what is allocated at first use must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode():
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            self._results = self._run()

    def replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; overwritten by the next call."""
        for name, tensor in self._inputs.items():
            tensor.copy_(inputs[name])
        self._graph.replay()
        return self._results

    def _run(self) -> dict[str, Tensor]:
        known = dict(self._inputs)
        for module, signature in self._steps:
            known |= _outputs(module, signature, known)
        return known


def _outputs(module: Module, signature: GraphSignature, known: dict[str, Tensor]) -> dict[str, Tensor]:
    found = module(*(known[spec.name] for spec in signature.inputs))
    return dict(zip((spec.name for spec in signature.outputs), found, strict=True))


def _said(error: Exception) -> str:
    """Kind and first line; the second, too, where the first only leads to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
