"""Recorded knowledge of images: boxes and maps of any size on any patch grid, images found by path or by content."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from rekd_train.data.knowledge import align, read_knowledge
from rekd_train.data.splits import marked_patches, on_patches
from rekd_train.errors import DataError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings

PREPROCESSOR = ImagePreprocessor(ImageSettings(height=8, width=12, channels=1, rows=2, columns=3))
LABELS = ("negative", "positive")


def known(tmp_path, *rows):
    path = tmp_path / "k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_knowledge(path, LABELS, "image")


def aligned(tmp_path, images, *rows):
    return align(known(tmp_path, *rows), images, PREPROCESSOR, len(LABELS), tmp_path)


@pytest.fixture
def picture(tmp_path):
    """A file of 24 x 16 pixels, twice what the model reads."""
    path = tmp_path / "negative" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("grid, expected", [
    ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
    ([[7]], [[7, 7, 7], [7, 7, 7]]),
    ([[1, 3]], [[1, 2, 3], [1, 2, 3]]),
    ([[0, 2, 4, 6, 8, 10], [2, 4, 6, 8, 10, 12], [0] * 6, [4] * 6], [[2, 6, 10], [2, 2, 2]]),
    ([[0], [3], [6]], [[1] * 3, [5] * 3]),
])  # fmt: skip
def test_a_map_of_any_size_is_resampled_by_area(grid, expected):
    found = on_patches(np.array(grid, dtype=np.float32), 2, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(2, 3), expected, rtol=1e-6)


@pytest.mark.parametrize("boxes, expected", [
    ([[0, 0, 1 / 3, 0.5, 1]], [[1, 0, 0], [0, 0, 0]]),
    ([[0, 0, 0.5, 1, 1]], [[1, 0.5, 0], [1, 0.5, 0]]),
    ([[0, 0, 0.5, 1, 0.5], [0, 0, 1 / 3, 0.5, 0.2]], [[0.5, 0.25, 0], [0.5, 0.25, 0]]),
    ([[0.4, 0.6, 0.5, 0.7, 1]], [[0, 0, 0], [0, 1, 0]]),
    ([[0.4, 0.45, 0.5, 0.55, 1]], [[0, 0.5, 0], [0, 0.5, 0]]),
    ([], [[0, 0, 0], [0, 0, 0]]),
])  # fmt: skip
def test_a_box_marks_patches_by_what_it_fills_of_them(boxes, expected):
    found = marked_patches(np.array(boxes, dtype=np.float64).reshape(-1, 5), 2, 3)
    np.testing.assert_allclose(found.reshape(2, 3), expected, atol=1e-6)


def test_boxes_are_in_pixels_of_the_whole_image(tmp_path, picture):
    said = aligned(tmp_path, [picture], {"file": "negative/a.png", "boxes": [[8, 0, 16, 8], [16, 8, 24, 16, 0.5]]})
    np.testing.assert_allclose(said.marks[0].reshape(2, 3), [[0, 1, 0], [0, 0, 0.5]], atol=1e-6)
    assert said.scores == [None] and np.isnan(said.probabilities).all()


@pytest.mark.parametrize("named", ["./negative/a.png", "negative/a.png", "id"])
def test_an_image_file_is_found_by_its_path_or_its_bytes(tmp_path, picture, named):
    row = {"file": named}
    if named == "id":
        row = {"id": hashlib.sha256(picture.read_bytes()).hexdigest()[:16]}
    said = aligned(tmp_path, [picture], {**row, "label": "positive", "map": [[2.0]]})
    np.testing.assert_allclose(said.probabilities, [[0.1, 0.9]], atol=1e-6)
    assert said.scores[0].tolist() == [2.0] * 6 and said.marks == [None]


def test_an_array_is_found_by_its_pixels_and_others_have_no_statement(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 1), dtype=np.uint8)
    row = {"id": hashlib.sha256(images[1].tobytes()).hexdigest()[:16], "probabilities": [0.25, 0.75]}
    said = aligned(tmp_path, images, row)
    np.testing.assert_allclose(said.probabilities, [[np.nan] * 2, [0.25, 0.75]])
    assert said.scores == [None, None] and not said.empty


def test_all_mistakes_of_a_file_together(tmp_path):
    rows = [
        {"file": "a", "boxes": [[3, 0, 3, 2]]}, {"file": "b", "boxes": [[0, 0, 1]]},
        {"file": "c", "map": [[1, 2], [3]]}, {"file": "d", "map": [[float("nan")]]}, {"file": "e", "map": []},
        {"file": "./a", "label": "positive"},
        {"label": "positive"}, {"file": "f", "boxes": [[0, 0, 1, 1, -1]]}, {"file": "g", "label": "neutral"},
        {"file": "h", "map": 3},
    ]  # fmt: skip
    with pytest.raises(DataError) as caught:
        known(tmp_path, *rows)
    message = str(caught.value)
    assert [place for place in range(1, 11) if f"line {place}: " in message] == [*range(1, 11)] and "\n" not in message
    assert "line 2: boxes hold [0, 0, 1], not left" in message and message.count("no grid of finite numbers") == 4
    with pytest.raises(DataError, match="unknown columns: rationale; columns: file, id, .*boxes, map"):
        known(tmp_path, {"file": "a", "rationale": [[0, 1]]})


def test_a_box_that_leaves_its_image_is_named(tmp_path, picture):
    with pytest.raises(DataError, match=r"negative/a.png: a box leaves the image, which has 24 x 16 pixels"):
        aligned(tmp_path, [picture], {"file": "negative/a.png", "boxes": [[0, 0, 25, 4]]})
