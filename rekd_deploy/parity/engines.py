"""Engines through the parity gate, where a GPU and the library are there; elsewhere they stay unverified. torch-free.

They are compared with the PyTorch model's stored answers, within the limits of the graphs that they were built from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.parity_report import verification_limits
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError, ParityError
from rekd_deploy.parity.reference import Agreement, Case, compare, complaints, read_cases
from rekd_deploy.runtimes.tensorrt import TensorRTRunner, check_engine_file, load_library, profiles_in
from rekd_deploy.runtimes.tensorrt_execution import Cuda, ExecutionError
from rekd_train.errors import RekdError


def reason_not_to_run(entry: Mapping[str, Any], gpu: int = 0) -> str | None:
    """Why an engine with this manifest entry cannot run on a GPU of this machine; None where it can."""
    try:
        cuda = Cuda(gpu)
        name, capability = cuda.name, cuda.capability
        cuda.close()
        product = load_library(entry["format"]).product
    except (RekdError, ExecutionError) as error:
        return str(error)
    if product.builds_anywhere and capability not in entry["built_for"]:
        built = f"it was built for {', '.join(entry['built_for'])}, this machine's {name} is {capability}"
        return f"{built}; fix: verify on such a card, or export again"
    return None


def run_engine(
    role: str, path: Path, entry: Mapping[str, Any], signature: GraphSignature, cases: Sequence[Case],
    tie_margin: float, *, graph: Path, gpu: int = 0,
) -> tuple[dict[str, Any], Agreement]:
    """Load an engine on a GPU, check it against its manifest entry and the ONNX graph beside it, and ``compare`` it.

    Returns:
        The entry, completed (``gpu``, and ``status`` 'verified'), and how close its answers are to those of the cases.

    Raises:
        EngineError: the file is altered or stale, cannot be loaded on GPU ``gpu``, or is not what the entry says.
        MissingExtraError: the library is not installed.
    """
    check_engine_file(path, entry, graph)
    library = load_library(entry["format"])
    if library.version != entry["version"]:
        raise EngineError(
            f"{path} was built with {library.product.title} {entry['version']}, {library.version} is installed; fix: "
            "export with the version that serves it"
        )
    with TensorRTRunner(path, signature, path.name, engine=library.product.name, device=gpu) as runner:
        found, wanted = runner.execution.profiles, profiles_in(entry)
        if found != wanted:
            raise EngineError(f"{path} has the profiles {found}, the manifest says {wanted}")
        completed = {**entry, "gpu": runner.execution.gpu, "status": "verified"}
        return completed, compare(role, runner.run, signature, cases, tie_margin)


def prove_engines(artefacts: Artefacts, report: Callable[[str], None] = lambda step: None) -> Artefacts:
    """The same artefacts, their engines verified; unchanged on a machine that cannot run them.

    Raises:
        EngineError: an engine is not what it was to be.
        ParityError: an engine answers otherwise than the model.
    """
    entries = dict(artefacts.manifest["artefacts"])
    built = [entries[role]["engine"] for role in artefacts.engines]
    if artefacts.reference is None or not built or any(map(reason_not_to_run, built)):
        return artefacts
    cases, limits = read_cases(artefacts.reference), verification_limits(artefacts.manifest["parity"])
    for role, plan in artefacts.engines.items():
        report(f"{role} engine parity")
        signature, graph, entry = artefacts.signature.graph(role), artefacts.graphs[role], entries[role]["engine"]
        completed, agreement = run_engine(role, plan, entry, signature, cases, limits["tie_margin"], graph=graph)
        if found := complaints(agreement, limits):
            raise ParityError(f"the {role}'s engine is not the model and is not published: {'; '.join(found)}")
        entries[role] = {**entries[role], "engine": completed}
    return replace(artefacts, manifest={**artefacts.manifest, "artefacts": entries})
