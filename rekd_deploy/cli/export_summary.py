"""What rekd-export shows at its end: each artefact with its size, precision, parity and time; or what it verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rekd_deploy.export.run import Publication
    from rekd_deploy.export.verify import Verification


def summary(publication: Publication) -> list[Any]:
    """A table and lines, for rich to print."""
    from rich.table import Table

    manifest, parity, seconds = publication.manifest, publication.manifest["parity"], publication.seconds
    table = Table("artefact", "size", "precision", "parity with the PyTorch model", "seconds")
    findings = {
        "selector": [
            f"scores within {parity['score_difference']:.1e}{_limit(parity, 'scores')}",
            f"{parity['flipped_positions']} of {parity['positions']} positions flipped, "
            f"{parity['near_ties']} of them near-ties",
            *([] if parity["limits"]["mask_jaccard"] is None else [f"masks' Jaccard {parity['masks']['jaccard']:.4f}"]),
        ],
        "predictor": [
            f"logits within {parity['logit_difference']:.1e}{_limit(parity, 'logits')}",
            f"probabilities within {parity['probability_difference']:.1e}",
            *([] if parity["limits"]["logits"] is not None else [f"same class {parity['class_agreement']:.2%}"]),
        ],
    }
    if "single" in manifest["artefacts"]:
        single = manifest["single_parity"]
        findings["single"] = [
            f"scores within {single['score_difference']:.1e}, logits within {single['logit_difference']:.1e}"
        ]
    for role, entry in manifest["artefacts"].items():
        table.add_row(
            f"{role}.onnx", _size(entry["bytes"]), _precision(entry), "\n".join(findings[role]), f"{seconds[role]:.1f}"
        )
        if built := entry.get("engine"):
            table.add_row(
                f"{role}.plan", _size(built["bytes"]), _precision(built),
                f"{built['format']} {built['version']} for {', '.join(built['built_for'])}: {built['status']}"
                if built["sha256"] else f"{built['format']}: {built['status']}; rekd-export --verify builds it there",
                f"{seconds.get(f'{role} engine', 0.0):.1f}",
            )
    origin = {"file": "given", "checkpoint": "from the checkpoint", "generated": "made up"}
    notes = [f"{role}: {entry['note']}" for role, entry in manifest["artefacts"].items() if "note" in entry]
    return [
        table,
        *notes,
        f"parity: {parity['examples']} examples {origin[parity['source']]}, "
        f"{parity['constructed_rows']} constructed rows, on {parity['device']}, {seconds['parity']:.1f} s",
        f"precision: {publication.precision}",
        f"repository: {publication.root}, version {publication.version}",
    ]


def verification_lines(verification: Verification) -> list[str]:
    """What ``rekd-export --verify`` shows."""
    from rekd_deploy.repository.manifest import Versions
    from rekd_deploy.runtimes.tensorrt.build import is_built

    lines = [f"files       {len(verification.manifest['repository']['files'])}, all as they were exported"]
    for role, agreement in verification.graphs.items():
        figures = [f"{agreement.rows} stored rows on {verification.device}"]
        if agreement.positions:
            figures.append(f"scores within {agreement.score_difference:.1e}")
            figures.append(f"{agreement.flipped_positions} of {agreement.positions} positions flipped")
        if agreement.compared_classes:
            figures.append(f"logits within {agreement.logit_difference:.1e}")
        lines.append(f"{role:<12}" + ", ".join(figures))
    for role in verification.without_cases:
        lines.append(f"{role:<12}runs on {verification.device}; its answers are not compared")
    for role, reason in verification.uncaptured.items():
        lines.append(f"{role:<12}not captured as a CUDA graph: {reason}")
    for role, check in verification.engines.items():
        state = "unverified" if is_built(check.entry) else "unverified, not built yet"
        outcome = f"{state}: {check.reason}" if check.reason else (
            f"{check.entry['status']} on {check.entry['gpu']}, precision {_precision(check.entry)}, "
            f"{check.agreement.rows} stored rows"
        )
        lines.append(f"{role} engine {outcome}")
    if not verification.graphs:
        reason = "the repository was written without stored answers"
        if verification.manifest["parity"].get("emulated"):
            precision = verification.manifest["artefacts"]["predictor"]["precision"]
            reason = f"ONNX Runtime cannot compute in {precision}; engines are checked where they can run"
        lines.append(f"answers     not compared: {reason}")
    if verification.served_on == "cuda" and verification.device == "cpu":
        lines.append("warning     the server has a GPU, which did not run here; fix: --device cuda on its machine")
    for name, figures in verification.parity.items():
        lines.append(
            f"{name + ' gate':<12}{figures['examples']} examples, {figures['constructed_rows']} constructed rows "
            f"on {figures['device']}: scores within {figures['score_difference']:.1e}, "
            f"logits within {figures['logit_difference']:.1e}"
        )
    version, origin = Versions.of(verification.manifest).current, verification.manifest["checkpoint_sha256"][:12]
    return [*lines, f"verified    {verification.root}, version {version}, checkpoint {origin}"]


def _limit(parity: dict[str, Any], figure: str) -> str:
    limit = parity["limits"][figure]
    return "" if limit is None else f" (limit {limit:.0e})"


def _precision(entry: dict[str, Any]) -> str:
    """Of the export, and what was measured where that is not the same."""
    requested, measured = entry["precision"], entry["observed"]
    return requested if measured == requested else f"{requested} (measured: {measured})"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
