"""Many texts: Parquet in, Parquet with labels, probabilities and the words that decided out, by Ray Data.

    pip install 'ray[data]'
    python examples/bulk.py runs/demo/model_repository reviews answers       # reviews/*.parquet with a column text
    python examples/bulk.py runs/demo/model_repository reviews answers --plain    # in one process, without Ray

Ray uses all cores, with RAY_ADDRESS those of a cluster that shares the folders. Each file becomes a folder of its name
in answers, whole or not at all: a second run does what is missing. A text that cannot be answered has the reason in the
column error; a file that cannot is named, and the others are done.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rekd_deploy import Pipeline
from rekd_train.errors import FaultyItemsError

BATCH = 256
SPAN = pa.struct({"start": pa.int64(), "end": pa.int64(), "text": pa.string(), "score": pa.float64()})
ANSWER = {"label": pa.string(), "probability": pa.float64(), "probabilities": pa.map_(pa.string(), pa.float64()),
          "spans": pa.list_(SPAN), "error": pa.string()}  # fmt: skip
OPENED: dict[str, Pipeline] = {}  # in each process that answers


def answered(table: pa.Table, repository: str, column: str, threads: int | None = None) -> pa.Table:
    """The rows with the columns of ``ANSWER`` beside their own."""
    texts, errors = table[column].to_pylist(), {}
    model = OPENED[repository] = OPENED.get(repository) or Pipeline(repository, threads=threads)
    try:
        predictions = model.predict(texts)
    except FaultyItemsError as error:
        errors = {number: fault.what for number, fault in error.faults.items()}
        sound = [text for number, text in enumerate(texts) if number not in errors]
        predictions = model.predict(sound) if sound else []
    found = iter(predictions)
    rows = [_row(None if number in errors else next(found), errors.get(number)) for number in range(len(texts))]
    for name, kind in ANSWER.items():
        table = table.append_column(name, pa.array([row[name] for row in rows], kind))
    return table


def _row(prediction, error) -> dict:
    if prediction is None:
        return dict.fromkeys(ANSWER) | {"error": error}
    spans = [{name: getattr(span, name) for name in ("start", "end", "text", "score")} for span in prediction.rationale]
    return {"label": prediction.label, "probability": prediction.probability,
            "probabilities": list(prediction.probabilities.items()), "spans": spans, "error": None}  # fmt: skip


def plainly(source: Path, output: Path, repository: str, column: str) -> None:
    """One file in this process, a batch at a time."""
    output.mkdir()
    with parquet.ParquetFile(source) as file, parquet.ParquetWriter(output / "0.parquet", _schema(file)) as writer:
        for batch in file.iter_batches(BATCH):
            writer.write_table(answered(pa.Table.from_batches([batch]), repository, column))


def _schema(file: parquet.ParquetFile) -> pa.Schema:
    return pa.schema([*file.schema_arrow, *(pa.field(*each) for each in ANSWER.items())])


def by_ray(source: Path, output: Path, repository: str, column: str) -> None:
    """One file by every core that Ray has."""
    import ray

    ray.init(ignore_reinit_error=True, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel("ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    settings = {"repository": repository, "column": column, "threads": 1}
    rows = ray.data.read_parquet(str(source)).repartition(2 * int(ray.cluster_resources()["CPU"]))
    rows = rows.map_batches(answered, batch_size=BATCH, batch_format="pyarrow", fn_kwargs=settings)
    rows.write_parquet(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="what rekd-export wrote")
    parser.add_argument("source", type=Path, help="a folder of Parquet files")
    parser.add_argument("output", type=Path, help="a folder for the answers")
    parser.add_argument("--column", default="text")
    parser.add_argument("--plain", action="store_true", help="in this process, without Ray")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    repository, failed, run = str(Path(given.repository).resolve()), 0, plainly if given.plain else by_ray
    for source in sorted(given.source.resolve().glob("*.parquet")):
        target = given.output.resolve() / source.name
        unfinished = target.with_suffix(".unfinished")
        if target.exists():
            print(f"{source.name}: done before")
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            run(source, unfinished, repository, given.column)
        except ImportError as error:
            sys.exit(f"error: {error}; fix: pip install 'ray[data]', or --plain")
        except Exception as error:  # whatever is wrong with one file, the others are to be done
            failed += 1
            print(f"{source.name}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            unfinished.rename(target)
            print(f"{source.name}: done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
