"""What a student of reviews makes of texts unlike its training: short sentences, another source, and no reviews at all.

    python benchmarks/unseen.py runs/demo/student

Sixty sentences with a negation, a contrast or faint praise (``negations.csv``); Rotten Tomatoes; gibberish, other
languages and code (``strangers.csv``): does ``Prediction.doubt`` tell them from test reviews?
"""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from _models import environment

from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import DataConfig
from rekd_train.errors import CheckpointError
from rekd_train.files import write_json

FOLDER = Path(__file__).parent
RESULT = Path("benchmarks/results/unseen.json")

app = application(help="Measure a pair of reviews on other texts.", epilog=examples("unseen.py runs/demo/student"))


@app.command()
def unseen(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A pair trained on IMDB reviews.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
) -> None:
    """Measure and write the figures."""
    from sklearn.metrics import roc_auc_score

    from rekd_deploy.client.render import STRANGE
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.checkpoints.recorded import recorded_config
    from rekd_train.data import load_data

    sixty, strange = (rows_of(FOLDER / name) for name in ("negations.csv", "strangers.csv"))
    pair = load(checkpoint)
    if pair.preprocessor.familiarity is None:
        raise CheckpointError(f"{checkpoint} does not know what texts are usual; fix: train it with this version")
    sentences = load_data(DataConfig(name="rotten_tomatoes")).splits["test"]
    reviews = load_data(recorded_config(checkpoint, None, ()).data).splits["test"]
    texts = {"reviews": list(reviews.texts), "sentences": list(sentences.texts),
             "strangers": [row["text"] for row in strange]}  # fmt: skip
    found = {name: pair.predict(given, batch_size=64) for name, given in texts.items()}
    doubts = {name: np.array([each.doubt for each in answers]) for name, answers in found.items()}
    right: dict[str, list[bool]] = {}
    for row, answer in zip(sixty, pair.predict([row["text"] for row in sixty]), strict=True):
        right.setdefault(row["kind"], []).append(answer.label == row["label"])
    labels = [pair.labels[label] for label in sentences.labels]
    figures = {
        "sixty": {kind: {"right": sum(each), "all": len(each)} for kind, each in right.items()},
        "rotten_tomatoes": {
            "examples": len(labels),
            "accuracy": np.mean([each.label == label for each, label in zip(found["sentences"], labels, strict=True)]),
        },
        "strangers": {
            "texts": len(strange),
            "auroc": {name: roc_auc_score(np.repeat([0, 1], [len(doubts[name]), len(strange)]),
                                          [*doubts[name], *doubts["strangers"]]) for name in ("reviews", "sentences")},
            "called_doubtful": {name: (values > STRANGE).mean() for name, values in doubts.items()},
            "mean_probability": {name: np.mean([each.probability for each in given]) for name, given in found.items()},
        },
    }  # fmt: skip
    command = shlex.join(["python", "benchmarks/unseen.py", *sys.argv[1:]])
    write_json(output, {"command": command, "hardware": environment("cpu"), "figures": plain(figures)})
    typer.echo(f"{output}: {plain(figures)}")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def plain(values):
    """NumPy's numbers as Python's."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    return values.item() if isinstance(values, np.generic) else values


if __name__ == "__main__":
    run(app)
