"""Data sets of the package datasets: its own splits and class names, read from the disk, what is wrong said by row."""

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


def part(texts, labels, classes=CLASSES, **columns):
    features = datasets.Features({"text": datasets.Value("string"), "label": classes} | {
        name: datasets.Sequence(datasets.Sequence(datasets.Value("int64"))) for name in columns
    })  # fmt: skip
    return datasets.Dataset.from_dict({"text": texts, "label": labels, **columns}, features=features)


def numbered(word, count):
    return part([f"a {word} film, number {i}" for i in range(count)], [i % 2 for i in range(count)])


def config(path, **settings) -> DataConfig:
    return DataConfig(name="hf", path=str(path), **{"dev_share": 0.25, "test_share": 0.25, **settings})


def saved(path, splits):
    (splits if isinstance(splits, datasets.Dataset) else datasets.DatasetDict(splits)).save_to_disk(path)
    return path


def message_of(path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        load_data(config(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(data) -> dict[str, int]:
    return {name: len(examples) for name, examples in data.splits.items()}


def number(text) -> int:
    return int(text.split()[-1])


@pytest.mark.parametrize("own, expected", [
    (("train", "validation", "test"), {"train": 24, "dev": 8, "test": 8}),
    (("train", "dev", "unsupervised"), {"train": 18, "dev": 8, "test": 6}),
    (("train",), {"train": 12, "dev": 6, "test": 6}),
    (("everything",), {"train": 12, "dev": 6, "test": 6}),
])  # fmt: skip
def test_its_own_splits_are_taken_and_the_others_made(tmp_path, own, expected):
    splits = {name: numbered(name, 8 if place else 24) for place, name in enumerate(own)}
    data = load_data(config(saved(tmp_path / "saved", splits)))
    assert sizes(data) == expected and data.label_names == ("positive", "negative")
    for examples in data.splits.values():
        assert [number(text) % 2 for text in examples.texts] == examples.labels.tolist()
    texts = [text for examples in data.splits.values() for text in examples.texts]
    assert len(set(texts)) == len(texts) and not any("unsupervised" in text for text in texts)
    if "validation" in own:
        assert all("validation" in text for text in data.splits["dev"].texts)


def test_one_data_set_without_splits_may_have_been_saved(tmp_path):
    path = saved(tmp_path / "saved", numbered("good", 24).with_format("numpy"))
    assert sizes(load_data(config(path))) == {"train": 12, "dev": 6, "test": 6}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a CSV file open
@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "."])
def test_files_are_read_as_load_dataset_reads_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"review": f"film {i}", "stars": i % 2 + 1} for i in range(24)]
    if name.endswith(".csv"):
        (folder / name).write_text("review,stars\n" + "".join(f"{row['review']},{row['stars']}\n" for row in rows))
    else:
        file = folder / ("train.jsonl" if name == "." else name)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(config(folder / name, text_column="review", label_column="stars"))
    assert sizes(data) == {"train": 12, "dev": 6, "test": 6} and data.label_names == ("1", "2")


@pytest.mark.parametrize("path, asked", [("owner/name", ("owner/name", None)), ("owner/name:en", ("owner/name", "en"))])
def test_a_name_that_is_no_path_is_looked_for_on_the_hub(monkeypatch, path, asked):
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: {"train": numbered(str(given), 24)})
    data = load_data(config(path))
    assert str(asked) in data.splits["train"].texts[0] and path in data.origin


def test_texts_stay_on_the_disk_until_they_are_tokenised(tmp_path):
    data = load_data(config(saved(tmp_path / "saved", numbered("good", 40)), train_examples=10))
    train = data.splits["train"]
    assert sizes(data)["train"] == 10 and not isinstance(train.texts, list)
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48))
    split = encode_splits(data, preprocessor, config(tmp_path))["train"]
    for ids, text in zip(split.ids, train.texts, strict=True):
        assert ids.tolist() == preprocessor.encode([text])[0].ids
    (tmp_path / "k.jsonl").write_text(json.dumps({"text": "a new one, number 3", "label": "positive"}))
    more = with_unlabelled(data, read_knowledge(tmp_path / "k.jsonl", data.label_names)).splits["train"]
    assert [*more.texts] == [*train.texts, "a new one, number 3"] and not isinstance(more.texts, list)


def test_the_order_of_the_classes_may_be_set(tmp_path):
    path = saved(tmp_path / "saved", numbered("good", 24))
    train = load_data(config(path, labels=("negative", "positive"))).splits["train"]
    assert [1 - number(text) % 2 for text in train.texts] == train.labels.tolist()
    assert "'positive' is none of the 1 classes" in message_of(path, labels=("negative",))


def test_a_text_that_occurs_twice_stays_where_it_measures(tmp_path):
    train, test = numbered("good", 24), part(["a good film, number 3", "other", "other"], [0, 1, 1])
    data = load_data(config(saved(tmp_path / "saved", {"train": train, "test": test})))
    assert "a good film, number 3" not in {*data.splits["train"].texts, *data.splits["dev"].texts}
    assert sorted(data.splits["test"].texts) == ["a good film, number 3", "other"] and data.duplicates == 2
    assert data.contradictions == (
        "test row 1 'positive' (kept), train row 4 'negative': 'a good film, number 3'",
    )  # fmt: skip


def test_a_test_split_without_labels_counts_as_missing(tmp_path):
    hidden = part(["one", "two"], [-1, -1])
    data = load_data(config(saved(tmp_path / "saved", {"train": numbered("good", 24), "test": hidden})))
    assert sizes(data) == {"train": 12, "dev": 6, "test": 6}


def test_human_rationales_are_read_and_stay_with_their_text(tmp_path):
    texts = [f"{'x' * i} film {i}" for i in range(24)]
    spans = [[[i, i + 5]] if i else None for i in range(24)]
    path = saved(tmp_path / "saved", part(texts, [i % 2 for i in range(24)], why=spans))
    for examples in load_data(config(path, rationale_column="why")).splits.values():
        for text, rationale in zip(examples.texts, examples.rationales, strict=True):
            place = number(text)
            assert rationale == ([(place, place + 5)] if place else None)


def test_everything_that_is_wrong_is_said_together(tmp_path):
    words = datasets.Value("string")
    train = part(["good", " ", None, "bad", "fine", "fair"], ["a", "a", "b", "b", None, "a"], words,
                 why=[[[0, 9]], None, None, None, None, None])  # fmt: skip
    test = part(["end", "last"], ["a", "c"], words, why=[None] * 2)
    path = saved(tmp_path / "saved", {"train": train, "test": test})
    message = message_of(path, rationale_column="why")
    for place, problem in (("train row 1", "holds [0, 9]"), ("train row 2", "text is empty"),
                           ("test row 2", "'c' is none"), ("train row 5", "label is missing")):  # fmt: skip
        assert any(said.startswith(place) and problem in said for said in message.split(f"{path}: ")[1].split("; "))
    assert "classes: a, b" in message and "label ''" not in message


def test_missing_columns_and_splits_are_named(tmp_path):
    path = saved(tmp_path / "saved", numbered("good", 4))
    message = message_of(path, text_column="review", label_column="stars")
    assert "'review'" in message and "'stars'" in message and "text, label" in message and "text_column" in message
    two = saved(tmp_path / "two", {"first": numbered("good", 4), "second": numbered("good", 4)})
    assert "no split 'train', but first, second" in message_of(two)


def test_what_cannot_be_read_is_one_line_with_the_fix(tmp_path, monkeypatch):
    assert "does not exist" in message_of(tmp_path / "nowhere") and "data.path" in message_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot be read" in message_of(tmp_path / "empty")
    path = saved(tmp_path / "saved", numbered("good", 4))
    (path / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert "cannot be read" in message_of(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"datasets.*\[data\]"):
        load_data(config(path))


def images(path, damaged=()):
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 8, 9, 3), dtype=np.uint8)
    values = [Image.fromarray(image) for image in pixels]
    features = datasets.Features({"picture": datasets.Image(), "label": CLASSES})
    made = datasets.Dataset.from_dict({"picture": values, "label": [i % 2 for i in range(24)]}, features=features)
    if damaged:
        raw = made.cast_column("picture", datasets.Image(decode=False))["picture"]
        raw = [{"bytes": b"none", "path": None} if i in damaged else value for i, value in enumerate(raw)]
        made = datasets.Dataset.from_dict({"picture": raw, "label": [i % 2 for i in range(24)]}, features=features)
    return pixels, saved(path, made)


def test_images_are_decoded_when_they_are_encoded(tmp_path):
    pixels, path = images(tmp_path / "saved")
    settings = config(path, image_column="picture")
    data = load_data(settings)
    preprocessor = ImagePreprocessor(ImageSettings(height=8, width=9, channels=3, rows=2, columns=3))
    for name, split in encode_splits(data, preprocessor, settings).items():
        rows = data.splits[name].images.rows
        assert (split.pixels == pixels[rows]).all() and (split.labels == rows % 2).all()
    assert data.duplicates is None and "images" in data.origin


def test_a_damaged_image_is_named_by_its_rows(tmp_path):
    _, path = images(tmp_path / "saved", damaged=(5,))
    data = load_data(config(path, image_column="picture"))
    place = next((examples, list(examples.images.rows).index(5)) for examples in data.splits.values()
                 if 5 in examples.images.rows)  # fmt: skip
    with pytest.raises(DataError, match="column 'picture', rows 6 to 6"):
        place[0].images[place[1]]


def test_an_image_column_is_for_these_data_alone():
    with pytest.raises(ValueError, match="image_column .*'hf', not 'digits'"):
        DataConfig(name="digits", image_column="picture")
