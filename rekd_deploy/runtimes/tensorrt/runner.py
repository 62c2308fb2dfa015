"""An engine file of the TensorRT family: run on a GPU, and checked against its manifest entry. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Runner
from rekd_deploy.runtimes.tensorrt.build import UNKNOWN, VERIFIED
from rekd_deploy.runtimes.tensorrt.execution import Cuda, EngineExecution, ExecutionError
from rekd_deploy.runtimes.tensorrt.library import load_library
from rekd_deploy.runtimes.tensorrt.types import NOT_AVAILABLE, observed_precision, report_types
from rekd_train.files import sha256


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
        library = load_library(self._engine)
        log = library.new_log()
        try:
            content, cuda = self._plan.read_bytes(), Cuda(self._device)
            try:
                self._execution = EngineExecution(library.api, content, log, log.reason, cuda)
            except BaseException:
                cuda.close()
                raise
        except (ExecutionError, OSError) as error:
            raise EngineError(f"{self.name}: {error}") from None
        if mistakes := _interface_mistakes(self._execution, self.signature):
            self._deactivate()
            raise EngineError(f"{self.name}: " + "; ".join(mistakes) + "; fix: export it again")

    def _deactivate(self) -> None:
        execution, self._execution = self._execution, None
        if execution is not None:
            execution.close()

    def _run(self, inputs: Arrays) -> Arrays:
        try:
            outputs = self.execution.run(inputs)
        except ExecutionError as error:
            raise EngineError(f"{self.name}: {error}") from None
        return {spec.name: outputs[spec.name] for spec in self.signature.outputs}


def _interface_mistakes(execution: EngineExecution, signature: GraphSignature) -> list[str]:
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


def check_engine_file(path: Path, entry: Mapping[str, Any], graph: Path | None = None) -> None:
    """Compare an engine file with its manifest entry, without a GPU or library.

    Args:
        graph: the ONNX graph that the repository holds beside it.

    Raises:
        EngineError: it is missing or altered, or was built from another graph.
    """
    if not path.is_file():
        raise EngineError(f"{path} is missing; fix: rekd-export again")
    if (digest := sha256(path)) != entry["sha256"]:
        raise EngineError(
            f"{path} was altered: its SHA-256 begins with {digest[:12]}, the manifest says {entry['sha256'][:12]}; "
            "fix: rekd-export again"
        )
    if graph is not None and sha256(graph) != entry["graph_sha256"]:
        raise EngineError(f"{path} is stale: it was not built from the {graph.name} beside it; fix: rekd-export again")


def verify_engine(
    path: Path, manifest_entry: Mapping[str, Any], signature: GraphSignature, *, graph: Path | None = None,
    gpu: int = 0,
) -> dict[str, Any]:
    """Load an engine on the machine that is to serve it and compare it with its entry.

    Args:
        path: the engine file.
        manifest_entry: what ``build_engine`` returned.
        signature: the graph's tensors.
        graph: the ONNX graph beside it, if that is to be checked, too.
        gpu: number of the GPU it is loaded on.

    Returns:
        The entry, completed: ``observed``, ``engine_types``, ``gpu`` and ``status`` 'verified'. Where the library
        does not tell enough of the types, ``observed`` stays 'not available' and ``status`` is 'precision unknown'.

    Raises:
        EngineError: the file is altered or stale, cannot be loaded here, or is not what the entry says.
        MissingExtraError: the library is not installed.
    """
    check_engine_file(path, manifest_entry, graph)
    library = load_library(manifest_entry["format"])
    if library.version != manifest_entry["version"]:
        raise EngineError(
            f"{path} was built with {library.product.title} {manifest_entry['version']}, {library.version} is "
            "installed; fix: export with the version that serves it"
        )
    with TensorRTRunner(path, signature, path.name, engine=library.product.name, device=gpu) as runner:
        execution = runner.execution
        wanted = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in accepted.items()}
            for accepted in manifest_entry["profiles"]
        ]
        if execution.profiles != wanted:
            raise EngineError(f"{path} has the profiles {execution.profiles}, the manifest says {wanted}")
        types = report_types(execution.report())
        gpu = execution.gpu
    observed = observed_precision(types, manifest_entry["precision"], path.name)
    return {
        **manifest_entry,
        "observed": observed,
        "engine_types": types,
        "gpu": gpu,
        "status": UNKNOWN if observed == NOT_AVAILABLE else VERIFIED,
    }
