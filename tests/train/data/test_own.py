"""The user's own texts and images: every source, and what is wrong said by line before any training."""

import csv
import json
import sys

import numpy as np
import pytest
from conftest import tiny_tokenizer_json
from PIL import Image

from rekd_train.config.run import DataConfig
from rekd_train.data import encode_splits, is_unsplit, load_data, load_whole
from rekd_train.data.knowledge import read_knowledge, with_unlabelled
from rekd_train.errors import DataError, MissingExtraError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.text import TextPreprocessor, TextSettings

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"text": f"{'bad' if i % 2 else 'good'} text, number {i}", "label": "neg" if i % 2 else "pos"} for i in range(40)]
SOURCES = {"a.csv": "line {}", "a.jsonl": "line {}", "a.parquet": "row {}", "a.hf": "train row {}"}
"""What messages call a row; 'hf' is a folder of the package datasets."""


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr("rekd_train.data.table_files._READ_AT_ONCE", 4)


def config(path, **settings) -> DataConfig:
    name = "hf" if str(path).endswith(".hf") else "table"
    return DataConfig(**{"name": name, "path": str(path), "dev_share": 0.25, "test_share": 0.25, **settings})


def saved(path, splits):
    (splits if isinstance(splits, datasets.Dataset) else datasets.DatasetDict(splits)).save_to_disk(path)
    return path


def write(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(row | ({"why": json.dumps(row["why"])} if row.get("why") else {}) for row in rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".hf":
        saved(path, datasets.Dataset.from_list(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_splits(path, **splits):
    if path.suffix == ".hf":
        return saved(path, {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    path.mkdir()
    for name, rows in splits.items():
        write(path / f"{name}.csv", rows)
    return path


def message_of(path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        load_data(config(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(data) -> dict[str, int]:
    return {name: len(part) for name, part in data.splits.items()}


@pytest.mark.parametrize("name", [*SOURCES, "a.tsv", "a.ndjson"])
def test_every_source_gives_the_same_examples(tmp_path, name):
    data = load_data(config(write(tmp_path / name, ROWS)))
    assert data.label_names == ("neg", "pos") and sizes(data) == {"train": 20, "dev": 10, "test": 10}
    for part in data.splits.values():
        assert all(text.startswith("good") == bool(label) for text, label in zip(part.texts, part.labels, strict=True))
    assert sorted(text for part in data.splits.values() for text in part.texts) == sorted(row["text"] for row in ROWS)
    same = load_data(config(write(tmp_path / "reference.csv", ROWS)))
    assert [*data.splits["dev"].texts] == same.splits["dev"].texts


@pytest.mark.parametrize("name", SOURCES)
def test_whole_numbers_are_classes_in_their_order_and_columns_have_the_names_that_are_said(tmp_path, name):
    path = write(tmp_path / name, [{"review": f"text {i}", "stars": i % 11} for i in range(110)])
    data = load_data(config(path, text_column="review", label_column="stars"))
    assert data.label_names == tuple(str(i) for i in range(11))
    train = data.splits["train"]
    assert [int(text.split()[1]) % 11 for text in train.texts] == train.labels.tolist()
    message = message_of(path)
    assert "no column 'text'" in message and "review, stars" in message and "data.text_column" in message


def numbered(form: str, *more: object) -> bytes:
    return "".join(form.format(i, i % 2, *more) + "\n" for i in range(20)).encode()


@pytest.mark.parametrize(("name", "content", "names"), [
    ("a.csv", b"\xef\xbb\xbftext,label\n" + numbered("t{},{}"), ("0", "1")),
    ("a.jsonl", b"\xef\xbb\xbf" + numbered('{{"text": "t{}", "label": {}}}'), ("0", "1")),
    ("a.csv", b"text,label\nNA,NA\nNone,None\n" + numbered("t{0},NA\nu{0},None"), ("NA", "None")),
    ("a.csv", b"text,label\n" + numbered("t{0}{2},{1}", " word" * 40_000), ("0", "1")),
], ids=["byte order mark", "of JSON", "words that look like nothing stay words", "long texts"])  # fmt: skip
def test_what_files_may_hold(tmp_path, name, content, names):
    (tmp_path / name).write_bytes(content)
    assert load_data(config(tmp_path / name)).label_names == names


def test_splits_come_from_a_column_and_may_lack_rationales(tmp_path):
    parts = [("train", "dev", "test")[i // 2 % 3] for i in range(len(ROWS))]
    why = [[[0, 4]] if part == "train" else None for part in parts]
    rows = [{**row, "part": part, "why": spans} for row, part, spans in zip(ROWS, parts, why, strict=True)]
    data = load_data(config(write(tmp_path / "a.csv", rows), split_column="part", rationale_column="why"))
    for name, part in data.splits.items():
        assert sorted(part.texts) == sorted(row["text"] for row in rows if row["part"] == name)
    assert [part.rationales is None for part in data.splits.values()] == [False, True, True]
    rows[7]["part"] = "training"
    path = write(tmp_path / "a.csv", rows)
    assert "line 9: the split 'training' is none of" in message_of(path, split_column="part")
    no_train = write(path, [row | {"part": "test"} for row in ROWS])
    assert "no row of the split 'train'" in message_of(no_train, split_column="part")
    for name, problem in (("folder", "no training file"), ("a.hf", "no split 'train', but test, val")):
        assert problem in message_of(write_splits(tmp_path / name, test=ROWS, val=ROWS))
    rows = [row | {"why": [[0, 4]] if i % 4 < 2 else None} for i, row in enumerate(ROWS)]
    for name in SOURCES:
        path = write(tmp_path / f"why-{name}", rows)
        for part in load_data(config(path, rationale_column="why")).splits.values():
            numbers = [int(text.split()[-1]) for text in part.texts]
            assert part.rationales == [[(0, 4)] if number % 4 < 2 else None for number in numbers]
        assert load_data(config(path)).splits["train"].rationales is None


@pytest.mark.parametrize(("name", "place"), [("folder", "{}.csv line {}"), ("a.hf", "{} row {}")])
def test_an_example_is_kept_once_where_it_measures_and_contradicting_labels_are_named(tmp_path, name, place):
    turned = [ROWS[1] | {"label": "pos"}, ROWS[1] | {"label": "pos"}, ROWS[2] | {"label": "pso"}]
    test = [*ROWS[20:], ROWS[3] | {"label": "pos"}]
    data = load_data(config(write_splits(tmp_path / name, train=[*ROWS[:20], ROWS[0], ROWS[30], *turned], test=test)))
    assert sizes(data) == {"train": 15, "dev": 4, "test": 21} and "6 duplicates dropped" in data.origin
    assert {ROWS[30]["text"], ROWS[3]["text"]} < {*data.splits["test"].texts} and data.duplicates == 6
    assert data.label_names == ("neg", "pos"), "no class without an example"
    at = [place.format(split, row + (name == "folder")) for split, row in (("test", 21), ("train", 4), ("train", 2),
          ("train", 23), ("train", 24), ("train", 3), ("train", 25))]  # fmt: skip
    assert data.contradictions == (f"{at[0]} 'pos' (kept), {at[1]} 'neg': 'bad text, number 3'",
                                   f"{at[2]} 'neg' (kept), {at[3]} 'pos', {at[4]} 'pos': 'bad text, number 1'",
                                   f"{at[5]} 'pos' (kept), {at[6]} 'pso': 'good text, number 2'")  # fmt: skip


def test_all_bad_rows_are_named_at_once_with_the_lines_of_the_file(tmp_path):
    """A line is what an editor shows: blank lines and breaks within a text count."""
    path = tmp_path / "a.csv"
    good = "".join(f"t{i},{('a', 'b')[i % 2]},\n" for i in range(20))
    path.write_text(
        f'text,label,why\n"two\nlines",a,\n\n,a,\nx,,\n,,\nshort,b,"[[0, 9]]"\ny,c,\nz,a,"[1, 2]"\nz,a,no\n{good}')
    assert message_of(path, rationale_column="why", labels=("a", "b")) == (
        f"{path}: line 5: the text is empty; line 6: the label is missing; line 7: the text is empty; "
        "line 7: the label is missing; line 8: the rationale holds [0, 9], not 0 <= start < end <= 5, the text's "
        "length; line 10: the rationale [1, 2] is no list of [start, end]; line 11: the rationale 'no' is not JSON, "
        "a list of [start, end]; line 9: the label 'c' is none of the 2 classes; classes: a, b; fix: correct the "
        "labels, or list every class: --set 'data.labels=[\"a\", \"b\"]'")
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"text": "", "label": "a"}\n\n{"text": "x", "label": ""}\n')
    assert "a.jsonl: line 2: the text is empty; line 4: the label is missing; fix" in message_of(lines)
    rows = [*ROWS, *({"text": "", "label": "neg"} for _ in range(1030))]
    assert "line 61: the text is empty; and 1,010 more; fix" in message_of(write(path, rows))
    wrong = [{}] * 37 + [{"text": "  "}, {"label": None}, {"why": [[3, 3]]}]
    for name, place in SOURCES.items():
        path = write(tmp_path / f"3-{name}", [{**r, "why": None, **more} for r, more in zip(ROWS, wrong, strict=True)])
        at = [place.format(row + (name == "a.csv")) for row in (38, 39, 40)]
        assert message_of(path, rationale_column="why") == (
            f"{path}: {at[0]}: the text is empty; {at[1]}: the label is missing; {at[2]}: the rationale holds [3, 3], "
            "not 0 <= start < end <= 19, the text's length; fix: correct these rows or take them out")


@pytest.mark.parametrize("name", ["a.csv", "a.hf"])
def test_labels_are_compared_with_the_classes_given(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    data = load_data(config(path, labels=("pos", "neg")))
    assert data.label_names == ("pos", "neg")
    assert [text.startswith("bad") for text in data.splits["train"].texts] == data.splits["train"].labels.tolist()
    message = message_of(path, labels=("pos", "neutral"))
    assert ": the label 'neg' is none of the 2 classes" in message and "data.labels" in message


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("a.csv", "text,label\ncafé,pos\n".encode("latin-1"), "a.csv is not UTF-8: byte 14 .*iconv"),
    ("a.jsonl", '{"text": "café", "label": "pos"}\n'.encode("latin-1"), "a.jsonl is not UTF-8"),
    ("a.jsonl", b'{"text": \n{"text": "a", "label": 1}\n\n[]\n',
     "line 1 is not JSON: Expecting value, at its character 9; line 4 is not an object"),
    ("a.jsonl", b'{"text": "\\ud83d\\ude00", "label": "a"}\n{"text": "\\ud83d", "label": "b"}\n',
     "read: line 2 holds half a character"),
    ("a.csv", b"text,label\na,b\nc,d,e,f\n\ng,h,i\n",
     "a.csv cannot be read: line 3 has 4 values; line 5 has 3 values; the header names 2"),
    ("a.csv", b'text,label\na,b\n"c\nd,e\n', "line 3: unexpected end of data; fix: write each quote"),
    ("a.csv", b"text,label\n", "holds no rows"), ("a.csv", b"", "holds no rows"),
    ("a.parquet", b"PAR1 not really", "a.parquet cannot be read"), ("a.xlsx", b"", "none of .csv"),
    ("a.csv", None, "does not exist"),
    ("a.csv", b"text;label\na;b\n", "has no column 'text'; it has: text;label; fix: separate the columns of a .csv"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_data(config(tmp_path / name))


CLASSES = datasets.ClassLabel(names=["positive", "negative"])


def part(word, count, labels=(0, 1)):
    rows = [{"text": f"a {word} film, number {i}", "label": labels[i % 2]} for i in range(count)]
    return datasets.Dataset.from_list(rows).cast_column("label", CLASSES)


TRAIN, ALONE = part("train", 24), {"train": 12, "dev": 6, "test": 6}


@pytest.mark.parametrize(("splits", "expected"), [
    ({"train": TRAIN, "validation": part("dev", 8), "test": part("test", 8)}, {"train": 24, "dev": 8, "test": 8}),
    ({"train": TRAIN, "dev": part("dev", 8), "unsupervised": part("no", 9)}, {"train": 18, "dev": 8, "test": 6}),
    ({"train": TRAIN, "test": part("test", 2, (-1, -1))}, ALONE),  # without labels it counts as missing
    ({"train": TRAIN}, ALONE), ({"everything": TRAIN}, ALONE), (TRAIN.with_format("numpy"), ALONE)])  # fmt: skip
def test_its_own_splits_are_taken_and_the_others_made(tmp_path, splits, expected):
    data = load_data(config(saved(tmp_path / "a.hf", splits)))
    assert sizes(data) == expected and data.label_names == ("positive", "negative") and data.duplicates == 0
    for examples in data.splits.values():
        assert [int(text.split()[-1]) % 2 for text in examples.texts] == examples.labels.tolist()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a CSV file open
@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "."])
def test_files_are_read_as_load_dataset_reads_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    rows = [{"review": f"film {i}", "stars": i % 2 + 1} for i in range(24)]
    write(tmp_path / "files" / ("train.jsonl" if name == "." else name), rows)
    data = load_data(config(tmp_path / "files" / name, name="hf", text_column="review", label_column="stars"))
    assert sizes(data) == ALONE and data.label_names == ("1", "2")


def test_names_that_are_no_path_are_looked_for_on_the_hub_and_what_cannot_be_read_is_one_line(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *given: {"train": part(str(given), 24)})
        for path, asked in (("owner/name", ("owner/name", None)), ("owner/name:en", ("owner/name", "en"))):
            data = load_data(config(path, name="hf"))
            assert str(asked) in data.splits["train"].texts[0] and path in data.origin
    path, damaged = (saved(tmp_path / name, part("good", 4)) for name in ("a.hf", "b.hf"))
    (damaged / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    (tmp_path / "c.hf").mkdir()
    columns = "no column 'review' and no column 'stars'; it has: text, label; fix: --set data.text_column"
    assert columns in message_of(path, text_column="review", label_column="stars")
    assert "does not exist; fix: --set data.path" in message_of(tmp_path / "no.hf")
    assert "cannot be read" in message_of(damaged) and "cannot be read" in message_of(tmp_path / "c.hf")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"datasets.*\[data\]"):
        load_data(config(path))


def test_texts_stay_on_the_disk_until_they_are_tokenised(tmp_path):
    data = load_data(config(saved(tmp_path / "a.hf", part("good", 40)), train_examples=10))
    train = data.splits["train"]
    assert len(train) == 10 and not isinstance(train.texts, list)
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48))
    split = encode_splits(data, preprocessor, config("a.hf"))["train"]
    for ids, text in zip(split.ids, train.texts, strict=True):
        assert ids.tolist() == preprocessor.encode([text])[0].ids
    (tmp_path / "k.jsonl").write_text(json.dumps({"text": "a new one, number 3", "label": "positive"}))
    more = with_unlabelled(data, read_knowledge(tmp_path / "k.jsonl", data.label_names)).splits["train"]
    assert [*more.texts] == [*train.texts, "a new one, number 3"] and not isinstance(more.texts, list)


@pytest.mark.parametrize("damaged", [False, True])
def test_images_are_decoded_when_they_are_encoded(tmp_path, damaged):
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 8, 9, 3), dtype=np.uint8)
    features = datasets.Features({"picture": datasets.Image(), "label": CLASSES})
    values = [Image.fromarray(image) for image in pixels]
    if damaged:
        values[5] = {"bytes": b"none", "path": None}
    made = {"picture": values, "label": [i % 2 for i in range(24)]}
    path = saved(tmp_path / "a.hf", datasets.Dataset.from_dict(made, features=features))
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


TWENTY = range(20)


def pictures(root, seeds=TWENTY, **more: int) -> DataConfig:
    """A folder of images of two classes; ``more``: paths, with __ for /, and their seeds."""
    paths = {f"{'cats' if seed % 2 else 'dogs'}/{seed}.PNG": seed for seed in seeds}
    for name, seed in (paths | {f"{path.replace('__', '/')}.png": seed for path, seed in more.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return DataConfig(name="image_folder", path=str(root), dev_share=0.2, test_share=0.2)


def test_a_folder_for_each_class_is_split_or_taken_whole(tmp_path):
    config = pictures(tmp_path, cats__again=1, dogs__other=3)
    for ending in (".rationale.png", ".RATIONALE.PNG"):
        (tmp_path / "cats" / "5.PNG").with_suffix(ending).write_bytes((tmp_path / "cats" / "5.PNG").read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_data(config)
    assert data.label_names == ("cats", "dogs") and "2 duplicates dropped" in data.origin
    assert sizes(data) == {"train": 12, "dev": 4, "test": 4}
    for part in data.splits.values():
        assert [path.parent.name for path in part.images] == [data.label_names[label] for label in part.labels]
    assert data.contradictions == ("cats/3.PNG 'cats' (kept), dogs/other.png 'dogs'",)
    whole = load_whole(config, ("dogs", "birds", "cats"))
    assert is_unsplit(config) and np.bincount(whole.labels).tolist() == [11, 0, 11]
    with pytest.raises(DataError, match="cats/1.PNG: the label 'cats' is none of the 1 classes; cats/11.PNG"):
        load_whole(config, ("dogs",))


def test_folders_for_splits_and_those_that_make_no_sense(tmp_path):
    for split, seeds in (("val", range(20, 24)), ("test", range(24, 28))):
        pictures(tmp_path / split, seeds)
    pictures(tmp_path / "train", cats__leak=25)
    config = DataConfig(name="image_folder", path=str(tmp_path))
    data = load_data(config)
    assert not is_unsplit(config) and sizes(data) == {"train": 20, "dev": 4, "test": 4}
    assert not any("leak" in str(path) for path in data.splits["train"].images), "kept where it measures"
    pictures(tmp_path / "test", [], birds__1=99)
    with pytest.raises(DataError, match="'birds' is none of the 2 classes"):
        load_data(config)
    (tmp_path / "bare").mkdir()
    (tmp_path / "outer" / "empty").mkdir(parents=True)
    pictures(tmp_path / "one", range(0, 10, 2))
    for folder, problem in (("nowhere", "is no folder"), ("bare", "no folders of images"),
                            ("outer", "empty holds no images"), ("one", "one class")):  # fmt: skip
        with pytest.raises(DataError, match=problem):
            load_data(DataConfig(name="image_folder", path=str(tmp_path / folder)))
