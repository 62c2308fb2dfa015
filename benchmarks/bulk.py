"""Rows a second of examples/bulk.py: one plain process against Ray Data, on the reviews of IMDB.

    python benchmarks/bulk.py runs/demo_repository --output benchmarks/results/bulk.json

Needs ray (pip install 'ray[data]'). Start of the processes included and left out; the two ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pyarrow
from pyarrow import parquet

from rekd_deploy.bench.results import hardware, versions
from rekd_train.config.run import run_config
from rekd_train.data import load_data

WAYS = {"plain": ["--plain"], "ray": []}


def seconds(repository: Path, rows: pyarrow.Table, files: int, way: str) -> float:
    """How long the example takes for these rows in so many files."""
    with tempfile.TemporaryDirectory() as folder:
        source, size = Path(folder, "in"), -(-len(rows) // files)
        source.mkdir()
        for number in range(files):
            parquet.write_table(rows.slice(number * size, size), source / f"{number}.parquet")
        command = [sys.executable, ROOT / "examples" / "bulk.py", repository, source, Path(folder, "out"), *WAYS[way]]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        spent = time.perf_counter() - start
        answers = parquet.read_table(Path(folder, "out"))
        if len(answers) != len(rows) or answers["error"].null_count != len(rows):
            raise SystemExit(f"error: {len(answers)} answers to {len(rows)} rows, or some with an error")
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--beside", default="nothing else", help="what else ran on the machine")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    texts = list(load_data(run_config("demo_student").data).splits["train"].items)[: given.rows]
    table, few = pyarrow.table({"text": texts}), pyarrow.table({"text": texts[:8]})
    found: dict[str, dict[str, list[float]]] = {way: {"whole": [], "start": []} for way in WAYS}
    for _ in range(given.rounds):
        for way, spent in found.items():
            spent["whole"].append(seconds(given.repository, table, 2, way))
            spent["start"].append(seconds(given.repository, few, 1, way))
    ways = {
        way: {"seconds": spent["whole"], "seconds_of_eight_rows": spent["start"],
              "rows_per_second": len(texts) / min(spent["whole"]),
              "rows_per_second_without_the_start": len(texts) / (min(spent["whole"]) - min(spent["start"]))}
        for way, spent in found.items()
    }  # fmt: skip
    command = (f"python benchmarks/bulk.py runs/demo_repository --rows {given.rows} --rounds {given.rounds} "
               f'--beside "{given.beside}" --output benchmarks/results/bulk.json')  # fmt: skip
    result = {"command": command, "hardware": hardware(), "versions": versions() | {"ray": version("ray")},
              "beside": given.beside, "load": os.getloadavg(), "rows": len(texts), "ways": ways}  # fmt: skip
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
