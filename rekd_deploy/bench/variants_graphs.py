"""ONNX graphs and engines: what a repository holds, and what a checkpoint's other arrangements would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.variants import (
    CLASSIFIER,
    COMPACTED,
    ONNX_CPU,
    ONNX_CUDA,
    ONNX_GRAPHS,
    ZEROED,
    NotRun,
    Runnable,
    Stopwatch,
    Variant,
)
from rekd_deploy.bench.variants_torch import BOTH, PREDICTOR, SINGLE, Networks, all_kept
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.runners import Exported
from rekd_deploy.runtimes.base import Arrays, Chain, Graph, Runner
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.errors import RekdError

if TYPE_CHECKING:
    import onnx

Signatures = Mapping[str, GraphSignature]
"""By step, in order."""


@dataclass(frozen=True)
class _Ready:
    """A variant whose graphs are loaded."""

    variant: Variant
    signatures: Signatures
    runners: Sequence[Runner] = ()
    """By step; empty where a chain runs them on a device."""
    chain: Chain | None = None

    def runnable(self, batches: Sequence[Arrays]) -> Runnable:
        if tuple(self.signatures) == PREDICTOR:
            batches = [all_kept(batch, self.signatures["predictor"]) for batch in batches]
        return Runnable(self.variant, lambda number, watch: self._run(batches[number % len(batches)], watch))

    def _run(self, batch: Arrays, watch: Stopwatch) -> np.ndarray:
        if self.chain is not None:
            return self.chain.run(batch)["logits"]
        known = dict(batch)
        for step, runner in zip(self.signatures, self.runners, strict=True):
            known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
            watch.lap(step)
        return known["logits"]


class Loaded:
    """Graphs and engines that are ready to run; ``stack`` closes them.

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
    def variants(self) -> set[Variant]:
        """What is ready."""
        return {ready.variant for ready in self._ready}

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
        precision = manifest["artefacts"]["predictor"]["precision"]
        jobs = [(model, kept, BOTH), (model, kept, SINGLE)] + ([] if compact else [(CLASSIFIER, None, PREDICTOR)])
        for name, slots, roles in jobs:
            variant = Variant("", name, precision, len(roles), slots)
            signatures = {role: exported.signature.graph(role) for role in roles}
            self.add_graphs(variant, [_graph(exported, role) for role in roles], signatures)
            if set(roles) <= set(exported.plans):
                self._add_engines(variant, signatures, exported)
        return precision

    def add_traced(self, networks: Networks, models: Mapping[str, onnx.ModelProto], precision: str) -> None:
        """Graphs by role as they were traced or converted; left out where a repository has given them."""
        signatures = dict(zip(networks.roles, networks.signatures(), strict=True))
        files = [models[role].SerializeToString() for role in networks.roles]
        self.add_graphs(networks.variant("", precision), files, signatures)

    def add_graphs(self, variant: Variant, models: Sequence[Path | bytes], signatures: Signatures) -> None:
        """Graphs by step on ONNX Runtime, in whatever ways the device has; of the variant's runtime nothing is read."""
        parts = list(zip(models, signatures.items(), strict=True))
        if self._device == "cpu":
            runners = [OnnxRuntimeRunner(model, signature, f"{variant.model} {step}", threads=self._threads)
                       for model, (step, signature) in parts]  # fmt: skip
            self._add(replace(variant, runtime=ONNX_CPU), signatures, runners)
            return
        graphs = [Graph(model, signature, f"{variant.model} {step}") for model, (step, signature) in parts]
        for runtime, captured in ((ONNX_CUDA, False), (ONNX_GRAPHS, True)):
            own = replace(variant, runtime=runtime)
            if own in self.variants:
                continue
            try:
                chain = self._stack.enter_context(DeviceChain(graphs, device=self._device, captured=captured))
            except RekdError as error:
                self.not_run.append(NotRun(own.name, str(error)))
                continue
            if chain.uncaptured:  # it would be timed under a name that it does not earn
                self.not_run.append(NotRun(own.name, f"not captured: {'; '.join(set(chain.uncaptured.values()))}"))
            else:
                self._ready.append(_Ready(own, signatures, chain=chain))

    def runnables(self, batches: Sequence[Arrays]) -> list[Runnable]:
        """Everything loaded, to run on these batches, one after another."""
        return [ready.runnable(batches) for ready in self._ready]

    def _add(self, variant: Variant, signatures: Signatures, runners: Sequence[Runner]) -> None:
        if variant in self.variants:
            return
        with ExitStack() as trial:
            try:
                for runner in runners:
                    trial.enter_context(runner)
            except RekdError as error:
                self.not_run.append(NotRun(variant.name, str(error)))
                return
            self._stack.push(trial.pop_all())
        self._ready.append(_Ready(variant, signatures, runners))

    def _add_engines(self, variant: Variant, signatures: Signatures, exported: Exported) -> None:
        from rekd_deploy.parity.engines import reason_not_to_run

        entries = [exported.entries[role]["engine"] for role in signatures]
        own = replace(variant, runtime=entries[0]["format"])
        reasons = ["engines run on GPUs alone"] if self._device == "cpu" else map(reason_not_to_run, entries)
        if reason := next(filter(None, reasons), None):
            self.not_run.append(NotRun(own.name, reason))
        else:
            self._add(own, signatures, [exported.engine_runner(role) for role in signatures])


def _graph(exported: Exported, role: str) -> Path | bytes:
    """The file of a role's graph; both steps as one are joined where the repository holds no such file."""
    if role in exported.graphs:
        return exported.graphs[role]
    import onnx

    from rekd_deploy.graphs.onnx_model import joined

    return joined(*(onnx.load(exported.graphs[each]) for each in BOTH), exported.signature).SerializeToString()


def traced(
    networks: Sequence[Networks], precisions: Sequence[str], items: Sequence[Any], *, gpu: bool, not_run: list[NotRun],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Networks, dict[str, onnx.ModelProto], str]]:
    """Networks with their ONNX graphs by role and precision, compacted pairs as one graph, too. Nothing is written.

    A pair that several arrangements share is traced once.

    Args:
        items: what int8 is calibrated on.
        gpu: fused as for GPUs.
        not_run: receives what cannot be traced or converted, with the reason.
        report: called with the number of pairs that are done, and of all.
    """
    from rekd_deploy.graphs.modules import head_layers, pair_signature
    from rekd_deploy.graphs.onnx_model import joined
    from rekd_deploy.graphs.precision import convert_pair
    from rekd_deploy.graphs.tracing import OPSET, traced_graphs

    pairs = {id(each.pair): each.pair for each in networks}
    for number, (key, pair) in enumerate(pairs.items()):
        report(number, len(pairs))
        own = [each for each in networks if id(each.pair) == key]
        names, name, signature = ", ".join(each.model for each in own), "ONNX Runtime", pair_signature(pair)
        try:
            models = traced_graphs(pair, fused=True, gpu=gpu, opset=OPSET)
        except ExportError as error:
            not_run.append(NotRun(f"{name}, {names}", str(error)))
            continue
        for precision in precisions:
            try:
                found = convert_pair(
                    models, precision, signature, head_layers(pair), pair.preprocessor, items, fused=True
                ).models
            except ExportError as error:
                not_run.append(NotRun(f"{name} {precision}, {names}", str(error)))
                continue
            for each in own:
                yield each, found, precision
                if each.model == COMPACTED:
                    whole = joined(found["selector"], found["predictor"], signature)
                    yield Networks(each.model, pair, SINGLE), {"single": whole}, precision
    report(len(pairs), len(pairs))
