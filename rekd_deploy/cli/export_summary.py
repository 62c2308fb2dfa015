"""What rekd-export shows: what it would do, each artefact that it wrote, or what it verified."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rekd_deploy.export.run import ExportPlan, Publication
    from rekd_deploy.export.verify import Verification

_NO_MODEL = {"rekd_single": "--no-single-graph", "rekd_text": "--no-text-endpoint", "rekd_image": "--no-image-endpoint"}


def plan_lines(plan: ExportPlan) -> list[str]:
    """What ``rekd-export --dry-run`` shows."""
    facts, options = plan.checkpoint, plan.options
    budget = "no budget" if facts.policy.budget is None else f"budget {facts.policy.budget:.1%}"
    networks = [f"{role} {each.family} {each.layers} x {each.width}" for role, each in facts.backbones.items()]
    where = f"{options.product} engines on a GPU" if options.product else "on a GPU" if options.on_gpu else "on CPUs"
    beside = f" beside version {_listed(plan.stays)}" if plan.stays else ""
    removed = f"; version {_listed(plan.goes)} is removed" if plan.goes else ""
    rows = {
        "checkpoint": f"{facts.directory}: {facts.kind}, {len(facts.labels)} labels, {facts.operator}; "
        + ", ".join(networks),
        "rule": f"{budget}, at least {facts.policy.minimum}; K = {facts.capacity} of {facts.preprocessor.positions} "
        "positions" + (f", by length {_listed(plan.slots)}" if plan.slots else ""),
        "precision": _precision_note(plan),
        "lengths": _listed(plan.lengths) or "one size (images)",
        "batches": f"{_listed(options.batch_sizes)}; at most {options.batch_sizes[-1]} in one request",
        "target": f"{options.target}, {where}" + (", fused for ONNX Runtime" if options.fuse else ""),
        "engines": plan.engines_elsewhere
        and f"to be built on the target by rekd-export --verify, since here {plan.engines_elsewhere}",
        "kept": plan.kept and kept_note(plan.kept),
        "repository": f"{plan.root}, version {plan.version}{beside}{removed or ('' if beside else ' (new)')}",
        "models": ", ".join(plan.models),
    }
    return [f"{name:<12}{value}" for name, value in rows.items() if value]


def kept_note(models: Iterable[str]) -> str:
    """What is exported unasked, and how to leave it out."""
    fixes = " ".join(_NO_MODEL[model] for model in models)
    return f"{', '.join(models)}, since the repository has it and clients may be using it; {fixes} leaves it out"


def summary(publication: Publication) -> list[Any]:
    """A table and lines, for rich to print."""
    from rich.table import Table

    manifest, parity, seconds = publication.manifest, publication.manifest["parity"], publication.seconds
    limits = parity["limits"]
    scores, logits = ("" if limits[name] is None else f" (limit {limits[name]:.0e})" for name in ("scores", "logits"))
    findings = {
        "selector": f"scores within {parity['score_difference']:.1e}{scores}\n{parity['flipped_positions']} of "
        f"{parity['positions']} positions flipped, "
        f"{parity['flipped_positions'] - parity['wrong_flips']} of them near-ties",
        "predictor": f"logits within {parity['logit_difference']:.1e}{logits}\n"
        f"probabilities within {parity['probability_difference']:.1e}",
        "single": "",
    }
    if limits["mask_jaccard"] is not None:
        findings["selector"] += f"\nmasks' Jaccard {parity['masks']['jaccard']:.4f}"
    if limits["logits"] is None:
        findings["predictor"] += f"\nsame class {parity['class_agreement']:.2%}"
    if single := manifest.get("single_parity"):
        findings["single"] = _within(single)
    table = Table("artefact", "size", "precision", "parity with the PyTorch model", "seconds")
    for role, entry in manifest["artefacts"].items():
        size, time = _size(entry["bytes"]), f"{seconds[role]:.1f}"
        table.add_row(f"{role}.onnx", size, _precision(entry), findings[role], time)
        if engine := entry.get("engine"):
            state = f"{engine['format']}: {engine['status']}; rekd-export --verify builds it there"
            if engine["sha256"]:
                cards = ", ".join(engine["built_for"])
                state = f"{engine['format']} {engine['version']} for {cards}: {engine['status']}"
            time = f"{seconds.get(f'{role} engine', 0.0):.1f}"
            table.add_row(f"{role}.plan", _size(engine["bytes"]), _precision(engine), state, time)
    origin = {"file": "given", "checkpoint": "from the checkpoint", "generated": "made up"}[parity["source"]]
    return [
        table,
        *(f"{role}: {entry['note']}" for role, entry in manifest["artefacts"].items() if "note" in entry),
        f"parity: {parity['examples']} examples {origin}, {parity['constructed_rows']} constructed rows, on "
        f"{parity['device']}, {seconds['parity']:.1f} s",
        f"precision: {_precision_note(publication.plan)}",
        *([_tuning_note(manifest["tuning"])] if "tuning" in manifest else []),
        f"repository: {publication.root}, version {publication.version}",
    ]


def verification_lines(verification: Verification) -> list[str]:
    """What ``rekd-export --verify`` shows."""
    manifest = verification.manifest
    lines = [f"files       {len(manifest['repository']['files'])}, all as they were exported"]
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
        entry = check.entry
        if check.reason:
            outcome = f"unverified{'' if entry['sha256'] else ', not built yet'}: {check.reason}"
        else:
            rows = f"{check.agreement.rows} stored rows"
            outcome = f"{entry['status']} on {entry['gpu']}, precision {_precision(entry)}, {rows}"
        lines.append(f"{role} engine {outcome}")
    if not verification.graphs:
        reason = "the repository was written without stored answers"
        if manifest["parity"].get("emulated"):
            precision = manifest["artefacts"]["predictor"]["precision"]
            reason = f"ONNX Runtime cannot compute in {precision}; engines are checked where they can run"
        lines.append(f"answers     not compared: {reason}")
    if verification.served_on == "cuda" and verification.device == "cpu":
        lines.append("warning     the server has a GPU, which did not run here; fix: --device cuda on its machine")
    for name, figures in verification.parity.items():
        rows = f"{figures['examples']} examples, {figures['constructed_rows']} constructed rows on {figures['device']}"
        lines.append(f"{name + ' gate':<12}{rows}: {_within(figures)}")
    version, origin = verification.to_dict()["version"], manifest["checkpoint_sha256"][:12]
    return [*lines, f"verified    {verification.root}, version {version}, checkpoint {origin}"]


def _within(figures: dict[str, Any]) -> str:
    return f"scores within {figures['score_difference']:.1e}, logits within {figures['logit_difference']:.1e}"


def _precision_note(plan: ExportPlan) -> str:
    chosen, options = plan.options.precision, plan.options
    return f"{chosen}, the default on a GPU" if options.on_gpu and chosen == options.usual_precision else str(chosen)


def _tuning_note(tuning: dict[str, Any]) -> str:
    cells = [cell for cell in tuning["candidates"] if cell["variant"] == tuning["chosen"]]
    found = [f"{cell['per_second']:.0f} requests/s with {cell['clients']} at once" for cell in cells]
    of = len({cell["variant"] for cell in tuning["candidates"]})
    return f"tuned: --instances {tuning['instances']} --threads {tuning['threads']}, of {of}; {', '.join(found)}"


def _precision(entry: dict[str, Any]) -> str:
    """Of the export, and what was measured where that is not the same."""
    requested, measured = entry["precision"], entry.get("observed", entry["precision"])
    return requested if measured == requested else f"{requested} (measured: {measured})"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
