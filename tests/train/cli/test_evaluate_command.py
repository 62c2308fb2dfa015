"""rekd-train evaluate: the table, the JSON, the file, and what it says when it cannot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NO_ROOM, WORDS, make_rationalizer, raising
from rich.console import Console
from toys import rekd_train

from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import RunConfig

pytestmark = pytest.mark.slow
NEW = ("--set", "data.rationale_column=")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder, generator, rows = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0), []
    for number in range(60):
        text = " ".join([*generator.choice(WORDS, 5), *generator.choice(WORDS, number % 20), str(number)])
        label, spans = ("negative", "positive")[number % 2], [[0, 9]] if number % 3 else None
        rows.append(json.dumps({"text": text, "label": label, "why": spans}) + "\n")
    (folder / "texts.jsonl").write_text("".join(rows))
    data = {"name": "table", "path": str(folder / "texts.jsonl"), "rationale_column": "why", "max_length": 48}
    config = RunConfig(name="tiny", data=data | {"dev_share": 0.2, "test_share": 0.3})
    return checkpoint.save(make_rationalizer(), folder / "run", training={"config": config.model_dump()})


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """Runs the command: its report, or (exit code, what it says with every space as one, its errors)."""
    monkeypatch.setattr(Console, "width", 100)
    def call(*arguments: object, report: bool = True):
        more = ("--draws", 0, "--json") if report else ()
        code, (out, err) = rekd_train("evaluate", *arguments, *more), capsys.readouterr()
        assert code == 0 or not report, err
        return json.loads(out) if report else (code, " ".join(out.split()), err)
    return call


@pytest.fixture
def new(tmp_path) -> dict[str, Path]:
    """31 rows, one of them twice, that no run has seen: as a table, by settings with the classes in another order, and
    as a folder with splits of its own."""
    lines = [f"the film was {WORDS[i]} {i},{('negative', 'positive')[i % 2]}" for i in range(30)]
    (tmp_path / "new").mkdir()
    for name, rows in (("new.csv", [*lines, lines[0]]), ("new/train.csv", lines[:10]), ("new/test.csv", lines[10:])):
        (tmp_path / name).write_text("\n".join(["text,label", *rows, ""]))
    for name, path, more in (("new", "new.csv", 'labels = ["positive", "negative"]\n'), ("folder", "new", "")):
        settings = f'name = "x"\n[data]\nname = "table"\npath = "{tmp_path / path}"\n{more}'
        (tmp_path / f"{name}.toml").write_text(settings)
    return {"table": tmp_path / "new.csv", "settings": tmp_path / "new.toml", "folder": tmp_path / "folder.toml"}


def test_json_file_and_table_hold_the_same_report(trained, tmp_path, evaluate) -> None:
    file = tmp_path / "new" / "report.json"
    report = evaluate(trained, "--teacher", trained, "-o", file, "--device", "cpu")
    assert json.loads(file.read_text()) == report
    assert (report["format"], report["split"], report["examples"]) == ("rekd-evaluation", "test", 18)
    assert report["checkpoint"] == str(trained) and "texts.jsonl" in report["data"]
    people = report["human_rationales"]
    assert people["examples"] + people["without_human_rationale"] <= 18 and people["examples"] > 5
    assert report["teacher"]["mask_jaccard"] == 1.0
    code, out, _ = evaluate(trained, "--split", "dev", "--draws", 0, report=False)
    assert code == 0 and "sampled" not in out
    for word in ("classification", "macro_f1", "calibration", "abstain.threshold", "human_rationales", "iou_f1_macro",
                 "never_predicted", "12 examples, the dev split of texts.jsonl (20% of it, chosen by data.seed)"):
        assert word in out  # fmt: skip
    assert "sampled" in evaluate(trained, "--split", "dev", "--draws", 2, report=False)[1]


@pytest.mark.parametrize("named", ["settings", "table"])
def test_a_new_file_is_measured_whole_and_the_output_says_so(trained, new, evaluate, named) -> None:
    code, out, _ = evaluate(trained, "--data", new[named], "--draws", 0, *NEW, report=False)
    assert code == 0 and "31 examples, every row of new.csv; noise-free" in out
    assert "aurc" in out and "threshold" not in out, "there is no dev split to choose it on"
    report = evaluate(trained, "--data", new[named], *NEW)
    assert (report["split"], report["examples"], report["measured"]) == ("all", 31, "every row of new.csv")
    assert report["classification"]["per_class"]["negative"]["support"] == 16, "by the model's order of classes"
    warned = "warning: on every row of new.csv no example is predicted as" in out
    assert warned == bool(report["classification"]["never_predicted"])


def test_splits_of_new_data_are_kept_and_the_training_file_is_not_measured_whole(trained, new, tmp_path, evaluate):
    data = Path(json.loads((trained / "config.json").read_text())["training"]["config"]["data"]["path"])
    moved, copy = shutil.copy(data, tmp_path / "moved.jsonl"), shutil.copytree(trained, tmp_path / "run")
    example = {"text": json.loads(data.read_text().splitlines()[0])["text"], "label": "negative"}
    (copy / "examples.jsonl").write_text(json.dumps(example) + "\n")
    seen = "1 of them are dev examples of the checkpoint: it may have been trained on this file"
    of_texts = "the test split of texts.jsonl ({}30% of it, chosen by data.seed)"
    for path, arguments, split, examples, measured in (
        (trained, ("--data", new["folder"]), "test", 20, "the test split of new"),
        (trained, ("--data", new["table"], *NEW, "--split", "test"), "test", 10,
         "the test split of new.csv (30% of it, chosen by data.seed)"),
        (trained, ("--data", data), "test", 18, of_texts.format("")),
        (trained, ("--set", "data.test_examples=5"), "test", 5, of_texts.format("at most 5 of ")),
        (copy, ("--data", moved), "all", 60, f"every row of moved.jsonl ({seen})")):  # fmt: skip
        report = evaluate(path, *arguments)
        assert (report["split"], report["examples"], report["measured"]) == (split, examples, measured)


def test_what_cannot_be_is_one_line(trained, new, tmp_path, evaluate, monkeypatch) -> None:
    unnamed = checkpoint.save(make_rationalizer(labels=("0", "1")), tmp_path / "imported", training={"name": "i"})
    data = ("--data", new["table"], "--set", 'data.labels=["negative", "positive"]')
    assert evaluate(unnamed, *data)["examples"] == 31
    no_device = "error: there is no device 'abacus' here; fix: --device cpu\n"
    for arguments, code, part in (
        ((trained, "--device", "abacus"), 1, no_device), ((unnamed,), 1, "does not record the run"),
        ((unnamed, *data[:3], 'data.labels=["negative", "positive", "c"]'), 1,
         "the data have 3 classes (negative, positive, c), the model has 2 (0, 1); fix: "),
        ((trained, "--split", "rest"), 2, "none of train, dev, test"), ((trained, "--risk", "1.5"), 2, "--risk"),
    ):  # fmt: skip
        ended, _, error = evaluate(*arguments, report=False)
        assert ended == code and part in error and (code == 2 or error.count("\n") == 1)
    monkeypatch.setattr(Path, "write_bytes", raising(NO_ROOM))
    code, _, error = evaluate(trained, "--draws", 0, "-o", tmp_path / "report.json", report=False)
    again = "fix: make room, then run the same command again"
    assert (code, error) == (1, f"error: {tmp_path}/report.json: No space left on device; {again}\n")
