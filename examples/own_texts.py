"""Your own texts: a CSV with the columns text and label becomes a pair that says which words decided.

    python examples/own_texts.py my.csv --output runs/mine
    python examples/own_texts.py                                   # without a CSV: 600 messages to a shop, made up

Every setting can be changed: --set stages.classifier_epochs=3. What they mean: docs/settings.md.
"""

import argparse
import csv
import random
from pathlib import Path

from rekd_deploy.client.render import plain_text
from rekd_train import load
from rekd_train.config.run import run_config
from rekd_train.runs import train_run

SETTINGS = ["data.name=table", "data.class_weights=balanced", "selector.layers=1", "predictor.layers=1",
            "stages.classifier_epochs=6", "stages.rationale_epochs=4", "stages.compact_epochs=2"]  # fmt: skip
"""What a small table of short texts wants; longer ones: the preset demo_student in place of short_texts."""


def write_messages(path: Path) -> None:
    """Made-up messages in which one word tells the kind."""
    draw = random.Random(1)
    telling = {"question": ["how", "where"], "complaint": ["broken", "late"], "cancellation": ["cancel", "terminate"]}
    others = "the invoice router parcel cable order my account printer was in with for on this week from your shop"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(600):
            label = list(telling)[number % 3]
            words = draw.choices(others.split(), k=draw.randint(8, 20))
            words.insert(draw.randrange(len(words)), draw.choice(telling[label]))
            rows.writerow([" ".join(words), label])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, help="a CSV with the columns text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/own_texts"), help="the new checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the output")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--ask", nargs="+", default=["please cancel my order from last week", "the router was broken"])
    given = parser.parse_args()
    table = given.table or given.output.with_name("messages.csv")
    if not given.table and not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        write_messages(table)

    config = run_config("short_texts", [f"data.path={table}", *SETTINGS, *given.set])
    metrics = train_run(config, given.output, overwrite=given.overwrite)
    print(f"accuracy on test rows: {metrics['test']['accuracy']:.1%}")
    for prediction in load(given.output).predict(given.ask):
        print(plain_text(prediction))  # the words that decided stand in [[brackets]]


if __name__ == "__main__":
    main()
