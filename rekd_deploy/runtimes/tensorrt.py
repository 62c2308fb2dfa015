"""The TensorRT family: its products, what a manifest says of an engine, and an engine run on a GPU. torch-free.

TensorRT 10, TensorRT 11 and TensorRT-RTX have the same Python API as far as this project uses it (a test compares every
name with the lists of both). TensorRT builds on and for the GPU that is there; TensorRT-RTX builds anywhere, for the
compute capabilities it is given, and compiles the last part where it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Runner
from rekd_deploy.runtimes.tensorrt_execution import EngineExecution, ExecutionError
from rekd_train.errors import MissingExtraError, install_command
from rekd_train.files import sha256

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, tuned and largest shape by input."""


@dataclass(frozen=True)
class Product:
    """One library of the TensorRT family."""

    name: str
    """As on the command line and in manifests."""
    title: str
    module: str
    majors: tuple[int, ...]
    """Major versions whose API this project knows."""
    capabilities: tuple[str, ...] = ()
    """Cards that it builds for, on a machine without a GPU; empty: it builds for the GPU that is there."""

    @property
    def builds_anywhere(self) -> bool:
        """Whether it builds without a GPU."""
        return bool(self.capabilities)


PRODUCTS = {
    "tensorrt": Product("tensorrt", "TensorRT", "tensorrt", (10, 11)),
    # GeForce and RTX cards of the last three generations
    "tensorrt-rtx": Product("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", (1,), ("sm86", "sm89", "sm120")),
}


@dataclass(frozen=True)
class Library:
    """A product that is installed."""

    product: Product
    api: ModuleType
    version: str

    def new_log(self):
        """A logger for one object of the library, which would print to standard error otherwise."""
        api = self.api

        class MessageLog(api.ILogger):
            def __init__(self) -> None:
                api.ILogger.__init__(self)
                self.complaints: list[str] = []

            def log(self, severity, message) -> None:
                if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                    self.complaints.append(str(message))

            def reason(self) -> str:
                """The first useful line of what went wrong."""
                return first_line(self.complaints) or "it gives no reason"

        return MessageLog()


def load_library(name: str) -> Library:
    """The installed library of a product in ``PRODUCTS``.

    Raises:
        MissingExtraError, EngineError: it is unknown, not installed, cannot be loaded or has an unknown version.
    """
    if name not in PRODUCTS:
        raise EngineError(f"there is no engine '{name}'; engines: {', '.join(PRODUCTS)}")
    product = PRODUCTS[name]
    majors = " or ".join(map(str, product.majors))
    try:
        api = importlib.import_module(product.module)
    except ModuleNotFoundError as error:
        if error.name != product.module or not product.builds_anywhere:
            raise EngineError(
                f"{product.title} {majors} (the Python package '{error.name}') is not installed; fix: export on the "
                f"target machine inside its Triton container, or {install_command(name)} where NVIDIA's own package "
                "index is reachable; for RTX cards: --target python --engine tensorrt-rtx"
            ) from None
        raise MissingExtraError(product.module, name) from None
    except (ImportError, OSError, RuntimeError) as error:  # the wheel is there, its shared libraries are not
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = f"{install_command(name)} --force-reinstall"
        raise EngineError(f"{product.title} cannot be loaded: {reason}; fix: {fix}") from None
    version = str(api.__version__)
    if version.split(".")[0] not in map(str, product.majors):
        raise EngineError(f"{product.title} is installed in version {version}; fix: install version {majors}")
    return Library(product, api, version)


def first_line(messages: Sequence[str]) -> str:
    """The first line that says what is wrong; TensorRT's complaints of a missing driver are only the last resort."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return min(lines, key=lambda line: "cudaError" in line, default="")


def deferred_entry(product: Product, graph: Path, profiles: Sequence[Profile], precision: str) -> dict[str, Any]:
    """The manifest entry of an engine that is to be built elsewhere; as ``build_engine``'s, without the file."""
    return {
        "format": product.name, "version": None, "built_for": [], "precision": precision, "graph_sha256": sha256(graph),
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in accepted.items()} for accepted in profiles
        ],
        "status": "unverified", "bytes": 0, "sha256": None,
    }


def profiles_in(entry: Mapping[str, Any]) -> list[dict[str, list[Shape]]]:
    """The profiles of a manifest entry, as an engine has them."""
    return [
        {name: [tuple(shape) for shape in shapes] for name, shapes in accepted.items()}
        for accepted in entry["profiles"]
    ]


def is_built(entry: Mapping[str, Any]) -> bool:
    """Whether the engine of a manifest entry is there; a deferred one is built elsewhere."""
    return entry.get("sha256") is not None


def check_engine_file(path: Path, entry: Mapping[str, Any], graph: Path) -> None:
    """Compare an engine file, and the ONNX graph beside it, with its manifest entry, without a GPU or library.

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
    if sha256(graph) != entry["graph_sha256"]:
        raise EngineError(f"{path} is stale: it was not built from the {graph.name} beside it; fix: rekd-export again")


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
            plan = self._plan.read_bytes()
            self._execution = EngineExecution(library.api, plan, log, log.reason, self._device)
        except (ExecutionError, OSError) as error:
            raise EngineError(f"{self.name}: {error}") from None
        found = {name: self._execution.types[name].name for name in (*self._execution.inputs, *self._execution.outputs)}
        wanted = {spec.name: spec.dtype for spec in (*self.signature.inputs, *self.signature.outputs)}
        if found != wanted:
            self._deactivate()
            raise EngineError(f"{self.name}: the engine has the tensors {found}, not {wanted}; fix: export it again")

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
