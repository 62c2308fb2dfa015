"""Blocks of figures about what was trained."""

from __future__ import annotations

import json

import numpy as np
from _blocks import RESULTS, block, read
from _tables import mean_and_std


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


@block("pairs/few", "pairs/images", "pairs/reviews", "pairs/minilm")
def pairs() -> list[str]:
    shown = {"cls": "plain classifier", "cls_kd": "plain classifier, distilled", "alone": "pair, alone",
             "distilled": "pair, distilled"}  # fmt: skip
    lines = [
        f"| test examples, noise-free, mean over seeds | {' | '.join(shown.values())} | "
        "distilled - alone in points, standard error | distilled pair - distilled classifier |",
        "|---|---|---|---|---|---|---|",
    ]
    few = "2,000 labels; the teacher has seen all"
    for name, data, other in (
        ("few", f"IMDB, {few}", ""), ("few", "the same, the selector a transformer 1 x 64", "_1x64"),
        ("images", f"Fashion-MNIST, {few}", ""), ("reviews", "IMDB, all labels; one seed", ""),
        ("minilm", "IMDB, all labels, predictor MiniLM-L6", ""),
    ):  # fmt: skip
        found = _cells(f"pairs/{name}")
        cells = [cell if cell.startswith("cls") else cell + other for cell in shown]
        lines.append(
            f"| [{data}](../benchmarks/results/pairs/{name}.md) | {' | '.join(_mean(found, cell) for cell in cells)} | "
            f"{_difference(found, cells[3], cells[2])} | {_difference(found, cells[3], 'cls_kd')} |"
        )
    return lines


@block("pairs/")
def pair_times() -> list[str]:
    lines = [
        "| pair | ms of the pair, one text / eight | of its plain classifier | ratio, one / eight | against that "
        "classifier in dynamic int8 | the predictor in int8, too |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in (("few", "predictor 2 x 128"), ("minilm", "predictor MiniLM-L6")):
        timed = read(f"pairs/{name}_times.json")
        for cell, times in timed["pairs"].items():
            one, eight = times["1"], times["8"]
            selector = cell.removeprefix("distilled").removeprefix("_").replace("x", " x ") or "n-grams"
            lines.append(
                f"| selector {selector}, {title} | "
                + " | ".join(" / ".join(f"{batch['milliseconds'][way]['p50']:.2f}" for batch in (one, eight))
                             for way in ("pair", "classifier"))
                + " | " + " | ".join(" / ".join(f"{batch[ratio]['ratio']:.2f}" for batch in (one, eight))
                                     for ratio in ("ratio", "ratio_int8", "ratio_both_int8")) + " |"
            )  # fmt: skip
    return lines


@block("fashion_table/mosaic_2x2", "fashion_table/mosaic_3x3")
def mosaics() -> list[str]:
    lines = [
        "| pair without a teacher, compacted, noise-free | patches kept | of them in the true tile | of the tile's "
        "patches | accuracy | given the tile | reads everything | random patches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tiles in (2, 3):
        found = _cells(name := f"fashion_table/mosaic_{tiles}x{tiles}")
        pairs = [read(f"{name}/mosaic_{seed}.json") for seed in found["mosaic"]]
        truth = {key: np.mean([pair["report"]["truth"][key] for pair in pairs]) for key in ("in_truth", "truth_kept")}
        lines.append(
            f"| [{tiles} x {tiles} tiles](../benchmarks/results/{name}.md) | "
            f"{np.mean([pair['rate'] for pair in pairs]):.1%} | {truth['in_truth']:.1%} | {truth['truth_kept']:.1%} | "
            f"{' | '.join(_mean(found, cell) for cell in ('mosaic', 'given', 'cls', 'random_mask'))} |"
        )
    return lines


@block("short_texts.json")
def short_texts() -> list[str]:
    found = read("short_texts.json")
    cells = found["results"]
    seeds = len(next(iter(cells.values())))
    first = next(iter(cells.values()))[0]
    error = 100 * np.sqrt(first["accuracy"] * (1 - first["accuracy"]) / first["examples"])
    return [
        f"The pair of `short_texts` on the Rotten Tomatoes sentences: {first['examples']} of the test split, mean of "
        f"{seeds} seeds; the standard error of one accuracy is {error:.1f} points ({found['hardware']['device']}, "
        "one core):",
        "",
        "| kept of each text | accuracy | words kept |",
        "|---|---|---|",
        *(
            f"| {name} | {np.mean([run['accuracy'] for run in runs]):.3f} | "
            f"{np.mean([run['rate'] for run in runs]):.1%} |"
            for name, runs in cells.items()
        ),
    ]


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


@block("recorded_teachers.json")
def recorded_teachers() -> list[str]:
    result = read("recorded_teachers.json")["results"]
    lines = ["| student of the demo | labels | test accuracy | losses apart from live, at most |", "|---|---|---|---|"]
    rows = {
        "alone": "no teacher", "live": "the demo's teacher, running along",
        "exact": "its record, scores as they are", "bytes": "its record, a byte a score",
        "other tokenizer": "the record of a teacher with byte-level BPE", "few labels, alone": "no teacher",
        "few labels, quotes": "quotes for two thirds of the texts, a tenth wrong",
        "few labels, quotes on texts without a label": "the same, 8,000 texts without a label, too",
    }  # fmt: skip
    for name, what in rows.items():
        accuracies = [cell["accuracy"] for cell in result[name]]
        spread = f" ± {np.std(accuracies, ddof=1) / len(accuracies) ** 0.5:.3f}" if len(accuracies) > 1 else ""
        apart = result[name][0].get("largest_difference_of_a_loss")
        labels = "2,000" if name.startswith("few") else "10,000"
        far = "" if apart is None else f"{apart:.0e}"
        lines.append(f"| {what} | {labels} | {np.mean(accuracies):.3f}{spread} | {far} |")
    first = result["exact, 1,500 reviews"][0]["largest_difference_of_a_loss"]
    return [
        *lines, "",
        f"Scores as they are: losses of a short training (1,500 reviews, one epoch a stage) are within {first:.0e}",
        "of those beside the live teacher; in the whole one, rounding in the last digits grows.",
    ]  # fmt: skip
