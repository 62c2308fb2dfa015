"""How much memory many short texts take: loaded, tokenised, trained on; from a table and from a data set on the disk.

The texts are made of words of the Rotten Tomatoes sentences. Each source is a process of its own.

    python benchmarks/hugging_face_memory.py --texts 300000
    python benchmarks/hugging_face_memory.py --texts 1000000 --epochs 0.02    # with training on 2 % of them
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from rekd_train.cli.command import application, examples, run

app = application(help="Measure the memory of loading texts.", epilog=examples("hugging_face_memory.py --texts 300000"))


def make(count: int, folder: Path) -> None:
    """The same texts as ``saved``, a data set on the disk, and as ``table.parquet``."""
    import datasets
    import numpy as np

    from rekd_train.config.run import DataConfig
    from rekd_train.data import load_data

    sentences = load_data(DataConfig(name="rotten_tomatoes")).splits["train"].texts
    words = np.array(" ".join(sentences).split())
    generator = np.random.default_rng(0)

    def rows():
        for number in range(count):
            chosen = generator.integers(0, len(words), size=generator.integers(15, 31))
            yield {"text": " ".join(words[chosen]), "label": number % 2}

    made = datasets.Dataset.from_generator(rows, cache_dir=str(folder / "cache"))
    made.save_to_disk(folder / "saved")
    made.to_parquet(folder / "table.parquet")


@app.command()
def memory(
    texts: Annotated[int, typer.Option(min=1000, help="How many.")] = 300_000,
    epochs: Annotated[float, typer.Option(min=0, help="Train, too: epochs of each stage.")] = 0.0,
    source: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a line of JSON for each source, in MB; ``anonymous``: without mapped files, which the system takes back."""
    if not source:
        with tempfile.TemporaryDirectory() as temporary:
            make(texts, Path(temporary))
            for name in ("hf", "table"):
                arguments = ["--texts", str(texts), "--epochs", str(epochs), "--source", name, "--folder", temporary]
                subprocess.run([sys.executable, __file__, *arguments], check=True)
        return
    from rekd_train.config.run import run_config
    from rekd_train.data import encode_splits, load_data
    from rekd_train.models.families import fresh_pair, preprocessor_for
    from rekd_train.training.stages import fit

    path = folder / ("saved/data-00000-of-00001.arrow" if source == "hf" else "table.parquet")
    settings = [f"data.name={source}", f"data.path={path.parent if source == 'hf' else path}"]
    settings += ["data.train_examples=none", "data.dev_examples=2000", "data.test_examples=2000"]
    settings += [f"stages.{stage}_epochs={epochs}" for stage in ("classifier", "rationale", "compact")]
    config = run_config("equal_student", settings)
    preprocessor = preprocessor_for(config)
    preprocessor.encode(["warm"])
    if source == "hf":
        import datasets  # noqa: F401, so that the start holds what is imported
    start, begun = _peak(), time.perf_counter()
    data = load_data(config.data)
    loaded = _peak()
    splits = encode_splits(data, preprocessor, config.data)
    tokenised, seconds = _peak(), round(time.perf_counter() - begun)
    if epochs:
        fit(config, fresh_pair(config, preprocessor, data.label_names), splits["train"], splits["dev"])
    tokens = sum(int(split.lengths.sum()) for split in splits.values())
    typer.echo(json.dumps({
        "source": source, "texts": texts, "file": path.stat().st_size // 10**6, "start": start,
        "peak, loaded": loaded, "peak, tokenised": tokenised, "peak, trained": _peak(), "anonymous": _anonymous(),
        "ids": 4 * tokens // 10**6, "seconds": seconds,
    }))  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1000


if __name__ == "__main__":
    run(app)
