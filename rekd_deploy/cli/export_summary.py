"""What rekd-export shows at its end: each artefact with its size, precision, parity and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rekd_deploy.export.run import Publication


def summary(publication: Publication) -> list[Any]:
    """A table and lines, for rich to print."""
    from rich.table import Table

    manifest, parity, seconds = publication.manifest, publication.manifest["parity"], publication.seconds
    table = Table("artefact", "size", "asked / observed", "parity with the PyTorch model", "seconds")
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
        f"{parity['constructed_rows']} constructed rows, {seconds['parity']:.1f} s",
        f"repository: {publication.root}, version {publication.version}",
    ]


def _limit(parity: dict[str, Any], figure: str) -> str:
    limit = parity["limits"][figure]
    return "" if limit is None else f" (limit {limit:.0e})"


def _precision(entry: dict[str, Any]) -> str:
    """Asked and observed."""
    return f"{entry['precision']} / {entry['observed']}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
