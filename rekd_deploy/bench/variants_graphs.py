"""ONNX graphs and engines: what a repository holds, and what a checkpoint's other arrangements would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekd_deploy.bench import variants
from rekd_deploy.bench.variants import BOTH, COMPACTED, PREDICTOR, SINGLE, Networks, NotRun, Runnable, Variant, all_kept
from rekd_deploy.errors import ExportError
from rekd_deploy.repository.reader import Exported, read_manifest
from rekd_deploy.runtimes.base import Arrays, Chain, Graph, RunnerChain
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.errors import RekdError


class Loaded:
    """Graphs and engines that are ready to run on 'cpu' or 'cuda'; ``stack`` closes them.

    Args:
        threads: of ONNX Runtime on a CPU; None: the cores that may be used.
    """

    def __init__(self, stack: ExitStack, device: str, threads: int | None) -> None:
        self._stack, self._device, self._threads = stack, device, threads
        self._ready: dict[Variant, tuple[Chain, Graph]] = {}
        """With the first graph."""
        self.not_run: list[NotRun] = []
        """What could not be loaded here."""

    @property
    def variants(self) -> set[Variant]:
        """What is ready."""
        return set(self._ready)

    def add_repository(self, root: Path) -> str:
        """What a repository holds: two graphs, both as one (joined here if need be), perhaps engines.

        Returns:
            Its precision.

        Raises:
            RepositoryError: it is missing or damaged.
        """
        exported, manifest = Exported.of(root), read_manifest(root)
        compact = manifest["operator"] == "compact"
        model, kept = (COMPACTED, manifest["capacity"]) if compact else (variants.ZEROED, None)
        precision = manifest["artefacts"]["predictor"]["precision"]
        jobs = [(model, kept, BOTH), (model, kept, SINGLE), (variants.CLASSIFIER, None, PREDICTOR)]
        for name, slots, roles in jobs[:2] if compact else jobs:
            variant = Variant("", name, precision, len(roles), slots)
            graphs = [
                Graph(_model(exported, role), exported.signature.graph(role), f"{name} {role}") for role in roles
            ]
            self.add_graphs(variant, graphs)
            if set(roles) <= set(exported.plans):
                self._add_engines(variant, graphs[0], roles, exported)
        return precision

    def add_graphs(self, variant: Variant, graphs: Sequence[Graph]) -> None:
        """Graphs on ONNX Runtime, in whatever ways the device has; the variant's own runtime is not read.

        Left out where a repository has given them.
        """
        if self._device == "cpu":
            self._add(replace(variant, runtime=variants.ONNX_CPU), graphs[0], lambda: RunnerChain([
                OnnxRuntimeRunner(each.model, each.signature, each.name, threads=self._threads) for each in graphs
            ]))  # fmt: skip
            return
        for runtime, captured in ((variants.ONNX_CUDA, False), (variants.ONNX_GRAPHS, True)):
            self._add(
                replace(variant, runtime=runtime), graphs[0],
                lambda captured=captured: DeviceChain(graphs, device=self._device, captured=captured),
            )  # fmt: skip

    def runnables(self, batches: Sequence[Arrays]) -> list[Runnable]:
        """Everything loaded, to run on these batches, one after another."""
        found = []
        for variant, (chain, first) in self._ready.items():
            alone = any(spec.name == "keep" for spec in first.signature.inputs)
            inputs = [all_kept(batch, first.signature) for batch in batches] if alone else batches
            found.append(Runnable(
                variant, lambda number, run=chain.run, inputs=inputs: run(inputs[number % len(inputs)])["logits"]
            ))  # fmt: skip
        return found

    def _add(self, variant: Variant, first: Graph, open_chain: Callable[[], Chain]) -> None:
        if variant in self._ready:
            return
        try:
            chain = self._stack.enter_context(open_chain())
        except RekdError as error:
            self.not_run.append(NotRun(variant.name, str(error)))
            return
        if isinstance(chain, DeviceChain) and chain.uncaptured:  # timed under a name that it does not earn
            self.not_run.append(NotRun(variant.name, f"not captured: {'; '.join(set(chain.uncaptured.values()))}"))
        else:
            self._ready[variant] = chain, first

    def _add_engines(self, variant: Variant, first: Graph, roles: Sequence[str], exported: Exported) -> None:
        from rekd_deploy.parity.engines import reason_not_to_run

        entries = [exported.entries[role]["engine"] for role in roles]
        own = replace(variant, runtime=entries[0]["format"])
        reasons = ["engines run on GPUs alone"] if self._device == "cpu" else map(reason_not_to_run, entries)
        if reason := next(filter(None, reasons), None):
            self.not_run.append(NotRun(own.name, reason))
        else:
            self._add(own, first, lambda: RunnerChain([exported.engine_runner(role) for role in roles]))


def _model(exported: Exported, role: str) -> Path | bytes:
    """The file of a role's graph; both steps as one are joined where the repository holds no such file."""
    if role in exported.graphs:
        return exported.graphs[role]
    import onnx

    from rekd_deploy.graphs.onnx_model import joined

    return joined(*(onnx.load(exported.graphs[each]) for each in BOTH), exported.signature).SerializeToString()


def traced(
    networks: Sequence[Networks], precisions: Sequence[str], items: Sequence[Any], *, gpu: bool, not_run: list[NotRun],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Variant, list[Graph]]]:
    """Networks as ONNX graphs by precision, compacted pairs as one, too; a pair that several share is traced once.

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
        own, signature = [each for each in networks if id(each.pair) == key], pair_signature(pair)
        models, names = None, ", ".join(each.model for each in own)
        for precision in precisions:
            try:
                models = models or traced_graphs(pair, fused=True, gpu=gpu, opset=OPSET)
                found = dict(convert_pair(
                    models, precision, signature, head_layers(pair), pair.preprocessor, items, fused=True
                ).models)  # fmt: skip
            except ExportError as error:
                not_run.append(NotRun(f"ONNX Runtime {precision}, {names}", str(error)))
                continue
            if any(each.model == COMPACTED for each in own):
                found["single"] = joined(found["selector"], found["predictor"], signature)
            for each in own:
                for roles in (each.roles, SINGLE) if each.model == COMPACTED else (each.roles,):
                    yield replace(each.variant("", precision), graphs=len(roles)), [
                        Graph(found[role].SerializeToString(), signature.graph(role), f"{each.model} {role}")
                        for role in roles
                    ]
    report(len(pairs), len(pairs))
