"""The text of each block of figures in README and docs, made of the committed results alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.significance import mean_and_std

RESULTS = Path(__file__).resolve().parent / "results"
Block = Callable[[], list[str]]
BLOCKS: dict[str, Block] = {}
_SOURCES: dict[str, tuple[str, ...]] = {}
_MODELS = {
    "classifier": "plain classifier of the student's size, reads everything",
    "teacher": "teacher pair",
    "student_without_teacher": "student pair, without a teacher",
    "student": "student pair, distilled",
}


def block(*sources: str) -> Callable[[Block], Block]:
    """Register a block by the name of its function; ``sources`` are files or folders of ``RESULTS``."""

    def register(function: Block) -> Block:
        BLOCKS[function.__name__] = function
        _SOURCES[function.__name__] = sources
        return function

    return register


def sources_of(name: str) -> list[str]:
    """The results of a block, from the project's root.

    Raises:
        KeyError: there is no such block.
    """
    return [f"benchmarks/results/{source}" for source in _SOURCES[name]]


# the README


@block("demo.json", "demo_images.json")
def demo() -> list[str]:
    lines = []
    for name, kept, data in (
        ("demo", "words", "held-out IMDB reviews"), ("demo_images", "patches", "test images"),
    ):  # fmt: skip
        examples = _read(f"{name}/accuracy_fp32.json")["settings"]["examples"]
        result = _read(f"{name}.json")
        report, query, hardware = result["report"], result["report"]["query"], result["hardware"]
        minutes = sum(report["seconds"].values()) / 60
        lines += [
            *([""] if lines else []),
            f"`{result['command']}` on {hardware['cores']} cores ({hardware['processor']}), on {examples:,} {data},",
            f"rationales noise-free, the pairs compacted; {minutes:.1f} minutes for the whole chain:",
            "",
            f"| model | accuracy | {kept} kept |",
            "|---|---|---|",
            *(
                f"| {what} | {report[model]['accuracy']:.3f} | {report[model]['rate']:.1%} |"
                for model, what in _MODELS.items()
            ),
            "",
            f"{query['n']} of them through Triton, one at a time: {query['p50_ms']:.1f} ms a query (median, preparing",
            f"included); {query['agree_pipeline']} answers equal to the pipeline's in process,",
            f"{query['agree_torch']} to PyTorch's (label, {kept}, probabilities within 1e-4).",
        ]
    return lines


@block("demo/", "demo_images/", "minilm_serving.json")
def evidence() -> list[str]:
    lines = [
        "| | demo's student, reviews | demo's student, images |",
        "|---|---|---|",
    ]
    rows: dict[str, list[str]] = {}
    for name in ("demo", "demo_images"):
        for title, value in _evidence(name).items():
            rows.setdefault(title, []).append(value)
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in rows.items()]
    return [
        *lines,
        "",
        "Each with its page: [reviews](benchmarks/results/demo/report.md), "
        "[images](benchmarks/results/demo_images/report.md).",
        *_minilm_under_load(),
    ]


def _minilm_under_load() -> list[str]:
    serving = _read("minilm_serving.json")
    load = max(serving["figures"]["closed"], key=lambda load: load["concurrency"])
    added, settings = serving["figures"]["in_process"]["added_ms"]["p50"], serving["settings"]
    return [
        f"A pair of MiniLM-L6's size, {load['concurrency']} clients for {settings['seconds']:.0f} s, mixed lengths, "
        f"batches of {_list(settings['batches'])}:",
        f"{load['compared']:,} texts answered, {load['compared'] - load['equal']} of them other than by the pipeline, "
        f"{load['failed']} failures;",
        f"{load['throughput']['ratio']:.2f} of the throughput in process; one question at a time takes {added:.1f} ms "
        "longer than in process",
        f"([figures](benchmarks/results/minilm_serving.json)). Checks that fail: {_failed(serving)}.",
    ]


def _failed(result: dict[str, Any]) -> str:
    return ", ".join(check["name"] for check in result["checks"] if check["outcome"] == "failed") or "none"


def _evidence(name: str) -> dict[str, str]:
    """What the README says of one student, from its folder of results."""
    accuracy = {each: _read(f"{name}/accuracy_{each}.json") for each in ("fp32", "fp16", "int8")}
    served = {each: result["figures"]["classification"]["accuracy"] for each, result in accuracy.items()}
    reference = accuracy["fp32"]["figures"]["reference"]["accuracy"]
    faith, serving = _read(f"{name}/faithfulness.json"), _read(f"{name}/serving.json")
    judge = faith["figures"]["judges"]["independent"]["accuracy"]
    times = serving["figures"]["in_process"]["milliseconds"]
    return {
        "accuracy of the checkpoint": f"{reference:.2%}",
        "served, fp32 / fp16 / int8": " / ".join(f"{value:.2%}" for value in served.values()),
        "an independent judge given the rationale / as many random features / everything":
            " / ".join(f"{judge[kind]:.1%}" for kind in ("rationale", "random", "full")),
        "checks of faithfulness that fail": _failed(faith),
        "one question through Triton / in process": " / ".join(
            f"{times[way]['p50']:.1f} ms" for way in ("served", "in process")
        ),
    }  # fmt: skip


# docs/export.md, docs/precision.md


@block("cpu_latency.json")
def cpu_cost() -> list[str]:
    result = _read("cpu_latency.json")
    settings, hardware = result["settings"], result["hardware"]
    zeroed, half = _ratios(result, "compact", "zero"), _ratios(result, "half compact", "classifier")
    eager = [*_ratios(result, "compact", "eager zero"), *_ratios(result, "compact int8", "eager zero")]
    return [
        f"On {hardware['cores']} cores ({hardware['device']}), texts of {settings['length']} tokens, K = "
        f"{settings['kept']}, batches of {_batches(result)}, {_sizes(result)}: a compacted pair takes",
        f"{_range(zeroed)} of the time of the same pair that blanks words, with a selector of half the layers",
        f"{_range(half)} of the time of one plain classifier, and {_range(eager)} of what PyTorch takes for the pair",
        "that blanks ([table](../benchmarks/results/cpu_latency.md)).",
    ]


@block("cpu_latency.json")
def int8_time() -> list[str]:
    result = _read("cpu_latency.json")
    found = [*_ratios(result, "compact int8", "compact"), *_ratios(result, "classifier int8", "classifier")]
    return [
        f"int8 against fp32, both fused, end to end on {result['hardware']['cores']} cores "
        f"({result['hardware']['device']}):",
        f"{_range(found)} of the time at batches of {_batches(result)}, {_sizes(result)}",
        "([table](../benchmarks/results/cpu_latency.md)). What stays float32, attention proper and the norms, sets the",
        "limit.",
    ]


@block("demo/precisions.json", "demo/accuracy_fp32.json", "demo/accuracy_fp16.json", "demo/accuracy_int8.json")
def precisions() -> list[str]:
    found = _read("demo/precisions.json")["precisions"]
    positions = found["fp32"]["masks"]["positions"]
    lines = [
        f"| | flipped of {positions:,} | Jaccard | same class | accuracy when served | largest score difference |",
        "|---|---|---|---|---|---|",
    ]
    for precision, parity in found.items():
        masks = parity["masks"]
        served = _read(f"demo/accuracy_{precision}.json")["figures"]["classification"]["accuracy"]
        lines.append(
            f"| {precision} | {masks['flipped']:,} | {masks['jaccard']:.4f} | {parity['class_agreement']:.1%} | "
            f"{served:.4f} | {parity['score_difference']:.2g} |"
        )
    return lines


@block("demo/latency.json")
def length() -> list[str]:
    result = _read("demo/latency.json")
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


# docs/method.md


@block("imdb_table/cpu", "imdb_table/few", "fashion_table/fashion")
def distillation() -> list[str]:
    imdb, few, fashion = (_cells(name) for name in ("imdb_table/cpu", "imdb_table/few", "fashion_table/fashion"))
    return [
        "| compacted pairs, noise-free, mean over seeds | alone (RE) | distilled (REKD) | difference in points, "
        "standard error | teacher's pair | plain classifier | random features |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {title} | {_mean(found, 're_compact')} | {_mean(found, 'rekd_compact')} | "
            f"{_difference(found, 'rekd_compact', 're_compact')} | {_mean(found, 'teacher')} | {_mean(found, 'cls')} | "
            f"{_mean(found, 'random_mask')} |"
            for title, found in (
                ("[IMDB, 10,000 reviews](../benchmarks/results/imdb_table/cpu.md)", imdb),
                ("[IMDB, 2,000 reviews; the teacher's 10,000](../benchmarks/results/imdb_table/few.md)", few),
                ("[Fashion-MNIST](../benchmarks/results/fashion_table/fashion.md)", fashion),
            )
        ),
    ]


@block("fashion_table/mosaic_2x2", "fashion_table/mosaic_3x3")
def mosaics() -> list[str]:
    lines = [
        "| pair without a teacher, compacted, noise-free | patches kept | of them in the true tile | of the tile's "
        "patches | accuracy | given the tile | reads everything | random patches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tiles in (2, 3):
        found = _cells(name := f"fashion_table/mosaic_{tiles}x{tiles}")
        pairs = [_read(f"{name}/mosaic_{seed}.json") for seed in found["mosaic"]]
        truth = {key: np.mean([pair["report"]["truth"][key] for pair in pairs]) for key in ("in_truth", "truth_kept")}
        lines.append(
            f"| [{tiles} x {tiles} tiles](../benchmarks/results/{name}.md) | "
            f"{np.mean([pair['rate'] for pair in pairs]):.1%} | {truth['in_truth']:.1%} | {truth['truth_kept']:.1%} | "
            f"{' | '.join(_mean(found, cell) for cell in ('mosaic', 'given', 'cls', 'random_mask'))} |"
        )
    return lines


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _cells(folder: str) -> dict[str, dict[int, float]]:
    """Accuracy by cell and seed."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((RESULTS / folder).glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(cell["cell"], {})[cell["seed"]] = cell["accuracy"]
    return found


def _mean(found: dict[str, dict[int, float]], name: str) -> str:
    values = list(found.get(name, {}).values())
    return f"{np.mean(values):.3f}" if values else "not run"


def _difference(found: dict[str, dict[int, float]], better: str, other: str) -> str:
    seeds = sorted(found.get(better, {}).keys() & found.get(other, {}).keys())
    if not seeds:
        return "not run"
    mean, std = mean_and_std([100 * (found[better][seed] - found[other][seed]) for seed in seeds])
    return f"{mean:+.2f} ± {std / np.sqrt(len(seeds)):.2f}" if len(seeds) > 1 else f"{mean:+.2f}, one seed"


def _ratios(result: dict[str, Any], way: str, baseline: str) -> list[float]:
    return [
        ratio["ratio"] for cell in result["cells"] for ratio in cell["ratios"]
        if (ratio["way"], ratio["baseline"]) == (way, baseline)
    ]  # fmt: skip


def _batches(result: dict[str, Any]) -> str:
    return _list(sorted({cell["batch"] for cell in result["cells"]}))


def _sizes(result: dict[str, Any]) -> str:
    return "sizes " + ", ".join(dict.fromkeys(cell["size"] for cell in result["cells"]))


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}" if len(values) > 1 else str(values[0])
