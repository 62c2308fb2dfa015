"""Recorded knowledge: read whoever wrote it, aligned with any tokenizer, all mistakes of a file together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import tiny_tokenizer_json, trained_tokenizer
from pyarrow import parquet

from rekd_train.data.knowledge import (
    align,
    checked_statements,
    marks_at,
    read_knowledge,
    scores_at,
    text_id,
)
from rekd_train.errors import DataError
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.training.teacher import write_knowledge

LABELS = ("negative", "positive")
TEXT = "a wonderful film, but not a good end"
WORDS = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48))
BYTES = TextPreprocessor(trained_tokenizer("byte-level BPE"), TextSettings(48))


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def statement(tmp_path: Path, **said):
    knowledge = read_knowledge(lines(tmp_path / "k.jsonl", {"text": TEXT, **said}), LABELS)
    return knowledge.statements[text_id(TEXT)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"probabilities": {"positive": 0.8, "negative": 0.2}}, [0.2, 0.8]),
        ({"probabilities": {"positive": 0.8}}, [0.2, 0.8]),
        ({"probabilities": [0.3, 0.7]}, [0.3, 0.7]),
        ({"label": "negative"}, [0.9, 0.1]),
        ({"label": "positive", "confidence": 0.6}, [0.4, 0.6]),
    ],
)
def test_class_probabilities_in_each_form(tmp_path, said, expected):
    np.testing.assert_allclose(statement(tmp_path, **said).probabilities, expected, atol=1e-6)


def test_what_is_not_said_is_none(tmp_path):
    found = statement(tmp_path, rationale=[])
    assert found.probabilities is None and found.scores is None
    assert found.marks.shape == (0, 3), "nothing decides, which is a statement"


@pytest.mark.parametrize("preprocessor", [WORDS, BYTES])
@pytest.mark.parametrize(
    "said", [{"rationale": [[2, 11], [22, 32]]}, {"quotes": ["wonderful", "not a good"]}, {"rationale": [[2, 11, 1.0]],
             "quotes": ["not a good", "never said"]}],
)  # fmt: skip
def test_passages_mark_the_tokens_of_any_tokenizer(tmp_path, preprocessor, said):
    knowledge = read_knowledge(lines(tmp_path / "k.jsonl", {"text": TEXT, **said}), LABELS)
    (marks,) = align(knowledge, [TEXT], preprocessor, 2).marks
    encoding = preprocessor.encode([TEXT])[0]
    marked = {TEXT[start:end].strip() for (start, end), mark in zip(encoding.offsets, marks, strict=True) if mark}
    assert "".join(TEXT[start:end] for (start, end), mark in zip(encoding.offsets, marks, strict=True)
                   if mark).replace(" ", "") == "wonderfulnotagood", marked  # fmt: skip
    assert knowledge.lost_quotes == len([quote for quote in said.get("quotes", ()) if quote not in TEXT])


def test_scores_of_another_tokenizer_are_shared_by_characters():
    segments = np.array([[0, 4, 1.0], [4, 6, 3.0], [8, 9, -2.0]], dtype=np.float32)
    offsets = np.array([[0, 0], [0, 2], [2, 6], [6, 8], [8, 12], [3, 9]], dtype=np.float32)
    expected = [np.nan, 1.0, 2.0, np.nan, -2.0, (1 + 2 * 3 - 2) / 4]
    np.testing.assert_allclose(scores_at(segments, offsets), expected)
    np.testing.assert_array_equal(marks_at(np.array([[2, 7, 0.5]]), offsets), [0, 0, 0.5, 0.5, 0, 0.5])


@pytest.mark.parametrize("identified", [True, False])
def test_packed_scores_come_back_within_a_step(tmp_path, identified):
    offsets = np.array(BYTES.encode([TEXT])[0].offsets)[1:-1]
    scores = np.column_stack([offsets, np.random.default_rng(0).normal(size=len(offsets)) * 3])
    row = {"id": text_id(TEXT)} if identified else {"text": TEXT}
    path = write_knowledge(tmp_path / "k.parquet", [{**row, "probabilities": [0.25, 0.75], "scores": scores}])
    knowledge = read_knowledge(path, LABELS)
    (found,) = align(knowledge, [TEXT], BYTES, 2).scores
    assert np.isnan(found[[0, -1]]).all()
    np.testing.assert_allclose(found[1:-1], scores[:, 2], rtol=0, atol=np.abs(scores[:, 2]).max() / 127)
    with pytest.raises(DataError, match="exists; fix: another file, or --overwrite"):
        write_knowledge(path, [])


@pytest.mark.parametrize(
    "change",
    [{"packed_scale": float("nan")}, {"packed_scale": None}, {"packed_gaps": None}, {"packed_lengths": b"\x01"},
     {"packed_gaps": b"\xff" * 3}],
)  # fmt: skip
def test_damaged_packed_scores(tmp_path, change):
    scores = np.array([[0, 1, 1.0], [2, 11, -1.0], [12, 15, 0.5]])
    path = write_knowledge(tmp_path / "k.parquet", [{"text": TEXT, "scores": scores}])
    (row,) = parquet.read_table(path).to_pylist()
    parquet.write_table(pyarrow.Table.from_pylist([row | change]), path)
    with pytest.raises(DataError, match="packed scores that are damaged; fix: rekd-train record again"):
        read_knowledge(path, LABELS)


def test_texts_without_a_statement_lack_every_part(tmp_path):
    knowledge = read_knowledge(lines(tmp_path / "k.jsonl", {"text": TEXT, "label": "positive"}), LABELS)
    aligned = align(knowledge, ["another text", TEXT], WORDS, 2)
    assert np.isnan(aligned.probabilities[0]).all() and not np.isnan(aligned.probabilities[1]).any()
    assert aligned.scores == [None, None] and aligned.marks == [None, None]


def test_all_mistakes_of_a_file_together(tmp_path):
    rows = [
        {"text": TEXT, "probabilities": [0.5, 0.2]}, {"text": "b", "probabilities": {"neutral": 1.0}},
        {"text": "c", "probabilities": [0.2, 0.3, 0.5]}, {"text": "d", "rationale": [[0, 9]]},
        {"text": "ef", "scores": [[0, 1, float("nan")]]}, {"text": "gh", "scores": [[0, 2, 1], [1, 2, 1]]},
        {"text": "d"}, {"label": "positive"}, {"id": "0" * 16, "quotes": ["x"]},
        {"text": "wonder", "quotes": "wonder"}, {"text": "won", "quotes": [3]},
        {"text": "five", "rationale": 5},
    ]  # fmt: skip
    path = tmp_path / "k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_knowledge(path, LABELS)
    for part in (
        "line 1: the probabilities [0.5, 0.2] do not sum to 1", "line 2: the class 'neutral' is none of negative",
        "line 3: 3 probabilities for 2 classes", "line 4: rationale hold [0, 9], not 0 <= start < end <= 1",
        "line 5: scores hold values that are not finite", "line 10: quotes are 'wonder', not a list of strings",
        "line 11: quotes are '[3]', not a list of strings", "line 12: rationale of another form (",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "rational": []}\n', "unknown columns: rational; columns: text, id"),
        ('{"label": "positive"}\n', "neither 'text' nor 'id'"),
        ('{"text": "a"', "line 1 is not JSON"),
    ],
)
def test_files_that_are_no_knowledge(tmp_path, content, message):
    path = tmp_path / "k.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_knowledge(path, LABELS)


def test_half_of_a_parquet(tmp_path):
    path = write_knowledge(tmp_path / "k.parquet", [{"text": TEXT, "probabilities": [0.5, 0.5]}])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        read_knowledge(path, LABELS)


def test_counts_for_a_reader(tmp_path):
    rows = (
        {"text": TEXT, "label": "positive", "quotes": ["wonderful", "not there"]},
        {"text": "bad", "label": "positive"}, {"text": "who knows"},
    )  # fmt: skip
    knowledge = read_knowledge(lines(tmp_path / "k.jsonl", *rows), LABELS)
    found = checked_statements(knowledge, {text_id(TEXT): 1, text_id("bad"): 0})
    assert found == {
        "statements": 3, "known": 2, "probabilities": 2 / 3, "rationale": 1 / 3, "scores": 0.0, "lost_quotes": 1,
        "agreement": 0.5, "marked_share": 9 / len(TEXT),
    }  # fmt: skip
