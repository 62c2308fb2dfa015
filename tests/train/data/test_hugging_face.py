"""Data sets of the package datasets: its own splits and class names, read from the disk; rows: test_own.py."""

import json
import sys

import numpy as np
import pytest
from conftest import tiny_tokenizer_json
from PIL import Image

from rekd_train.config.run import DataConfig
from rekd_train.data import encode_splits, load_data
from rekd_train.data.knowledge import read_knowledge, with_unlabelled
from rekd_train.errors import DataError, MissingExtraError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.text import TextPreprocessor, TextSettings

datasets = pytest.importorskip("datasets")

CLASSES = datasets.ClassLabel(names=["positive", "negative"])


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr("rekd_train.data.table_files._READ_AT_ONCE", 4)


def part(word, count, labels=(0, 1)):
    rows = [{"text": f"a {word} film, number {i}", "label": labels[i % 2]} for i in range(count)]
    return datasets.Dataset.from_list(rows).cast_column("label", CLASSES)


def config(path, **settings) -> DataConfig:
    return DataConfig(name="hf", path=str(path), **{"dev_share": 0.25, "test_share": 0.25, **settings})


def saved(path, splits):
    (splits if isinstance(splits, datasets.Dataset) else datasets.DatasetDict(splits)).save_to_disk(path)
    return path


def found(data) -> dict[str, tuple]:
    """Of each split how many texts, and their second words."""
    return {name: (len(each), *{text.split()[1] for text in each.texts}) for name, each in data.splits.items()}


TRAIN, ALONE = part("train", 24), {"train": (12, "train"), "dev": (6, "train"), "test": (6, "train")}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": TRAIN, "validation": part("dev", 8), "test": part("test", 8)},
         {"train": (24, "train"), "dev": (8, "dev"), "test": (8, "test")}),
        ({"train": TRAIN, "dev": part("dev", 8), "unsupervised": part("unsupervised", 8)},
         {"train": (18, "train"), "dev": (8, "dev"), "test": (6, "train")}),
        ({"train": TRAIN, "test": part("test", 2, (-1, -1))}, ALONE),  # without labels it counts as missing
        ({"train": TRAIN}, ALONE), ({"everything": TRAIN}, ALONE), (TRAIN.with_format("numpy"), ALONE),
    ],
)  # fmt: skip
def test_its_own_splits_are_taken_and_the_others_made(tmp_path, splits, expected):
    data = load_data(config(saved(tmp_path / "saved", splits)))
    assert found(data) == expected and data.label_names == ("positive", "negative") and data.duplicates == 0
    for examples in data.splits.values():
        assert [int(text.split()[-1]) % 2 for text in examples.texts] == examples.labels.tolist()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a CSV file open
@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "."])
def test_files_are_read_as_load_dataset_reads_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    rows = [{"review": f"film {i}", "stars": i % 2 + 1} for i in range(24)]
    lines = ["review,stars", *(f"{row['review']},{row['stars']}" for row in rows)]
    lines = lines if name == "mine.csv" else map(json.dumps, rows)
    (tmp_path / "files" / ("train.jsonl" if name == "." else name)).write_text("\n".join(lines))
    data = load_data(config(tmp_path / "files" / name, text_column="review", label_column="stars"))
    assert [len(each) for each in data.splits.values()] == [12, 6, 6] and data.label_names == ("1", "2")


@pytest.mark.parametrize("path, asked", [("owner/name", ("owner/name", None)), ("owner/name:en", ("owner/name", "en"))])
def test_a_name_that_is_no_path_is_looked_for_on_the_hub(monkeypatch, path, asked):
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: {"train": part(str(given), 24)})
    data = load_data(config(path))
    assert str(asked) in data.splits["train"].texts[0] and path in data.origin


def test_texts_stay_on_the_disk_until_they_are_tokenised(tmp_path):
    data = load_data(config(saved(tmp_path / "saved", part("good", 40)), train_examples=10))
    train = data.splits["train"]
    assert len(train) == 10 and not isinstance(train.texts, list)
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48))
    split = encode_splits(data, preprocessor, config(tmp_path))["train"]
    for ids, text in zip(split.ids, train.texts, strict=True):
        assert ids.tolist() == preprocessor.encode([text])[0].ids
    (tmp_path / "k.jsonl").write_text(json.dumps({"text": "a new one, number 3", "label": "positive"}))
    more = with_unlabelled(data, read_knowledge(tmp_path / "k.jsonl", data.label_names)).splits["train"]
    assert [*more.texts] == [*train.texts, "a new one, number 3"] and not isinstance(more.texts, list)


def test_what_cannot_be_read_is_one_line_with_the_fix(tmp_path, monkeypatch):
    path, damaged = (saved(tmp_path / name, part("good", 4)) for name in ("saved", "damaged"))
    (damaged / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    (tmp_path / "empty").mkdir()
    for place, settings, message in (
        (path, {"text_column": "review", "label_column": "stars"},
         "no column 'review' and no column 'stars'; it has: text, label; fix: --set data.text_column"),
        (tmp_path / "nowhere", {}, "does not exist; fix: --set data.path"), (tmp_path / "empty", {}, "cannot be read"),
        (damaged, {}, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message) as caught:
            load_data(config(place, **settings))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"datasets.*\[data\]"):
        load_data(config(path))


@pytest.mark.parametrize("damaged", [False, True])
def test_images_are_decoded_when_they_are_encoded(tmp_path, damaged):
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 8, 9, 3), dtype=np.uint8)
    features = datasets.Features({"picture": datasets.Image(), "label": CLASSES})
    values = [Image.fromarray(image) for image in pixels]
    if damaged:
        values[5] = {"bytes": b"none", "path": None}
    made = {"picture": values, "label": [i % 2 for i in range(24)]}
    path = saved(tmp_path / "saved", datasets.Dataset.from_dict(made, features=features))
    settings = config(path, image_column="picture")
    data = load_data(settings)
    assert data.duplicates is None and "images" in data.origin
    preprocessor = ImagePreprocessor(ImageSettings(height=8, width=9, channels=3, rows=2, columns=3))
    if damaged:
        images = next(examples.images for examples in data.splits.values() if 5 in examples.images.rows)
        with pytest.raises(DataError, match="column 'picture', rows 6 to 6"):
            images[list(images.rows).index(5)]
        return
    for name, split in encode_splits(data, preprocessor, settings).items():
        rows = data.splits[name].images.rows
        assert (split.pixels == pixels[rows]).all() and (split.labels == rows % 2).all()
