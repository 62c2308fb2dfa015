"""ONNX graphs and engines: what a repository holds, and what a checkpoint's other arrangements would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rekd_deploy.bench.forms import (
    CLASSIFIER,
    COMPACTED,
    ONNX_CPU,
    ONNX_CUDA,
    ONNX_GRAPHS,
    ZEROED,
    Form,
    NotRun,
    Stopwatch,
    Way,
)
from rekd_deploy.bench.lines import BOTH, PREDICTOR, SINGLE, Line, all_kept
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.runners import Exported
from rekd_deploy.runtimes.base import Arrays, Chain, Graph, Runner
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.errors import RekdError

if TYPE_CHECKING:
    import onnx


class _Arrangement(NamedTuple):
    """Graphs that answer one after another, before anything is loaded."""

    model: str
    precision: str
    kept: int | None
    signatures: dict[str, GraphSignature]
    """By step, in order."""

    def form(self, runtime: str) -> Form:
        return Form(runtime, self.model, self.precision, len(self.signatures), self.kept)


@dataclass(frozen=True)
class _Ready:
    """An arrangement that is loaded."""

    form: Form
    arrangement: _Arrangement
    runners: Sequence[Runner] = ()
    """By step; empty where a chain runs them on a device."""
    chain: Chain | None = None

    def way(self, batches: Sequence[Arrays]) -> Way:
        if tuple(self.arrangement.signatures) == PREDICTOR:
            batches = [all_kept(batch, self.arrangement.signatures["predictor"]) for batch in batches]
        return Way(self.form, lambda turn, watch: self._answer(batches[turn % len(batches)], watch))

    def _answer(self, batch: Arrays, watch: Stopwatch) -> np.ndarray:
        if self.chain is not None:
            return self.chain.run(batch)["logits"]
        known = dict(batch)
        for step, runner in zip(self.arrangement.signatures, self.runners, strict=True):
            known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
            watch.lap(step)
        return known["logits"]


class Loaded:
    """Graphs and engines that are ready to run; all are let go of with ``stack``.

    Args:
        device: 'cpu' or 'cuda'.
        threads: of ONNX Runtime on a CPU; None: the cores that may be used.
    """

    def __init__(self, stack: ExitStack, device: str, threads: int | None) -> None:
        self._stack, self._device, self._threads = stack, device, threads
        self._ready: list[_Ready] = []
        self.not_run: list[NotRun] = []
        """What could not be loaded here."""

    @property
    def forms(self) -> set[Form]:
        """What is ready."""
        return {ready.form for ready in self._ready}

    def add_repository(self, root: Path) -> str:
        """What a repository holds: two graphs, both as one (joined here if need be), perhaps engines.

        Returns:
            Its precision.

        Raises:
            RepositoryError: it is missing or damaged.
        """
        exported, manifest = Exported.of(root), read_manifest(root)
        compact = manifest["operator"] == "compact"
        model, kept = (COMPACTED, manifest["capacity"]) if compact else (ZEROED, None)
        runs = [(model, kept, BOTH), (model, kept, SINGLE)]
        if not compact:
            runs.append((CLASSIFIER, None, PREDICTOR))
        precision = manifest["artefacts"]["predictor"]["precision"]
        for name, slots, roles in runs:
            parts = _Arrangement(name, precision, slots, {role: exported.signature.graph(role) for role in roles})
            self._add_graphs(parts, [_graph(exported, role) for role in roles])
            if set(roles) <= set(exported.plans):
                self._add_engines(parts, exported)
        return precision

    def add_traced(self, line: Line, models: Mapping[str, onnx.ModelProto], precision: str) -> None:
        """A line's graphs as they were traced or converted; left out where a repository has given them."""
        signatures = dict(zip(line.roles, line.signatures(), strict=True))
        parts = _Arrangement(line.model, precision, line.kept, signatures)
        self._add_graphs(parts, [models[role].SerializeToString() for role in line.roles])

    def add_files(self, form: Form, models: Mapping[str, Path], signatures: Mapping[str, GraphSignature]) -> None:
        """Graphs that lie in files, by step in order; of the form's runtime nothing is read."""
        parts = _Arrangement(form.model, form.precision, form.kept, dict(signatures))
        self._add_graphs(parts, list(models.values()))

    def ways(self, batches: Sequence[Arrays]) -> list[Way]:
        """Everything loaded, as ways to answer these batches in turn."""
        return [ready.way(batches) for ready in self._ready]

    def _add_graphs(self, parts: _Arrangement, models: Sequence[Path | bytes]) -> None:
        """Graphs by step, on ONNX Runtime."""
        if self._device != "cpu":
            self._add_on_device(parts, models)
            return
        runners = [
            OnnxRuntimeRunner(model, signature, f"{parts.model} {step}", threads=self._threads)
            for model, (step, signature) in zip(models, parts.signatures.items(), strict=True)
        ]
        self._add(parts.form(ONNX_CPU), parts, runners)

    def _add(self, form: Form, parts: _Arrangement, runners: Sequence[Runner]) -> None:
        if form in self.forms:
            return
        with ExitStack() as trial:
            try:
                for runner in runners:
                    trial.enter_context(runner)
            except RekdError as error:
                self.not_run.append(NotRun(form.name, str(error)))
                return
            self._stack.push(trial.pop_all())
        self._ready.append(_Ready(form, parts, runners))

    def _add_on_device(self, parts: _Arrangement, models: Sequence[Path | bytes]) -> None:
        graphs = [
            Graph(model, signature, f"{parts.model} {role}")
            for model, (role, signature) in zip(models, parts.signatures.items(), strict=True)
        ]
        for runtime, captured in ((ONNX_CUDA, False), (ONNX_GRAPHS, True)):
            form = parts.form(runtime)
            if form in self.forms:
                continue
            try:
                chain = self._stack.enter_context(DeviceChain(graphs, device=self._device, captured=captured))
            except RekdError as error:
                self.not_run.append(NotRun(form.name, str(error)))
                continue
            if chain.uncaptured:  # it would be timed under a name that it does not earn
                self.not_run.append(NotRun(form.name, f"not captured: {'; '.join(set(chain.uncaptured.values()))}"))
            else:
                self._ready.append(_Ready(form, parts, chain=chain))

    def _add_engines(self, parts: _Arrangement, exported: Exported) -> None:
        from rekd_deploy.parity.engines import reason_not_to_run

        entries = [exported.entries[role]["engine"] for role in parts.signatures]
        form = parts.form(entries[0]["format"])
        reasons = ["engines run on GPUs alone"] if self._device == "cpu" else map(reason_not_to_run, entries)
        if reason := next(filter(None, reasons), None):
            self.not_run.append(NotRun(form.name, reason))
        else:
            self._add(form, parts, [exported.engine_runner(role) for role in parts.signatures])


def _graph(exported: Exported, role: str) -> Path | bytes:
    """The file of a role's graph; both steps as one are joined where the repository holds no such file."""
    if role in exported.graphs:
        return exported.graphs[role]
    import onnx

    from rekd_deploy.graphs.onnx_model import joined

    steps = [onnx.load(exported.graphs[each]) for each in BOTH]
    return joined(*steps, exported.signature).SerializeToString()
