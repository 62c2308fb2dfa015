"""Recorded knowledge: read whoever wrote it, aligned with any tokenizer or patch grid, its mistakes named together."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import tiny_tokenizer_json, trained_tokenizer
from PIL import Image
from pyarrow import parquet

from rekd_train.data.knowledge import align, checked_statements, read_knowledge, text_id
from rekd_train.data.splits import marked_patches, marks_at, on_patches, scores_at
from rekd_train.errors import DataError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.training.teacher import write_knowledge

LABELS = ("negative", "positive")
TEXT = "a wonderful film, but not a good end"
WORDS = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48))
BYTES = TextPreprocessor(trained_tokenizer("byte-level BPE"), TextSettings(48))
PATCHES = ImagePreprocessor(ImageSettings(height=8, width=12, channels=1, rows=2, columns=3))


def known(tmp_path: Path, *rows: dict, modality: str = "text"):
    path = tmp_path / "k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_knowledge(path, LABELS, modality)


def aligned(tmp_path: Path, images, *rows: dict):
    return align(known(tmp_path, *rows, modality="image"), images, PATCHES, len(LABELS), tmp_path)


@pytest.mark.parametrize(("said", "expected"), [
    ({"probabilities": {"positive": 0.8, "negative": 0.2}}, [0.2, 0.8]), ({"label": "negative"}, [0.9, 0.1]),
    ({"probabilities": {"positive": 0.8}}, [0.2, 0.8]), ({"probabilities": [0.3, 0.7]}, [0.3, 0.7]),
    ({"label": "positive", "confidence": 0.6}, [0.4, 0.6])])  # fmt: skip
def test_class_probabilities_in_each_form_and_texts_without_a_statement_lack_every_part(tmp_path, said, expected):
    found = align(known(tmp_path, {"text": TEXT, "rationale": [], **said}), ["another text", TEXT], WORDS, 2)
    np.testing.assert_allclose(found.probabilities, [[np.nan] * 2, expected], atol=1e-6)
    assert found.scores == [None, None] and found.marks[0] is None and not found.empty
    assert not found.marks[1].any(), "that nothing decides is a statement"
    said = known(tmp_path, {"text": TEXT, "quotes": ["never said"]}, {"text": "bad", "quotes": []})
    lost, nothing = align(said, [TEXT, "bad"], WORDS, 2).marks
    assert lost is None and not nothing.any(), "a quote that is in no text says nothing"


def test_scores_are_shared_by_characters_and_counts_are_for_a_reader(tmp_path):
    (tmp_path / "k.jsonl").write_text('{"text": "a", "label": 1.0}\n')
    (said,) = read_knowledge(tmp_path / "k.jsonl", ("0", "1")).statements.values()
    assert said.probabilities.argmax() == 1
    knowledge = known(tmp_path, {"text": TEXT, "label": "positive", "quotes": ["wonderful", "not there"]},
                      {"text": "bad", "label": "positive"}, {"text": "who knows"}, {"text": "x", "label": "positive"})
    assert checked_statements(knowledge, {text_id(TEXT): 1, text_id("bad"): 0}) == {
        "statements": 4, "known": 2, "probabilities": 3 / 4, "rationale": 1 / 4, "scores": 0.0, "lost_quotes": 1,
        "agreement": 0.5, "marked_share": 9 / len(TEXT)}  # fmt: skip
    segments = np.array([[0, 4, 1.0], [4, 6, 3.0], [8, 9, -2.0]], dtype=np.float32)
    offsets = np.array([[0, 0], [0, 2], [2, 6], [6, 8], [8, 12], [3, 9]], dtype=np.float32)
    expected = [np.nan, 1.0, 2.0, np.nan, -2.0, (1 + 2 * 3 - 2) / 4]
    np.testing.assert_allclose(scores_at(segments, offsets), expected)
    np.testing.assert_array_equal(marks_at(np.array([[2, 7, 0.5]]), offsets), [0, 0, 0.5, 0.5, 0, 0.5])


@pytest.mark.parametrize(("modality", "rows", "parts"), [
    ("text", [
        {"text": TEXT, "probabilities": [0.5, 0.2]}, {"text": "b", "probabilities": {"neutral": 1.0}},
        {"text": "c", "probabilities": [0.2, 0.3, 0.5]}, {"text": "d", "rationale": [[0, 9]]},
        {"text": "ef", "scores": [[0, 1, float("nan")]]}, {"text": "gh", "scores": [[0, 2, 1], [1, 2, 1]]},
        {"text": "d"}, {"label": "positive"}, {"id": "0" * 16, "quotes": ["x"]},
        {"text": "wonder", "quotes": "wonder"}, {"text": "won", "quotes": [3]},
        {"text": "five", "rationale": 5}, {"text": "six", "label": "positive", "confidence": "high"},
        {"text": "seven", "scores": [[0, 3]]}, {"text": " ", "label": "positive"},
    ], ["the probabilities [0.5, 0.2] do not sum to 1", "the class 'neutral' is none of negative",
        "3 probabilities for 2 classes", "rationale hold [0, 9], not 0 <= start < end <= 1",
        "scores hold values that are not finite", "scores of passages that overlap", "a text that stands further",
        "no text and no id", "quotes need the text beside them", "quotes are 'wonder', not a list of strings",
        "quotes are '[3]', not a list of strings", "rationale of another form (",
        "class of another form (could not convert", "scores of another form (", "no text and no id"]),  # fmt: skip
    ("image", [
        {"file": "a", "boxes": [[3, 0, 3, 2]]}, {"file": "b", "boxes": [[0, 0, 1]]},
        {"file": "c", "map": [[1, 2], [3]]}, {"file": "d", "map": [[float("nan")]]}, {"file": "e", "map": []},
        {"file": "./a", "label": "positive"}, {"label": "positive"}, {"file": "f", "boxes": [[0, 0, 1, 1, -1]]},
        {"file": "g", "label": "neutral"}, {"file": "h", "map": 3},
    ], ["boxes hold [3, 0, 3, 2], not 0 <= left < right", "boxes hold [0, 0, 1], not left, top",
        "the map is no grid of finite numbers", "the map is no grid", "the map is no grid",
        "a file that stands further", "no file and no id", "boxes hold [0, 0, 1, 1], not 0 <= left", "the class",
        "the map is no grid"]),  # fmt: skip
])  # fmt: skip
def test_all_mistakes_of_a_file_together(tmp_path, modality, rows, parts):
    with pytest.raises(DataError) as caught:
        known(tmp_path, *rows, modality=modality)
    *said, fix = str(caught.value).removeprefix(f"{tmp_path / 'k.jsonl'}: ").split("; ")
    assert fix == "fix: correct these rows or take them out"
    assert len(said) == len(parts) and "\n" not in str(caught.value)
    for number, (mistake, part) in enumerate(zip(said, parts, strict=True), 1):
        assert mistake.startswith(f"line {number}: {part}")


@pytest.mark.parametrize(("modality", "row", "message"), [
    ("text", {"text": "a", "rational": []}, "unknown columns: rational; columns: text, id"),
    ("text", {"label": "positive"}, "neither 'text' nor 'id'"),
    ("image", {"file": "a", "rationale": []}, "unknown columns: rationale; columns: file, id, .*boxes, map"),
    ("image", {"text": "a", "label": "positive"}, "unknown columns: text")])  # fmt: skip
def test_files_that_are_no_knowledge(tmp_path, modality, row, message):
    with pytest.raises(DataError, match=message):
        known(tmp_path, row, modality=modality)


@pytest.mark.parametrize("preprocessor", [WORDS, BYTES])
@pytest.mark.parametrize(
    "said", [{"rationale": [[2, 11], [22, 32]]}, {"quotes": ["wonderful", "not a good"]},
             {"rationale": [[2, 11, 1.0]], "quotes": ["not a good", "never said"]}])  # fmt: skip
def test_passages_mark_the_tokens_of_any_tokenizer(tmp_path, preprocessor, said):
    knowledge = known(tmp_path, {"text": TEXT, **said})
    (marks,) = align(knowledge, [TEXT], preprocessor, 2).marks
    offsets = preprocessor.encode([TEXT])[0].offsets
    marked = "".join(TEXT[start:end] for (start, end), mark in zip(offsets, marks, strict=True) if mark)
    assert marked.replace(" ", "") == "wonderfulnotagood"
    assert knowledge.lost_quotes == len([quote for quote in said.get("quotes", ()) if quote not in TEXT])


def test_packed_scores_come_back_and_damaged_ones_are_named(tmp_path):
    offsets = np.array(BYTES.encode([TEXT])[0].offsets)[1:-1]
    scores = np.column_stack([offsets, np.random.default_rng(0).normal(size=len(offsets)) * 3])
    for named in ({"id": text_id(TEXT)}, {"text": TEXT}):
        rows = [{**named, "probabilities": [0.25, 0.75], "scores": scores}]
        path = write_knowledge(tmp_path / "k.parquet", rows, overwrite="text" in named)
        (found,) = align(read_knowledge(path, LABELS), [TEXT], BYTES, 2).scores
        assert np.isnan(found[[0, -1]]).all()
        np.testing.assert_allclose(found[1:-1], scores[:, 2], rtol=0, atol=np.abs(scores[:, 2]).max() / 127)
    with pytest.raises(DataError, match="exists; fix: another file, or --overwrite"):
        write_knowledge(path, [])
    scores = np.array([[0, 1, 1.0], [2, 11, -1.0], [12, 15, 0.5]])
    path = write_knowledge(tmp_path / "damaged.parquet", [{"text": TEXT, "scores": scores}])
    (row,) = parquet.read_table(path).to_pylist()
    for change in ({"packed_scale": float("nan")}, {"packed_scale": None}, {"packed_gaps": None},
                   {"packed_lengths": b"\x01"}, {"packed_gaps": b"\xff" * 3}):  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist([row | change]), path)
        with pytest.raises(DataError, match="packed scores that are damaged: rekd-train record writes them"):
            read_knowledge(path, LABELS)


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_cannot_be_packed_stand_beside_those_that_can(tmp_path, order):
    far = {"text": "a" + " " * 300 + "b", "scores": np.array([[0, 1, 1.5], [1, 1, 3.0], [301, 302, -2.5]])}
    rows = [far, {"text": TEXT, "scores": np.array([[0, 1, 1.0], [1, 1, 0.5]]), "rationale": [[0, 1]]}][::order]
    found = read_knowledge(write_knowledge(tmp_path / "k.parquet", rows), LABELS).statements
    np.testing.assert_allclose(found[text_id(far["text"])].scores, far["scores"][[0, 2]])
    assert len(found[text_id(TEXT)].scores) == 2 and len(found[text_id(TEXT)].marks) == 1


@pytest.mark.parametrize(("lay", "given", "expected"), [
    (on_patches, [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]), (on_patches, [[7]], [[7, 7, 7], [7, 7, 7]]),
    (on_patches, [[1, 3]], [[1, 2, 3], [1, 2, 3]]),
    (on_patches, [[0, 2, 4, 6, 8, 10], [2, 4, 6, 8, 10, 12], [0] * 6, [4] * 6], [[2, 6, 10], [2, 2, 2]]),
    (on_patches, [[0], [3], [6]], [[1] * 3, [5] * 3]),
    (marked_patches, [[0, 0, 1 / 3, 0.5, 1]], [[1, 0, 0], [0, 0, 0]]),
    (marked_patches, [[0, 0, 0.5, 1, 1]], [[1, 0.5, 0], [1, 0.5, 0]]),
    (marked_patches, [[0, 0, 0.5, 1, 0.5], [0, 0, 1 / 3, 0.5, 0.2]], [[0.5, 0.25, 0], [0.5, 0.25, 0]]),
    (marked_patches, [[0.4, 0.6, 0.5, 0.7, 1]], [[0, 0, 0], [0, 1, 0]]),
    (marked_patches, [[0.4, 0.45, 0.5, 0.55, 1]], [[0, 0.5, 0], [0, 0.5, 0]]),
    (marked_patches, np.zeros((0, 5)), [[0, 0, 0], [0, 0, 0]])])  # fmt: skip
def test_maps_and_boxes_of_any_size_lie_on_patches_by_area(lay, given, expected):
    found = lay(np.array(given, dtype=np.float32), 2, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(2, 3), expected, atol=1e-6)


def test_statements_about_images_are_found_by_path_bytes_or_pixels_and_boxes_are_of_the_whole_image(tmp_path):
    picture, other = tmp_path / "negative" / "a.png", tmp_path / "b.png"
    picture.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)).save(picture)
    other.write_bytes(b"another")
    arrays = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 1), dtype=np.uint8)
    ids = [hashlib.sha256(content).hexdigest()[:16] for content in (picture.read_bytes(), arrays[1].tobytes())]
    for images, row in (
        ([other, picture], {"file": "./negative/a.png"}), ([other, picture], {"id": ids[0]}), (arrays, {"id": ids[1]}),
    ):  # fmt: skip
        said = aligned(tmp_path, images, {**row, "label": "positive", "map": [[2.0]]})
        np.testing.assert_allclose(said.probabilities, [[np.nan] * 2, [0.1, 0.9]], atol=1e-6)
        assert said.scores[0] is None and said.scores[1].tolist() == [2.0] * 6 and said.marks == [None, None]
    row = {"file": "negative/a.png", "boxes": [[8, 0, 16, 8], [16, 8, 24, 16, 0.5]]}  # it is twice what is read
    said = aligned(tmp_path, [picture], row)
    np.testing.assert_allclose(said.marks[0].reshape(2, 3), [[0, 1, 0], [0, 0, 0.5]], atol=1e-6)
    assert said.scores == [None] and np.isnan(said.probabilities).all()
    with pytest.raises(DataError, match=r"negative/a.png: a box leaves the image, which has 24 x 16 pixels"):
        aligned(tmp_path, [picture], row | {"boxes": [[0, 0, 25, 4]]})
