"""The runner of the TensorRT family: an engine file, on a GPU. torch-free."""

from __future__ import annotations

from pathlib import Path

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Runner
from rekd_deploy.runtimes.tensorrt.execution import Cuda, EngineExecution, ExecutionError
from rekd_deploy.runtimes.tensorrt.library import Library, load_library


class TensorRTRunner(Runner):
    """Runs an engine on one GPU; device memory is held only inside ``with``.

    Args:
        plan: the engine file.
        signature: what it must take and give.
        name: how messages call it.
        engine: the product that runs it, 'tensorrt' or 'tensorrt-rtx'.
        device: index of the GPU.
    """

    def __init__(self, plan: Path, signature: GraphSignature, name: str, *, engine: str, device: int = 0) -> None:
        super().__init__(signature, name)
        self._plan = plan
        self._engine = engine
        self._device = device
        self._execution: EngineExecution | None = None

    @property
    def execution(self) -> EngineExecution:
        """The loaded engine; only inside ``with``."""
        if self._execution is None:
            raise EngineError(f"{self.name} is not running; use it inside a `with` block")
        return self._execution

    def _activate(self) -> None:
        try:
            self._execution = open_engine(load_library(self._engine), self._plan, self._device)
        except (ExecutionError, OSError) as error:
            raise EngineError(f"{self.name}: {error}") from None
        if mistakes := interface_mistakes(self._execution, self.signature):
            self._deactivate()
            raise EngineError(f"{self.name}: " + "; ".join(mistakes) + "; fix: export it again")

    def _deactivate(self) -> None:
        execution, self._execution = self._execution, None
        if execution is not None:
            execution.close()

    def _run(self, inputs: Arrays) -> Arrays:
        try:
            answers = self.execution.run(inputs)
        except ExecutionError as error:
            raise EngineError(f"{self.name}: {error}") from None
        return {spec.name: answers[spec.name] for spec in self.signature.outputs}


def open_engine(library: Library, plan: Path, device: int = 0) -> EngineExecution:
    """Load an engine file on a GPU; raises ExecutionError or OSError."""
    content, log = plan.read_bytes(), library.new_log()
    cuda = Cuda(device)
    try:
        return EngineExecution(library.api, content, log, log.reason, cuda)
    except BaseException:
        cuda.close()
        raise


def interface_mistakes(execution: EngineExecution, signature: GraphSignature) -> list[str]:
    """Where a loaded engine's tensors are not the signature's: names, order does not count, types."""
    mistakes = []
    for kind, names, specs in (
        ("inputs", execution.inputs, signature.inputs), ("outputs", execution.outputs, signature.outputs),
    ):
        if set(names) != {spec.name for spec in specs}:
            mistakes.append(f"the engine has the {kind} {sorted(names)}, not {sorted(spec.name for spec in specs)}")
            continue
        mistakes += [
            f"{spec.name} is {execution.types[spec.name]}, not {spec.dtype}"
            for spec in specs
            if execution.types[spec.name].name != spec.dtype
        ]
    return mistakes
