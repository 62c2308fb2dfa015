"""``rekd-export --tune``: the instances and threads that serve fastest on the machine at hand. torch-free.

Candidates share the cores in different ways. Each is served by the embedded Triton, asked by one client and by several,
in turns, as long as a minute in all. Of those whose lone request takes little longer than the quickest one's, the
one that answers most requests a second is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rekd_deploy.bench.results import hardware
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.export.checkpoint import machine
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.repository.reader import read_description
from rekd_deploy.server.program import find_wheel
from rekd_deploy.tuning.trials import Trials, changed, lone_model, random_requests, shares
from rekd_train.errors import ConfigError

MOST_DELAY = 1.1
"""A lone request of the chosen candidate takes at most so many times as long as the quickest one's, by the medians."""
_CLIENTS = (1, 8)
_ROUNDS, _SECONDS = 3, 1.0


def check_tunable(options: ExportOptions) -> None:
    """Raise ConfigError where there is nothing to tune, and errors of ``find_wheel`` where the server is not there."""
    if options.target != "python" or options.on_gpu or options.product is not None:
        raise ConfigError(
            "--tune measures with the embedded Triton, which runs the target python on CPUs alone; fix: leave it out, "
            "and set --threads and --instances by a benchmark of the server that you use"
        )
    if options.instances is not None or options.threads:
        raise ConfigError("--tune chooses the instances and threads; fix: leave out --instances and --threads")
    find_wheel()


def candidates(cores: int) -> dict[str, dict[str, int]]:
    """Settings by name: from one process with all cores to a process for each, 1 to 8 of them."""
    most = min(cores, 8)
    half = max(1, cores // 2)
    pairs = {(1, 1), (1, half), (1, most), (2, 1), (2, half), (most, 1)} if cores > 1 else {(1, 1)}
    return {
        f"{instances} x {threads}": {"instances": instances, "threads": threads} for instances, threads in sorted(pairs)
    }


def tune(
    repository: Path, report: Callable[[str], None] = lambda step: None, *, rounds: int = _ROUNDS,
    seconds: float = _SECONDS,
) -> tuple[dict[str, int], dict[str, Any]]:
    """The best candidate, as fields of ``ServingSettings``, and the figures of all, for the manifest.

    Args:
        repository: of the target python, on CPUs.
        report: called with what is done.

    Raises:
        ServerError: a candidate cannot be served.
        BenchmarkError: none answers every request as it does alone.
    """
    chosen, model = candidates(machine()["cores"]), lone_model(repository)
    requests = random_requests(read_description(repository).preprocessor())
    with Trials() as trials:
        for name, settings in chosen.items():
            report(f"tune: start {name}")
            copy = changed(repository, trials.folder / name.replace(" ", ""), shares(**settings))
            trials.add(name, trials.serve(copy), model, requests)
        report("tune: measure")
        cells = trials.measured(_CLIENTS, rounds, seconds, lambda cell: report(f"tune: {cell['variant']}"))
    best = choice(cells)
    figures = {
        "chosen": best, **chosen[best], "model": model, "hardware": hardware(), "rounds": rounds, "seconds": seconds,
        "candidates": [_kept(cell) for cell in cells],
    }
    return chosen[best], figures


def choice(cells: Sequence[dict[str, Any]]) -> str:
    """The variant that is best by the rule above; BenchmarkError: none answered as it should."""
    few, many = min(cell["clients"] for cell in cells), max(cell["clients"] for cell in cells)
    wrong = {cell["variant"] for cell in cells if cell["failed"] or cell["answers_compared"].get("different")}
    alone, busy = (
        {cell["variant"]: cell for cell in cells if cell["clients"] == count and cell["variant"] not in wrong}
        for count in (few, many)
    )
    if not alone:
        reasons = sorted(set(chain.from_iterable(cell["errors"] for cell in cells))) or ["answers differ under load"]
        what = f"no candidate answers every request as it does alone: {reasons[0]}"
        raise BenchmarkError(f"{what}; fix: leave out --tune")
    quickest = min(cell["milliseconds"]["p50"] for cell in alone.values())
    quick = [name for name, cell in alone.items() if cell["milliseconds"]["p50"] <= MOST_DELAY * quickest]
    return max(quick, key=lambda name: busy[name]["per_second"])


def _kept(cell: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of a cell."""
    times = {name: round(cell["milliseconds"][name], 3) for name in ("p50", "p95", "p99")}
    return {"variant": cell["variant"], "clients": cell["clients"], "per_second": round(cell["per_second"], 1), **times}
