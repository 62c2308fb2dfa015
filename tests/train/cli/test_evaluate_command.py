"""rekd-train evaluate: the table, the JSON, the file, and what it says when it cannot."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, make_rationalizer
from rich.console import Console

from rekd_train.checkpoints import checkpoint
from rekd_train.cli.command import run
from rekd_train.cli.main import app
from rekd_train.config.run import RunConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny checkpoint that names a table with human rationales as its data."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(60):
        text = " ".join([*generator.choice(WORDS, 5), *generator.choice(WORDS, number % 20), str(number)])
        label, spans = ("negative", "positive")[number % 2], [[0, 9]] if number % 3 else None
        lines.append(json.dumps({"text": text, "label": label, "why": spans}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    data = {
        "name": "table", "path": str(folder / "texts.jsonl"), "rationale_column": "why", "max_length": 48,
        "dev_share": 0.2, "test_share": 0.3,
    }  # fmt: skip
    config = RunConfig.model_validate({"name": "tiny", "data": data})
    return checkpoint.save(make_rationalizer(), folder / "run", training={"config": config.model_dump()})


def invoke(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as request:
        run(app, ["evaluate", *arguments])
    return request.value.code, *capsys.readouterr()


def report_of(capsys, path: Path, *arguments: str) -> dict:
    code, out, err = invoke(capsys, str(path), "--draws", "0", "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def new(tmp_path) -> dict[str, Path]:
    """31 rows, one of them twice, that no run has seen: as a table, by settings with the classes in another order, and
    as a folder with splits of its own."""
    lines = [f"the film was {WORDS[i]} {i},{('negative', 'positive')[i % 2]}" for i in range(30)]
    folder = tmp_path / "new"
    folder.mkdir()
    for path, rows in ((tmp_path / "new.csv", [*lines, lines[0]]), (folder / "train.csv", lines[:10]),
                       (folder / "test.csv", lines[10:])):  # fmt: skip
        path.write_text("text,label\n" + "\n".join(rows) + "\n")
    for name, settings in (("new", 'labels = ["positive", "negative"]\npath = "{}/new.csv"'),
                           ("folder", 'path = "{}/new"')):  # fmt: skip
        text = f'name = "x"\n[data]\nname = "table"\n{settings.format(tmp_path)}\n'
        (tmp_path / f"{name}.toml").write_text(text)
    return {"table": tmp_path / "new.csv", "settings": tmp_path / "new.toml", "folder": tmp_path / "folder.toml"}


def test_json_and_file_hold_the_same_report(trained, tmp_path, capsys) -> None:
    file = tmp_path / "new" / "report.json"
    report = report_of(capsys, trained, "--draws", "2", "--teacher", str(trained), "-o", str(file), "--device", "cpu")
    assert json.loads(file.read_text()) == report
    assert (report["format"], report["split"], report["examples"]) == ("rekd-evaluation", "test", 18)
    assert report["checkpoint"] == str(trained) and "texts.jsonl" in report["data"]
    people = report["human_rationales"]
    assert people["examples"] + people["without_human_rationale"] <= 18 and people["examples"] > 5
    assert report["teacher"]["mask_jaccard"] == 1.0


def test_the_table_names_every_section(trained, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Console, "width", 100)
    code, out, _ = invoke(capsys, str(trained), "--split", "dev", "--draws", "0")
    assert code == 0 and "sampled" not in out
    for word in ("classification", "macro_f1", "calibration", "abstain.threshold", "human_rationales", "iou_f1_macro",
                 "never_predicted"):  # fmt: skip
        assert word in out
    assert "12 examples, the dev split of texts.jsonl (20% of it, chosen by data.seed)" in " ".join(out.split())


NEW = ("--set", "data.rationale_column=")


@pytest.mark.parametrize("named", ["settings", "table"])
def test_a_new_file_is_measured_whole_and_the_output_says_so(trained, new, capsys, monkeypatch, named) -> None:
    monkeypatch.setattr(Console, "width", 100)
    code, out, _ = invoke(capsys, str(trained), "--data", str(new[named]), "--draws", "0", *NEW)
    assert code == 0 and "31 examples, every row of new.csv; noise-free" in " ".join(out.split())
    assert "aurc" in out and "threshold" not in out, "there is no dev split to choose it on"
    report = report_of(capsys, trained, "--data", str(new[named]), *NEW)
    assert (report["split"], report["examples"], report["measured"]) == ("all", 31, "every row of new.csv")
    assert report["classification"]["per_class"]["negative"]["support"] == 16, "by the model's order of classes"
    warned = "warning: on every row of new.csv no example is predicted as" in " ".join(out.split())
    assert warned == bool(report["classification"]["never_predicted"])


@pytest.mark.parametrize(
    ("named", "arguments", "examples", "measured"),
    [("folder", (), 20, "the test split of new"),
     ("table", (*NEW, "--split", "test"), 10, "the test split of new.csv (30% of it, chosen by data.seed)")],
)  # fmt: skip
def test_splits_of_new_data_are_kept_and_made(trained, new, capsys, named, arguments, examples, measured):
    report = report_of(capsys, trained, "--data", str(new[named]), *arguments)
    assert (report["split"], report["examples"], report["measured"]) == ("test", examples, measured), "each once"


def test_the_file_it_was_trained_on_is_not_measured_whole(trained, tmp_path, capsys) -> None:
    data = Path(json.loads((trained / "config.json").read_text())["training"]["config"]["data"]["path"])
    report = report_of(capsys, trained, "--data", str(data))
    assert (report["split"], report["examples"]) == ("test", 18), "the very split of the training"
    assert report["measured"] == "the test split of texts.jsonl (30% of it, chosen by data.seed)"
    measured = report_of(capsys, trained, "--set", "data.test_examples=5")["measured"]
    assert measured == "the test split of texts.jsonl (at most 5 of 30% of it, chosen by data.seed)"
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    example = {"text": json.loads(data.read_text().splitlines()[0])["text"], "label": "negative"}
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "examples.jsonl").write_text(json.dumps(example) + "\n")
    assert report_of(capsys, copy, "--data", str(moved))["measured"] == (
        "every row of moved.jsonl (1 of them are dev examples of the checkpoint: it may have been trained on this file)"
    )


def test_a_new_file_with_more_classes_than_a_model_that_names_none_is_refused(new, tmp_path, capsys) -> None:
    imported = checkpoint.save(make_rationalizer(labels=("0", "1")), tmp_path / "imported", training={"name": "i"})
    arguments = "--data", str(new["table"]), "--set"
    code, _, error = invoke(capsys, str(imported), *arguments, 'data.labels=["negative", "positive", "mixed"]')
    assert code == 1 and "the data have 3 classes (negative, positive, mixed), the model has 2 (0, 1); fix: " in error
    assert report_of(capsys, imported, *arguments, 'data.labels=["negative", "positive"]')["examples"] == 31


def test_what_cannot_be_is_one_line(trained, checkpoint, capsys) -> None:
    code, _, err = invoke(capsys, str(trained), "--device", "abacus")
    assert code == 1 and err == "error: there is no device 'abacus' here; fix: --device cpu\n"
    code, _, err = invoke(capsys, str(checkpoint))
    assert code == 1 and "does not record the run" in err and err.count("\n") == 1
    code, _, err = invoke(capsys, str(trained), "--split", "rest")
    assert code == 2 and "none of train, dev, test" in err
    code, _, err = invoke(capsys, str(trained), "--risk", "1.5")
    assert code == 2


def test_a_full_disk_is_one_line_that_names_the_file(trained, tmp_path, capsys, monkeypatch) -> None:
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = invoke(capsys, str(trained), "--draws", "0", "-o", str(tmp_path / "report.json"))
    assert code == 1
    assert err == (
        f"error: {tmp_path}/report.json: No space left on device; fix: make room, then run the same command again\n"
    )
