"""The graphs that ``gpu.py`` runs, in files: made where PyTorch is, read, without it, where the GPU is.

    about.json                      what made them; of each pair its signature, and how close it is on a CPU
    <pair>/<precision>/<role>.onnx  'selector', 'predictor', 'single'; a classifier is a predictor that blanks nothing
    <pair>/cases.npz                inputs with the PyTorch model's answers, of pairs whose parity is checked
    <pair>/unfused/<role>.onnx      in fp16, what TensorRT builds of
    packages/                       reviews and MiniLM, what the step 'imdb' trains with (see _gpu_imdb)
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.bench.variants import BOTH, CLASSIFIER, COMPACTED, PREDICTOR, SINGLE
from rekd_deploy.contract.signature import GraphSignature, PairSignature, Slots, TensorSpec
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.export.options import GPU_PRECISIONS
from rekd_deploy.parity.reference import Agreement, compare, read_cases, record
from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.errors import RekdError
from rekd_train.files import atomic_directory, sha256, write_json

ABOUT, CASES, UNFUSED = "about.json", "cases.npz", "unfused"
TIE_MARGIN = 1e-5
SMALL = f"{COMPACTED}, small selector"
LENGTH, BUDGET = 256, 0.1
MINILM = (6, 384, 12)
"""Layers, width, heads."""
TIMED = {"equal": (COMPACTED, 6, "compact"), "small": (SMALL, 2, "compact"), "classifier": (CLASSIFIER, 1, "zero")}
"""What they are in the figures, layers of the selector, operator of the predictor."""
TESTS = Path(__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Pair:
    """A pair whose graphs lie in files."""

    folder: Path
    name: str
    signature: PairSignature
    facts: dict[str, Any]

    def graphs(self, precision: str, roles: Sequence[str]) -> list[Graph]:
        """Of these roles, in order."""
        return [
            Graph(self.folder / precision / f"{role}.onnx", self.signature.graph(role), f"{self.name} {role}")
            for role in roles
        ]

    def agreements(self, precision: str, **chain: Any) -> dict[str, Agreement]:
        """How far each graph is from the stored answers, run by a ``DeviceChain`` of these settings."""
        cases, found = read_cases(self.folder / CASES), {}
        for role in self.facts["roles"]:
            (graph,) = self.graphs(precision, [role])
            with DeviceChain([graph], **chain) as running:
                found[role] = compare(role, running.run, graph.signature, cases, TIE_MARGIN)
        return found


def prepare(folder: Path, kinds: Sequence[str] | None, tiny: bool, report: Callable[[str], None]) -> None:
    """Write the folder anew.

    Args:
        kinds: of the tests' registered pairs; None: all.
        tiny: time the tests' pairs, whose times mean nothing, and leave out what only TensorRT reads.
    """
    import onnxruntime
    import torch
    from _gpu_imdb import carry

    with atomic_directory(folder) as work:
        pairs = []
        for kind in _registered(kinds):
            report(f"parity: {kind}")
            pairs.append(_write(work, kind, {"parity": True, "single": True, "kind": kind}))
        for name, (model, selector_layers, operator) in TIMED.items():
            report(f"timing: {name}")
            made = {"size": [selector_layers, *MINILM, LENGTH, BUDGET, operator]}
            if tiny:
                made = {"kind": "bert-zero" if operator == "zero" else "bert"}
            facts = {"model": model, **made, "parity": True, "single": operator == "compact"}
            pairs.append(_write(work, name, facts))
        report("training: reviews and MiniLM")
        lacking = carry(work, tiny)
        write_json(work / ABOUT, {
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "tiny": tiny, "pairs": pairs,
            "packages": lacking, "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        })  # fmt: skip


def read(folder: Path) -> tuple[list[Pair], str]:
    """The pairs, and a digest that tells this preparation from others.

    Raises:
        BenchmarkError: there is none.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = f"python benchmarks/gpu.py prepare {folder}"
        raise BenchmarkError(f"there are no graphs in {folder}; fix: {fix}") from None
    pairs = [
        Pair(folder / facts["name"], facts["name"], PairSignature(*map(_signature, facts["signature"])), facts)
        for facts in about["pairs"]
    ]
    return pairs, sha256(folder / ABOUT)[:16]


def _registered(kinds: Sequence[str] | None) -> dict[str, Callable[[], Any]]:
    sys.path[:0] = [str(TESTS), str(TESTS / "deploy")]
    from families import KINDS

    if unknown := set(kinds or ()) - set(KINDS):
        raise BenchmarkError(f"there is no kind '{min(unknown)}'; kinds: {', '.join(KINDS)}")
    return {name: make for name, make in KINDS.items() if kinds is None or name in kinds}


def network(facts: dict[str, Any]) -> Any:
    """The PyTorch pair that the files were made from; its weights are random."""
    if "kind" in facts:
        return _registered([facts["kind"]])[facts["kind"]]()
    from cpu_latency import random_pair

    return random_pair(*facts["size"])


def _write(work: Path, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    from rekd_deploy.graphs.modules import head_layers, pair_signature
    from rekd_deploy.graphs.precision import convert_pair
    from rekd_deploy.graphs.tracing import OPSET, traced_graphs, write_graphs
    from rekd_deploy.parity.examples import made_up

    pair = network(facts)
    signature, items = pair_signature(pair), made_up(pair.preprocessor)
    facts |= {"kept": pair.capacity if pair.predictor.operator == "compact" else None}
    sides = [asdict(signature.selector), asdict(signature.predictor)]
    facts = {"name": name, **facts, "signature": sides, "on_cpu": {}}
    facts["roles"] = [*BOTH, *SINGLE] if facts["single"] else [*PREDICTOR]

    def write(models: dict[str, Any], precision: str, place: str, fused: bool) -> None:
        models = convert_pair(
            models, precision, signature, head_layers(pair), pair.preprocessor, items, fused=fused, for_engine=not fused
        ).models
        roles = [role for role in models if role in facts["roles"]]
        (work / name / place).mkdir(parents=True)
        whole = facts["single"] and fused  # of engines the two steps are timed
        write_graphs({role: models[role] for role in roles}, work / name / place, signature, whole, fused)

    models = traced_graphs(pair, fused=True, gpu=True, opset=OPSET)
    for precision in GPU_PRECISIONS:
        write(models, precision, precision, True)
    if "size" in facts:
        write(traced_graphs(pair, fused=False, opset=OPSET), "fp16", UNFUSED, False)
    if facts["parity"]:
        record(pair, items, work / name / CASES)
        written = Pair(work / name, name, signature, facts)
        for precision in GPU_PRECISIONS:
            try:
                found = {role: each.to_dict() for role, each in written.agreements(precision, device="cpu").items()}
            except RekdError as error:  # a graph for GPUs need not run on a CPU
                found = {"not_run": str(error)}
            facts["on_cpu"][precision] = found
    return facts


def _signature(stored: dict[str, Any]) -> GraphSignature:
    inputs, outputs = (
        tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in stored[side])
        for side in ("inputs", "outputs")
    )
    return GraphSignature(inputs, outputs, stored["slots"] and Slots(**stored["slots"]))
