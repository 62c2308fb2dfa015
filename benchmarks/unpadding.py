"""How much of the work is padding, and which way of batching takes it away? Counted, not timed; needs no GPU.

Lengths are those of real texts; batches are cut as the pipeline cuts them. The work is that of a compacted pair of
MiniLM's size: the operations in its matrix products, as a multiple of what the texts need without padding.

    python benchmarks/unpadding.py
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from _gpu_graphs import BUDGET, MINILM

from rekd_deploy.client.batching import A_BATCH, cuts
from rekd_deploy.contract.signature import Slots
from rekd_deploy.repository.config import ServingSettings
from rekd_train.cli.command import application, examples, print_json, run
from rekd_train.files import write_json
from rekd_train.inputs.policy import SelectionPolicy

RESULT = Path(__file__).parent / "results" / "unpadding.json"
DATA = {
    "reviews, at most 256 tokens": ("imdb", 256), "reviews, at most 512 tokens": ("imdb", 512),
    "sentences": ("rotten_tomatoes", 256),
}  # fmt: skip
SIZES = (1, *ServingSettings.preferred_batch_sizes)
MORE = tuple(sorted({1, 2, 4, *SIZES}))
WAYS = (  # sizes that batches are filled up to, and whether lengths are mixed for it
    ("any size", (), False), ("filled up, each length for itself", SIZES, False), ("filled up", SIZES, True),
    ("filled up, more sizes", MORE, True),
)  # fmt: skip
MOST, CALLS = 32, (8, 32, 64, 256)  # the pipeline's own batch size; texts of a call
Batch = tuple[int, int]  # rows that are computed, and their length

app = application(help="Count what padding costs on real texts.", epilog=examples("unpadding.py"))


@app.command()
def unpadding(output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT) -> None:
    """Count, write the figures and print them."""
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/unpadding.py", *sys.argv[1:]]),
        "model": {"layers": MINILM[0], "width": MINILM[1], "budget": BUDGET, "a_batch_costs_tokens": A_BATCH},
        "data": {name: _counted(*source) for name, source in DATA.items()},
    }  # fmt: skip
    write_json(output, result)
    print_json(result)


def _counted(data: str, limit: int) -> dict[str, Any]:
    lengths = np.random.default_rng(0).permutation(_lengths(data, limit))
    work, padded = _Work(lengths, limit), {}
    steps = {f"multiples of {size}": [*range(size, limit, size), limit] for size in (8, 16, 32)}
    steps["64, 128, 256, 512"] = [size for size in (64, 128, 256, 512) if size <= limit]

    def add(name: str, count: int, cut: Callable[[np.ndarray], list[Batch]]) -> None:
        padded[name] = work.figures([cut(call) for call in np.split(lengths, range(count, len(lengths), count))])

    add("64 at random, to the limit", 64, lambda call: [(len(call), limit)])
    add("64 at random, to the longest", 64, lambda call: [(len(call), int(call.max()))])
    for name, widths in steps.items():
        add(f"all in one call, to {name}", len(lengths), lambda call, widths=widths: _batches(call, widths, 64))
    for count in CALLS:
        for name, *how in WAYS:
            usual = steps["multiples of 32"], MOST, *how
            add(f"calls of {count}, {name}", count, lambda call, usual=usual: _batches(call, *usual))
    return {
        "texts": len(lengths), "tokens_mean": round(float(lengths.mean()), 1),
        "share_cut": round(float((lengths == limit).mean()), 3), "padded": padded,
        "one_behind_the_other": {f"calls of {count}": work.packed(count) for count in (1, *CALLS)},
    }  # fmt: skip


def _lengths(data: str, limit: int) -> np.ndarray:
    from rekd_train.config.run import DataConfig
    from rekd_train.data import load_data
    from rekd_train.inputs.text import TextPreprocessor, TextSettings
    from rekd_train.models.pretrained import minilm_directory

    texts = load_data(DataConfig(name=data, max_length=limit)).splits["test"].texts
    content = (minilm_directory() / "tokenizer.json").read_text(encoding="utf-8")
    encodings = TextPreprocessor(content, TextSettings(limit)).encode(texts)
    return np.array([len(each) for each in encodings])


def _batches(lengths: np.ndarray, widths: list[int], most: int, sizes: Any = (), mixed: bool = False) -> list[Batch]:
    padded = np.array(widths)[np.searchsorted(widths, np.sort(lengths))].tolist()
    found = [(end - start, padded[end - 1]) for start, end in cuts(padded, most, sizes if mixed else ())]
    return [(next((size for size in sizes if size >= count), count), length) for count, length in found]


class _Work:
    """Operations of a pair that reads texts of these lengths."""

    def __init__(self, lengths: np.ndarray, limit: int) -> None:
        policy = SelectionPolicy(bias=None, budget=BUDGET)
        self._slots = Slots.of(policy, policy.capacity(limit - 2))
        self._lengths, self._limit = lengths, limit
        self._needed = [sum(map(step, lengths.tolist())) for step in (self.selector, self.predictor)]

    def selector(self, length: int) -> float:
        """Of a text in its row; projections and the two layers behind, then queries by keys and weights by values."""
        layers, width, _ = MINILM
        return layers * (2.0 * length * (4 + 2 * 4) * width**2 + 4.0 * length**2 * width)

    def predictor(self, length: int) -> float:
        """[CLS] and K slots."""
        return self.selector(1 + self._slots.at(length))

    def figures(self, calls: list[list[Batch]]) -> dict[str, float]:
        batches = [batch for call in calls for batch in call]
        done = [sum(rows * step(length) for rows, length in batches) for step in (self.selector, self.predictor)]
        found = {
            "batches_a_call": len(batches) / len(calls),
            "padded_share": 1 - self._lengths.sum() / sum(rows * length for rows, length in batches),
            "selector": done[0] / self._needed[0], "predictor": done[1] / self._needed[1],
            "pair": sum(done) / sum(self._needed),
        }  # fmt: skip
        return {name: round(float(value), 3) for name, value in found.items()}

    def packed(self, count: int) -> dict[str, float]:
        """The selector on the texts of a call one behind the other: in rows of the limit, and in one sequence."""
        calls = np.split(self._lengths, range(count, len(self._lengths), count))
        sums = [int(call.sum()) for call in calls]
        return {
            "rows_of_the_limit": round(sum(map(self._rows, calls)) * self.selector(self._limit) / self._needed[0], 3),
            "one_sequence": round(sum(map(self.selector, sums)) / self._needed[0], 3),
            "one_sequence_scores_mb": round(float(np.mean(np.square(sums))) * MINILM[2] * 4 / 1e6, 1),
        }

    def _rows(self, lengths: np.ndarray) -> int:
        """How many rows hold these texts, each put where the least is left."""
        left: list[int] = []
        for length in sorted(lengths, reverse=True):
            if max(left, default=0) < length:
                left.append(self._limit)
            left[min((room, place) for place, room in enumerate(left) if room >= length)[1]] -= length
        return len(left)


if __name__ == "__main__":
    run(app)
