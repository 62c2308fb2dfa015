"""What the figures of a served model must respect. torch-free."""

from __future__ import annotations

from typing import Any

from rekd_deploy.bench.results import Check

_LATE = 0.25
"""Share of the median latency that requests of an open loop may be sent late, before its figures are doubted."""
LEAST_THROUGHPUT = 0.85
"""Served in units of in process, with the most askers."""
MOST_ADDED_MS = 2.5
"""What the server adds to one question at a time, median."""
SMALL_MS = 10.0
"""A model that answers faster in process is too small for the share: the way of a request outweighs its answer."""


def serving_checks(figures: dict[str, Any], *, given: bool) -> list[Check]:
    """Checks of the figures of ``serving``.

    Args:
        given: the server was given, and may be another machine's: its speed is not held against this one's.
    """
    loads = [*figures["closed"], *figures["open"]]
    return [_answered(loads), _equal(loads), *_costs(figures, given), _on_time(figures["open"])]


def _answered(loads: list[dict[str, Any]]) -> Check:
    failed, answers = sum(load["failed"] for load in loads), sum(load["answers"] for load in loads)
    note = next((f": {load['errors'][0]}" for load in loads if load["errors"]), "")
    return Check(
        name="every request was answered", outcome="failed" if failed or not answers else "passed",
        words=f"{answers:,} answers, {failed:,} failures{note}", value=float(failed), limit=0.0,
    )  # fmt: skip


def _equal(loads: list[dict[str, Any]]) -> Check:
    equal, compared = (sum(load.get(key, 0) for load in loads) for key in ("equal", "compared"))
    return Check(
        name="served answers are the pipeline's", outcome="passed" if compared and equal == compared else "failed",
        words=f"{equal:,} of {compared:,} have the label, the rationale and, within 1e-4, the probabilities that the "
        "pipeline gives in process",
        value=float(compared - equal), limit=0.0,
    )  # fmt: skip


def _costs(figures: dict[str, Any], given: bool) -> list[Check]:
    names = "throughput beside the pipeline's", "what serving adds to one question"
    load = max(figures["closed"], key=lambda load: load["concurrency"])
    ratio = load["throughput"]
    if given or ratio is None:
        short = "a turn was over before an answer was counted in process; fix: longer --seconds or fewer --turns"
        why = "the server was given: it may be another machine" if given else short
        return [Check(name=name, outcome="not applicable", words=why) for name in names]
    added, alone = figures["in_process"]["added_ms"], figures["in_process"]["milliseconds"]["in process"]["p50"]
    fair = "failed" if alone >= SMALL_MS else "not applicable"
    return [
        Check(
            name=names[0], outcome="passed" if ratio["ratio"] >= LEAST_THROUGHPUT else fair,
            words=f"with {load['concurrency']} askers {load['per_second']:.1f} requests a second, "
            f"{load['in_process']['per_second']:.1f} in process: {ratio['ratio']:.2f} of it "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})",
            value=ratio["ratio"], limit=LEAST_THROUGHPUT,
        ),
        Check(
            name=names[1], outcome="passed" if added["p50"] <= MOST_ADDED_MS else "failed",
            words=f"{added['p50']:.2f} ms more than in process ({added['low']:.2f} to {added['high']:.2f})",
            value=added["p50"], limit=MOST_ADDED_MS,
        ),
    ]  # fmt: skip


def _on_time(opened: list[dict[str, Any]]) -> Check:
    if not opened:
        why = "nobody asked at moments of their own: no rates, or no answer within a turn of the closed loop"
        return Check(name="arrivals were on time", outcome="not applicable", words=why)
    late = [
        load for load in opened
        if load["milliseconds"] and load["late_ms"]["p99"] > _LATE * load["milliseconds"]["p50"]
    ]  # fmt: skip
    return Check(
        name="arrivals were on time", outcome="not applicable" if late else "passed",
        words="; ".join(
            f"at {load['rate']:.0f} a second 1 % of the requests were sent {load['late_ms']['p99']:.0f} ms late or "
            "more: the machine was too busy to ask so much, and the latency is that of both"
            for load in late
        ) or f"requests were sent within {_LATE:.0%} of the median latency of their moments",
    )  # fmt: skip
