"""What a run learns from, in figures: counted before training, shown, kept in metrics.json and in the card."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_image_rationalizer, tiny_tokenizer_json
from rich.console import Console

from rekd_train.checkpoints.model_card import model_card
from rekd_train.cli import progress as cli_progress
from rekd_train.data import DataSet, LabelledImages, LabelledTexts, encode, summarise
from rekd_train.data.summary import summary_notes, summary_rows
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings


def summary_of(splits: dict[str, LabelledTexts], names=("neg", "pos"), **found) -> dict:
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(16))
    encoded = {name: encode(part, preprocessor) for name, part in splits.items()}
    return summarise(DataSet(splits, names, "mine", **found), encoded)


def words(*lengths: int, label: int = 0) -> LabelledTexts:
    return LabelledTexts([" ".join(["good"] * length) for length in lengths], np.array([label] * len(lengths)))


@pytest.fixture(scope="module")
def summary() -> dict:
    train = LabelledTexts(words(*range(1, 41)).texts, np.array([0] * 38 + [1] * 2))
    contradictions = tuple(f"line {n} 'neg' (kept), line {n + 40} 'pos': '[b]'" for n in range(23))
    splits = {"train": train, "dev": words(3), "test": words(30, 30, label=1)}
    return summary_of(splits, duplicates=25, contradictions=contradictions)


def test_it_counts_examples_classes_lengths_and_what_is_cut(summary):
    train = summary["splits"]["train"]
    assert (train["examples"], train["classes"]) == (40, {"neg": 38, "pos": 2})
    assert train["tokens"] == {"p5": 4, "p50": 22, "p95": 40, "max": 42}, "of the whole texts, with [CLS] and [SEP]"
    assert (train["cut"], summary["max_length"]) == (26, 16), "from 15 words on"
    assert summary["splits"]["test"]["cut"] == 2 and summary["splits"]["dev"]["classes"] == {"neg": 1, "pos": 0}
    assert (summary["duplicates_dropped"], summary["contradicting"]) == (25, 23)
    assert len(summary["contradictions"]) == 20


def test_every_count_is_a_row_and_the_rest_a_line(summary):
    rows = {title: figures for title, *figures in summary_rows(summary)}
    assert rows["class pos"] == ["2 (5.0%)", "0 (0.0%)", "2 (100.0%)"]
    assert rows["cut at 16 tokens"] == ["26 (65.0%)", "0 (0.0%)", "2 (100.0%)"]
    notes = summary_notes(summary)
    assert notes[:2] == ["duplicates dropped: 25", "examples with contradicting labels: 23"]
    assert notes[2] == "  line 0 'neg' (kept), line 40 'pos': '[b]'"
    assert notes[22] == "  and 3 more" and notes[23].startswith("uneven classes: 38 training examples of 'neg', 2 of")


def test_many_classes_are_summed_up():
    names = tuple(f"c{n}" for n in range(30))
    train = LabelledTexts(["good"] * 60, np.arange(60) % 30)
    rows = summary_rows(summary_of({"train": train, "dev": train, "test": train}, names))
    assert [title for title, *_ in rows][20:22] == ["11 more classes", "tokens, 5th percentile"]
    assert rows[20][1] == "22 (36.7%)"


def test_images_have_no_lengths():
    images = LabelledImages(np.zeros((4, 16, 12, 1), dtype=np.uint8), np.array([0, 1, 2, 2]))
    split = encode(images, make_image_rationalizer().preprocessor)
    data = DataSet(dict.fromkeys(("train", "dev", "test"), images), ("shirt", "shoe", "bag"), "mine")
    summary = summarise(data, dict.fromkeys(("train", "dev", "test"), split))
    assert [title for title, *_ in summary_rows(summary)] == ["examples", "class shirt", "class shoe", "class bag"]
    assert summary_notes(summary) == [], "nobody has looked for duplicates"


def test_it_is_shown_once_within_80_columns(summary, capsys, monkeypatch):
    monkeypatch.setattr(Console, "width", 80)
    with cli_progress.progress_bars() as bars:
        bars.data(summary)
        bars.data(dict(summary))
    shown = capsys.readouterr().err
    assert shown.count("class pos") == 1 and "'[b]'" in shown and "5.0%" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_card_has_it(summary):
    description = {
        "training": {}, "labels": ["neg", "pos"], "operator": "zero", "preprocessing": {"kind": "text"},
        **dict.fromkeys(("selector", "predictor"), {"family": "bert", "layers": 1, "width": 8, "heads": 2}),
    }  # fmt: skip
    policy = SelectionPolicy(bias=0.0, budget=0.2, minimum=1)
    metrics = {"test": {"accuracy": 0.5, "never_predicted": ["pos"]}, "data": summary}
    card = model_card(description, policy, metrics)
    assert "| class pos | 2 (5.0%) | 0 (0.0%) | 2 (100.0%) |" in card and "\n  - line 0 'neg' (kept)" in card
    assert "test.never_predicted: pos" in card and "data.splits" not in card
    assert "class pos" not in model_card(description, policy, {})
