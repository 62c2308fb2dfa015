"""A teacher that was recorded teaches what the live one teaches; what it does not say is not learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import trained_tokenizer
from toys import ToyTexts, fitted, toy_texts

from rekd_train.data import knowledge as known
from rekd_train.data.examples import UNLABELLED, DataSet, LabelledTexts
from rekd_train.data.knowledge import AlignedKnowledge, Knowledge, Statement
from rekd_train.errors import ConfigError
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.training.runtime import example_weights
from rekd_train.training.teacher import statements_of, write_knowledge

LABELS = ("negative", "positive")
SHORT = {"stages": {"classifier_epochs": 1, "rationale_epochs": 1, "compact_epochs": 1},
         "distillation": {"classifier": True}}  # fmt: skip
TEXTS, TRUTH = ToyTexts.words(96, 1)


@pytest.fixture(scope="module")
def teacher():
    return fitted(toy_texts(examples=128))[0]


def losses_with(teacher, labels=None, **changes) -> list[float]:
    """Every loss of a short training on the 96 texts."""
    pair, train, dev = toy_texts(seed=5, examples=96)
    train = train if labels is None else replace(train, labels=labels)
    _, log = fitted((pair, train, dev), options={"teacher": teacher}, **SHORT | changes)
    return [loss for stage, *_ in log.stages for loss in log.losses(stage)]


def said_by(teacher, tmp_path, preprocessor=None, exact: bool = False) -> AlignedKnowledge:
    rows = statements_of(teacher, TEXTS, with_texts=False)
    said = {each["id"]: Statement(each["probabilities"], None, each["scores"].astype(np.float32)) for each in rows}
    knowledge = Knowledge(tmp_path, said, {}, 0)
    if not exact:
        knowledge = known.read_knowledge(write_knowledge(tmp_path / "k.parquet", rows), LABELS)
    return known.align(knowledge, TEXTS, preprocessor or teacher.preprocessor, 2)


def test_recorded_scores_teach_what_the_live_teacher_teaches(teacher, tmp_path):
    live = losses_with(teacher)
    np.testing.assert_allclose(losses_with(said_by(teacher, tmp_path, exact=True)), live, rtol=0, atol=1e-5)
    rounded = losses_with(said_by(teacher, tmp_path))
    assert not np.allclose(rounded, live, rtol=0, atol=1e-5), "a byte a score"
    np.testing.assert_allclose(rounded, live, rtol=0, atol=0.05)


def test_a_teacher_with_another_tokenizer_scores_the_same_words(teacher, tmp_path):
    other = TextPreprocessor(trained_tokenizer("byte-level BPE"), TextSettings(200))
    own, theirs = said_by(teacher, tmp_path, exact=True), said_by(teacher, tmp_path, other, exact=True)
    for text, mine, moved in zip(TEXTS, own.scores, theirs.scores, strict=True):
        word = "good" if "good" in text.split() else "bad"
        start = f" {text} ".index(f" {word} ")
        scores = []
        for preprocessor, values in ((teacher.preprocessor, mine), (other, moved)):
            offsets = preprocessor.encode([text])[0].offsets
            scores.append(values[next(at for at, (first, last) in enumerate(offsets) if first == start < last)])
        assert scores[1] == pytest.approx(scores[0])


def test_what_a_teacher_does_not_say_is_not_learned(teacher, tmp_path):
    whole = said_by(teacher, tmp_path, exact=True)
    nothing = AlignedKnowledge(np.full_like(whole.probabilities, np.nan), [None] * 96, [None] * 96)
    scores = [np.full_like(each, np.nan) for each in whole.scores]
    silent = AlignedKnowledge(nothing.probabilities, scores, nothing.marks)
    alone = {"stages": {"classifier_epochs": 0, "rationale_epochs": 1, "compact_epochs": 0},
             "distillation": {"alpha": 0.0}}  # fmt: skip
    assert np.abs(losses_with(silent, **alone)).max() < 1e-6, "no term, no loss"
    with pytest.raises(ConfigError, match="says nothing about any training example"):
        losses_with(nothing, **alone)
    with pytest.raises(ConfigError, match="fix: distillation.teacher_mask=teacher"):  # it cannot answer on another mask
        losses_with(whole, stages={}, distillation={"teacher_mask": "student"})


def test_texts_without_a_label_train_by_the_teacher_alone(teacher, tmp_path):
    said = said_by(teacher, tmp_path, exact=True)
    hidden = np.where(np.arange(96) < 48, TRUTH, UNLABELLED)
    wrong = np.where(np.arange(96) < 48, TRUTH, 1 - TRUTH)
    assert losses_with(said, labels=hidden) != losses_with(said, labels=wrong)
    assert np.isfinite(losses_with(said, labels=hidden)).all()
    assert example_weights(hidden, "none").tolist() == [1.0] * 48 + [0.0] * 48
    balanced = example_weights(hidden, "balanced")
    assert balanced[:48].sum() == pytest.approx(48) and not balanced[48:].any(), "no cross-entropy"


def test_a_file_brings_texts_of_its_own_but_none_of_dev_or_test():
    splits = {name: LabelledTexts([f"{name} text"], np.array([1])) for name in ("train", "dev", "test")}
    data = DataSet(splits, LABELS, "")
    texts = {known.text_id(text): text for text in ("train text", "dev text", "test text", "a new one")}
    said = Knowledge(None, dict.fromkeys(texts, Statement(None, None, None)), texts, 0)
    train = known.with_unlabelled(data, said).splits["train"]
    assert train.texts == ["train text", "a new one"] and train.labels.tolist() == [1, UNLABELLED]


def test_marked_passages_are_selected(teacher):
    """Quotes alone, a tenth of them wrong, a third of the texts unmarked: the student finds the words."""
    generator, (texts, _), marks = np.random.default_rng(0), ToyTexts.words(256, 1), []
    for text, encoding in zip(texts, teacher.preprocessor.encode(texts), strict=True):
        words = text.split()
        word = words.index("good") if "good" in words else words.index("bad")
        word = int(generator.integers(len(words))) if generator.random() < 0.1 else word
        row = (np.arange(len(encoding)) == word + 1).astype(np.float32)
        marks.append(None if generator.random() < 1 / 3 else row)
    said = AlignedKnowledge(np.full((256, 2), np.nan, np.float32), [None] * 256, marks)
    found = {}
    for name, given in (("alone", None), ("marked", said)):
        stages = {"classifier_epochs": 1, "rationale_epochs": 6, "compact_epochs": 0}
        changes = {"stages": stages, "distillation": {"rationale_weight": 2.0}}
        pair, _ = fitted(toy_texts(seed=5), options={"teacher": given}, **changes)
        unseen, _ = ToyTexts.words(64, 9)
        kept = [{word for span in each.rationale for word in span.text.split()} for each in pair.predict(unseen)]
        found[name] = sum(bool(words & {"good", "bad"}) for words in kept)
    assert found["marked"] > 50 > found["alone"], found
