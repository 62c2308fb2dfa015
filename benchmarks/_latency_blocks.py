"""Blocks of figures about the time that answers take."""

from __future__ import annotations

import math
from typing import Any

from _blocks import block, listed, ranged, read


@block("cpu_latency.json", "cpu_latency_amd.json")
def cpu_cost() -> list[str]:
    settings = read("cpu_latency.json")["settings"]
    return [
        f"Texts of {settings['length']} tokens, K = {settings['kept']}, {_sizes(read('cpu_latency.json'))}, lowest to "
        "highest ratio of times:",
        *_both_processors(
            {"compacted / blanking words": "compact:zero",
             "compacted, a selector of half the layers / one plain classifier": "half compact:classifier",
             "compacted / blanking in PyTorch": "compact:eager zero",
             "compacted in int8 / blanking in PyTorch": "compact int8:eager zero"}
        ),
    ]  # fmt: skip


@block("cpu_latency.json", "cpu_latency_amd.json")
def int8_time() -> list[str]:
    return [
        "int8 against fp32, both fused, end to end, lowest to highest ratio of times:",
        *_both_processors({"compacted pair": "compact int8:compact", "plain classifier": "classifier int8:classifier"}),
        "",
        "What stays float32, attention proper and the norms, sets the limit.",
    ]


def _both_processors(rows: dict[str, str]) -> list[str]:
    results = {name: read(f"{name}.json") for name in ("cpu_latency", "cpu_latency_amd")}
    heads = (
        f"[{result['hardware']['device']}, {result['hardware']['cores']} cores](../benchmarks/results/{name}.md)"
        for name, result in results.items()
    )
    return [
        "", f"| batches of {_batches(results['cpu_latency'])} | {' | '.join(heads)} |", "|---|---|---|",
        *(f"| {title} | {' | '.join(ranged(_ratios(result, *pair.split(':'))) for result in results.values())} |"
          for title, pair in rows.items()),
    ]  # fmt: skip


@block("demo/latency.json")
def length() -> list[str]:
    result = read("demo/latency.json")
    cells = {(cell["batch"], cell["length"]): cell for cell in result["figures"]["cells"]}
    batches, lengths = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    first = next(way["name"] for way in cells[batches[0], lengths[-1]]["ways"])

    def median(batch: int, length: int) -> float:
        ways = cells[batch, length]["ways"]
        return next(way["milliseconds"]["p50"] for way in ways if way["name"] == first)

    return [
        f"The demo's student ({first}), {result['hardware']['cores']} cores ({result['hardware']['processor']}), "
        "milliseconds of a batch:",
        "",
        f"| tokens | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"|---|{'---|' * len(batches)}",
        *(
            f"| {length} | {' | '.join(f'{median(batch, length):.2f}' for batch in batches)} |"
            for length in lengths
        ),
    ]


_VARIANTS = {
    "before": "tensors: before, `rekd`", "now, two steps": "now, `rekd`", "now": "now, `rekd_single`",
    "before, text": "text: before, `rekd_text`", "now, text": "now, `rekd_text`",
}  # fmt: skip


@block("serving_defaults.json")
def serving_defaults() -> list[str]:
    return _serving(read("serving_defaults.json"), "A demo's student of reviews")


@block("serving_since.json")
def serving_since() -> list[str]:
    return _serving(read("serving_since.json"), "A pair of two equal networks (the preset equal_student)")


def _serving(result: dict[str, Any], pair: str) -> list[str]:
    cells = {(cell["variant"], cell["clients"]): cell for cell in result["cells"]}
    clients, settings, machine = sorted({count for _, count in cells}), result["settings"], result["hardware"]
    equal, different = (
        sum(cell["answers_compared"].get(word, 0) for cell in cells.values()) for word in ("equal", "different")
    )
    different += sum(result["answers_other_than_before"].values())

    def shown(name: str, count: int) -> str:
        found = cells[name, count]
        times = " / ".join(f"{found['milliseconds'][level]:.1f}" for level in ("p50", "p95", "p99"))
        return f"{found['per_second']:,.0f}; {times}"

    def gain(now: str, before: str) -> str:
        if (before, clients[0]) not in cells:
            return "not served before"
        pairs = [[cells[name, count]["per_second"] for name in (now, before)] for count in clients]
        return listed([f"{ours / theirs:.2f}" for ours, theirs in pairs])

    return [
        f"{pair} on {machine['cores']} cores ({machine['processor']}), which the clients share, "
        f"{settings['rounds']} turns of {settings['seconds']:g} s; requests a second, of one text each; milliseconds "
        f"p50 / p95 / p99. {equal:,} answers compared, {different} of them other than alone, or than before; "
        f"{sum(cell['failed'] for cell in cells.values())} failures. Not run: the target onnxruntime, which has the "
        "same threads and instances; the embedded Triton lacks its backend.",
        "",
        f"| | {' | '.join(f'{count} clients' if count > 1 else 'one client' for count in clients)} |",
        f"|---|{'---|' * len(clients)}",
        *(
            f"| {title} | {' | '.join(shown(name, count) for count in clients)} |"
            for name, title in _VARIANTS.items() if (name, clients[0]) in cells
        ),
        "",
        f"Requests a second now in units of before, {listed(clients)} clients: tensors {gain('now', 'before')}, "
        f"text {gain('now, text', 'before, text')}.",
    ]  # fmt: skip


@block("bulk.json")
def bulk() -> list[str]:
    result = read("bulk.json")
    machine, ways = result["hardware"], result["ways"]
    rows = {"plain": "one process, `--plain`", "ray": "Ray Data"}
    return [
        f"{result['rows']:,} reviews, the demo's student, {machine['cores']} cores ({machine['processor']}), best of "
        f"{len(ways['plain']['seconds'])} turns; beside it ran: {result['beside']}.",
        "",
        "| `examples/bulk.py` | rows a second | once started | seconds for eight rows |",
        "|---|---|---|---|",
        *(f"| {title} | {ways[way]['rows_per_second']:.0f} | {ways[way]['rows_per_second_without_the_start']:.0f} | "
          f"{min(ways[way]['seconds_of_eight_rows']):.1f} |" for way, title in rows.items()),
    ]  # fmt: skip


WANTED = 1000  # requests a second
SPARE = 0.7  # of what a replica can do, so that requests need not wait when there are a few more of them


@block("serving_defaults.json", "minilm_serving.json")
def capacity() -> list[str]:
    result, minilm = read("serving_defaults.json"), read("minilm_serving.json")
    machine, [large] = result["hardware"], minilm["figures"]["closed"]
    found = {}
    for way, title in (("now", "the demo's student, tensors"), ("now, text", "the demo's student, text (`rekd_text`)")):
        best = max((cell for cell in result["cells"] if cell["variant"] == way), key=lambda cell: cell["per_second"])
        found[title] = best["clients"], best["per_second"], best["milliseconds"]["p99"]
    if minilm["hardware"] != machine:
        raise ValueError("the figures of one table are of one machine")
    texts = large["compared"] / minilm["settings"]["seconds"]
    found["a pair of MiniLM-L6's size, tensors"] = large["concurrency"], texts, large["milliseconds"]["p99"]
    rows = []
    for title, (clients, per_second, slowest) in found.items():
        core = per_second / machine["cores"]
        replicas = math.ceil(WANTED / (SPARE * 4 * core))
        rows.append(f"| {title} | {clients} | {core:,.0f} | {slowest:,.0f} ms | {replicas} |")
    return [
        f"{machine['cores']} cores ({machine['processor']}), which the clients share:",
        "",
        f"| reviews | clients | a second and core | p99 | replicas of 4 cores for {WANTED:,} a second |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Replicas: {WANTED:,} / ({SPARE:g} x 4 x a second and core), rounded up; that 4 cores do twice as much as "
        "2 is assumed.",
    ]


def _ratios(result: dict[str, Any], way: str, baseline: str) -> list[float]:
    return [
        ratio["ratio"] for cell in result["cells"] for ratio in cell["ratios"]
        if (ratio["way"], ratio["baseline"]) == (way, baseline)
    ]  # fmt: skip


def _batches(result: dict[str, Any]) -> str:
    return listed(sorted({cell["batch"] for cell in result["cells"]}))


def _sizes(result: dict[str, Any]) -> str:
    return "sizes " + ", ".join(dict.fromkeys(cell["size"] for cell in result["cells"]))
