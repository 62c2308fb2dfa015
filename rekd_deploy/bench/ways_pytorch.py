"""PyTorch as it is, compiled, and on a GPU with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rekd_deploy.bench.forms import COMPILED, PYTORCH, PYTORCH_GRAPHS, Form, NotRun, Stopwatch, Way
from rekd_deploy.bench.lines import Line
from rekd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Module = Callable[..., Any]


def pytorch_ways(
    line: Line, batches: Sequence[Arrays], device: str, runtimes: Sequence[str], *, backend: str = "inductor",
    precision: str = "fp32",
) -> tuple[list[Way], list[NotRun]]:
    """The line on PyTorch, in those of ``PYTORCH``, ``COMPILED`` and ``PYTORCH_GRAPHS`` that are asked for.

    Each has run once, so that what does not work is known. Without TF32.

    Args:
        batches: tensors by name, all of one shape; taken in turn. They lie on the device before any clock starts.
        device: 'cpu' or 'cuda'.
        backend: of torch.compile.
        precision: 'fp32' or 'fp16'; in 'fp16' the line's own networks are float16 from then on.
    """
    import torch

    placed = [
        {name: torch.from_numpy(array).to(device) for name, array in line.inputs(batch).items()} for batch in batches
    ]
    modules = [module.eval().to(device) for module in line.modules()]
    if precision == "fp16":
        modules = [module.half() for module in modules]
    ways, not_run = [], []
    for runtime in runtimes:
        form = Form(runtime, line.model, precision, graphs=line.graphs, kept=line.kept)
        try:
            if runtime == COMPILED:
                torch.compiler.reset()  # a shape at a time: dynamic shapes would be a handicap
                steps: Sequence[Module] = [torch.compile(module, backend=backend, dynamic=False) for module in modules]
            elif runtime == PYTORCH_GRAPHS:
                steps = [_Captured(line, modules, placed[0])]
            else:
                steps = modules
            way = _way(form, line, steps, placed, device)
            way(0)
        except Exception as error:  # whatever a compiler or the driver raises: the other ways are still worth timing
            not_run.append(NotRun(form.name, _said(error)))
        else:
            ways.append(way)
    return ways, not_run


def runtimes_of(device: str) -> list[str]:
    """The PyTorch runtimes that a device can have."""
    return [PYTORCH, COMPILED, *([PYTORCH_GRAPHS] if device == "cuda" else [])]


def _way(form: Form, line: Line, steps: Sequence[Module], placed: Sequence[dict[str, Tensor]], device: str) -> Way:
    import torch

    signatures = line.signatures()
    names = line.roles if len(steps) == len(line.roles) else ("all",)

    def on_cpu(turn: int, watch: Stopwatch) -> np.ndarray:
        known = dict(placed[turn % len(placed)])
        with torch.inference_mode():
            for step, signature, name in zip(steps, signatures, names, strict=True):
                known |= _outputs(step, signature, known)
                watch.lap(name)
        return known["logits"].numpy()

    def on_gpu(turn: int, watch: Stopwatch) -> np.ndarray:
        known = dict(placed[turn % len(placed)])
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        marks[0].record()
        with torch.inference_mode():
            for place, step in enumerate(steps):
                if isinstance(step, _Captured):
                    known |= step.replay(known)
                else:
                    known |= _outputs(step, signatures[place], known)
                marks[place + 1].record()
        logits = known["logits"].cpu().numpy()  # waits for the device
        for place, name in enumerate(names):
            watch.device[name] = marks[place].elapsed_time(marks[place + 1])
        return logits

    return Way(form, on_cpu if device == "cpu" else on_gpu)


class _Captured:
    """A line recorded once as a CUDA graph; inputs are copied into the tensors that it was recorded with."""

    def __init__(self, line: Line, modules: Sequence[Module], example: dict[str, Tensor]) -> None:
        import torch

        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        self._steps = list(zip(modules, line.signatures(), strict=True))
        side = torch.cuda.Stream()  # what is allocated at first use must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode():
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            self._outputs = self._run()

    def replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; overwritten by the next call."""
        for name, tensor in self._inputs.items():
            tensor.copy_(inputs[name])
        self._graph.replay()
        return self._outputs

    def _run(self) -> dict[str, Tensor]:
        known = dict(self._inputs)
        for module, signature in self._steps:
            known |= _outputs(module, signature, known)
        return known


def _outputs(module: Module, signature: Any, known: dict[str, Tensor]) -> dict[str, Tensor]:
    found = module(*(known[spec.name] for spec in signature.inputs))
    return dict(zip((spec.name for spec in signature.outputs), found, strict=True))


def _said(error: Exception) -> str:
    """Kind and first line; the second, too, where the first only leads to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
