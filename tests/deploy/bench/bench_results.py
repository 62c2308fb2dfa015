"""Results of rekd-bench with made-up figures, for the report and the comparison."""

from rekd_deploy.bench.results import Check, Input, Result
from rekd_deploy.bench.variants import CLASSIFIER, COMPACTED, ONNX_CPU, PYTORCH, ZEROED, Variant, comparisons

HARDWARE = {"processor": "made up", "machine": "x86_64", "cores": 2, "memory_gb": 8.0, "gpus": []}
VARIANTS = [Variant(ONNX_CPU, COMPACTED, kept=32), Variant(ONNX_CPU, COMPACTED, graphs=1, kept=32),
            Variant(ONNX_CPU, ZEROED), Variant(ONNX_CPU, CLASSIFIER, graphs=1), Variant(PYTORCH, ZEROED)]  # fmt: skip


def made_up(kind: str, figures: dict, *checks: Check, **settings) -> Result:
    """A result of a kind; its repository is called like somebody's attempt at markup."""
    return Result(
        kind=kind, command=f"rekd-bench {kind} REPO", hardware=HARDWARE, versions={"rekd": "1", "python": "3.11"},
        inputs={"repository": Input(name="<script>alert(1)</script>", sha256="a" * 64),
                "data": Input(name="reviews", sha256="b" * 64)},
        settings=settings, figures=figures, checks=list(checks))  # fmt: skip


def between(name: str, value: float, spread: float = 0.02) -> dict[str, float]:
    return {name: value, "low": value * (1 - spread), "high": value * (1 + spread)}


def times(p50: float, spread: float = 0.02) -> dict[str, float]:
    return {**between("p50", p50, spread), "p90": 1.2 * p50, "p95": 1.3 * p50, "p99": 1.5 * p50, "max": 2 * p50}


def latency(factor: float = 1.0, spread: float = 0.02) -> Result:
    """Two batches, two lengths; ``factor`` slows the compacted variants."""
    cells = []
    for length, batch in ((length, batch) for length in (64, 256) for batch in (1, 8)):
        p50 = {
            each: batch * length * (0.01 if each.model == CLASSIFIER else 0.02)
            * (0.6 * factor if each.model == COMPACTED else 1.0) for each in VARIANTS}  # fmt: skip
        cells.append({
            "batch": batch, "length": length, "rounds": 9,
            "ways": [each.to_dict() | {"milliseconds": times(p50[each], spread), "items_per_second": 100.0}
                     for each in VARIANTS],
            "ratios": [{"way": each.name, "baseline": other.name, **between("ratio", p50[each] / p50[other], spread)}
                       for each, other in comparisons(VARIANTS)]})  # fmt: skip
    not_run = [{"name": "torch.compile fp32, compacted", "reason": "no compiler | here"}]
    check = Check(name="what is timed answers alike", outcome="passed", words="all 40 of 40")
    return made_up("latency", {"cells": cells, "not_run": not_run}, check)


def serving() -> Result:
    step = {"requests": 9, "rows_per_batch": 1.0, "request_ms": 4.0, "queue_ms": 1.0, "input_ms": 0.1,
            "compute_ms": 2.5, "output_ms": 0.4}  # fmt: skip
    load = {"milliseconds": times(8.0), "per_second": 120.0, "answers": 9, "failed": 0, "errors": []}
    more = {"steps": {"rekd_selector": step, "rekd": step}, "equal": 9, "compared": 9, "in_process": load,
            "throughput": {"ratio": 0.9, "low": 0.8, "high": 1.0}}  # fmt: skip
    return made_up("serving", {
        "closed": [{"concurrency": count, **load, **more} for count in (1, 4)],
        "open": [{"rate": rate, "share_of_peak": rate / 120, **load, "late_ms": {"p99": 0.1}} for rate in (60.0, 96.0)],
        "in_process": {"milliseconds": {"served": times(8.0), "in process": times(5.0)},
                       "ratio": {"way": "served", "baseline": "in process", "ratio": 1.6, "low": 1.5, "high": 1.7},
                       "added_ms": {"p50": 3.0, "low": 2.9, "high": 3.1}}})  # fmt: skip


def accuracy(share: float = 0.84, examples: int = 2000) -> Result:
    """Two classes, one of them with a hostile name."""
    curve = {"rates": [0.05, 0.1, 1.0], "realised": [0.05, 0.1, 1.0], "accuracies": [0.8, share, 0.85], "area": 0.83}
    bins = [{"low": low / 10, "high": (low + 1) / 10, "examples": 50, "confidence": low / 10 + 0.05,
             "accuracy": low / 10 + 0.03} for low in range(5, 10)]  # fmt: skip
    one = {"precision": 0.8, "recall": 0.9, "f1": 0.85, "support": 1000, "predicted": 1100}
    return made_up("accuracy", {
        "classification": {"accuracy": share, "macro_f1": share - 0.01,
                           "per_class": {"a|b <i>": one, "positive": one}},
        "rate": {"rate": 0.099},
        "calibration": {"nll": 0.4, "brier": 0.2, "ece": 0.02, "ece_equal_mass": 0.02, "reliability": bins},
        "curve": {"served": {**curve, "note": "it has 32 slots"}, "checkpoint": {**curve, "note": "by PyTorch"}},
        "reference": {"accuracy": 0.841, "source": "metrics.json", "gap_points": 100 * (share - 0.841)},
    }, Check(name="served as trained", outcome="passed", words="the gap is small", value=0.1, limit=0.5),
        examples=examples, precision="fp32")  # fmt: skip


def faithfulness(outcome: str = "failed") -> Result:
    return made_up("faithfulness", {
        "answers": {"accuracy": 0.84, "rate": 0.1}, "structure": {"swap": {"rows": 100, "changed": 0}},
        "judges": {"independent": {"comprehensiveness": {"mean": 0.3, "low": 0.2, "high": 0.4}}}, "known": None,
    }, Check(name="mask alone", outcome=outcome, words="it gains +7.1 points (limit 5)", value=0.071, limit=0.05),
        Check(name="known reasons", outcome="not applicable", words="the data have none"), examples=1000)  # fmt: skip
