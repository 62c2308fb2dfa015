"""The user's own texts and images: every format, and what is wrong said by line before any training."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from rekd_train.config.run import DataConfig
from rekd_train.data import is_unsplit, load_data, load_whole
from rekd_train.errors import DataError

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"text": f"{'bad' if i % 2 else 'good'} text, number {i}", "label": "neg" if i % 2 else "pos"} for i in range(40)
]


def config(path, **settings) -> DataConfig:
    return DataConfig(name="table", path=str(path), **{"dev_share": 0.25, "test_share": 0.25, **settings})


def write(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        load_data(config(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(data) -> dict[str, int]:
    return {name: len(part) for name, part in data.splits.items()}


# tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    data = load_data(config(write(tmp_path / f"mine{suffix}", ROWS)))
    assert data.label_names == ("neg", "pos") and sizes(data) == {"train": 20, "dev": 10, "test": 10}
    for part in data.splits.values():
        assert all(text.startswith("good") == bool(label) for text, label in zip(part.texts, part.labels, strict=True))
    assert sorted(text for part in data.splits.values() for text in part.texts) == sorted(row["text"] for row in ROWS)
    same = load_data(config(write(tmp_path / "reference.csv", ROWS)))
    assert data.splits["dev"].texts == same.splits["dev"].texts


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_whole_numbers_are_classes_in_their_order(tmp_path, name):
    data = load_data(config(write(tmp_path / name, [{"text": f"text {i}", "label": i % 11} for i in range(110)])))
    assert data.label_names == tuple(str(i) for i in range(11))
    train = data.splits["train"]
    assert [int(text.split()[1]) % 11 for text in train.texts] == train.labels.tolist()


def test_columns_have_the_names_that_the_configuration_says(tmp_path):
    path = write(tmp_path / "a.csv", [{"review": row["text"], "stars": row["label"]} for row in ROWS])
    assert load_data(config(path, text_column="review", label_column="stars")).label_names == ("neg", "pos")
    message = message_of(path)
    assert "no column 'text'" in message and "review, stars" in message and "data.text_column" in message


def test_words_that_look_like_nothing_stay_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,NA\nNone,None\n" + "".join(f"t{i},{('NA', 'None')[i % 2]}\n" for i in range(20)))
    assert load_data(config(path)).label_names == ("NA", "None")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_data(config(path)).label_names == ("neg", "pos")


def test_splits_come_from_a_column(tmp_path):
    rows = [row | {"part": ("train", "dev", "test")[i // 2 % 3]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", rows)
    for name, part in load_data(config(path, split_column="part")).splits.items():
        assert sorted(part.texts) == sorted(row["text"] for row in rows if row["part"] == name)
    rows[7]["part"] = "training"
    assert "line 9: the split" in message_of(write(path, rows), split_column="part")
    no_train = write(path, [row | {"part": "test"} for row in ROWS])
    assert "no row of the split 'train'" in message_of(no_train, split_column="part")


def test_splits_come_from_files_and_what_is_missing_from_training(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    assert sizes(load_data(config(tmp_path))) == {"train": 16, "dev": 4, "test": 20}
    (tmp_path / "train.jsonl").unlink()
    assert "no training file" in message_of(tmp_path)


def test_a_text_is_kept_once_where_it_measures(tmp_path):
    write(tmp_path / "train.csv", [*ROWS[:20], ROWS[0], ROWS[30]])
    write(tmp_path / "test.csv", ROWS[20:])
    data = load_data(config(tmp_path))
    assert sizes(data) == {"train": 16, "dev": 4, "test": 20} and "2 duplicates dropped" in data.origin
    assert ROWS[30]["text"] in data.splits["test"].texts


def test_a_text_with_contradicting_labels_is_named(tmp_path):
    rows = [*ROWS, ROWS[0], ROWS[1] | {"label": "pos"}, ROWS[1] | {"label": "pos"}]
    data = load_data(config(write(tmp_path / "a.csv", rows)))
    assert data.duplicates == 3
    assert data.contradictions == ("line 3 'neg' (kept), line 43 'pos', line 44 'pos': 'bad text, number 1'",)
    data = load_data(config(write(tmp_path / "b.csv", [*ROWS, ROWS[0] | {"label": "pso"}])))
    assert data.label_names == ("neg", "pos"), "no class without an example"
    write(tmp_path / "train.csv", rows[:20])
    write(tmp_path / "test.csv", [*rows[20:40], ROWS[3] | {"label": "pos"}])
    data = load_data(config(tmp_path))
    assert data.contradictions == ("test.csv line 22 'pos' (kept), train.csv line 5 'neg': 'bad text, number 3'",)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_human_rationales_travel_with_their_text(tmp_path, name):
    rows = [row | {"why": [[0, 4]] if i % 4 < 2 else None} for i, row in enumerate(ROWS)]
    if name == "a.csv":
        rows = [row | {"why": json.dumps(row["why"]) if row["why"] else ""} for row in rows]
    path = write(tmp_path / name, rows)
    for part in load_data(config(path, rationale_column="why")).splits.values():
        numbers = [int(text.split()[-1]) for text in part.texts]
        assert part.rationales == [[(0, 4)] if number % 4 < 2 else None for number in numbers]
    assert load_data(config(path)).splits["train"].rationales is None


@pytest.mark.parametrize("spans", ["[[0, 999]]", "[[3, 3]]", "[[-1, 2]]", "[1, 2]", "not json"])
def test_a_rationale_that_does_not_fit_its_text_is_named(tmp_path, spans):
    rows = [row | {"why": ""} for row in ROWS]
    rows[4]["why"] = spans
    assert "line 6: the rationale" in message_of(write(tmp_path / "a.csv", rows), rationale_column="why")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"text": ""}, "the text is empty"), ({"text": "  "}, "the text is empty"), ({"text": "\n"}, "the text is empty"),
     ({"label": None}, "the label is missing")],
)  # fmt: skip
@pytest.mark.parametrize(("name", "place"), [("a.csv", "line 8"), ("a.jsonl", "line 7"), ("a.parquet", "row 7")])
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, changes, problem, name, place):
    rows = [row | changes if number == 6 else row for number, row in enumerate(ROWS)]
    assert f"{name}: {place}: {problem}; fix" in message_of(write(tmp_path / name, rows))


def test_all_bad_rows_are_named_at_once_with_the_lines_of_the_file(tmp_path):
    """A line is what an editor shows: blank lines and breaks within a text count."""
    path = tmp_path / "a.csv"
    good = "".join(f"t{i},{('a', 'b')[i % 2]},\n" for i in range(20))
    path.write_text(f'text,label,why\n"two\nlines",a,\n\n,a,\nx,,\n,,\nshort,b,"[[0, 9]]"\ny,c,\n{good}')
    message = message_of(path, rationale_column="why", labels=("a", "b"))
    assert (
        "a.csv: line 5: the text is empty; line 6: the label is missing; line 7: the text is empty; "
        "line 7: the label is missing; line 8: the rationale holds [0, 9], not 0 <= start < end <= 5, the text's "
        "length; line 9: the label 'c' is none of the 2 classes; classes: a, b; fix: "
    ) in message
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"text": "", "label": "a"}\n\n{"text": "x", "label": ""}\n')
    assert "a.jsonl: line 2: the text is empty; line 4: the label is missing; fix" in message_of(lines)
    rows = [*ROWS, *({"text": "", "label": "neg"} for _ in range(1030))]
    assert "line 61: the text is empty; and 1,010 more; fix" in message_of(write(path, rows))


def test_in_a_folder_bad_rows_are_named_with_their_file(tmp_path):
    write(tmp_path / "train.csv", [*ROWS[:20], {"text": "", "label": "neg"}])
    write(tmp_path / "test.jsonl", [*ROWS[20:], {"text": "x", "label": "neutral"}])
    message = message_of(tmp_path)
    assert "train.csv line 22: the text is empty; test.jsonl line 21: the label 'neutral' is none of" in message


def test_labels_are_compared_with_the_classes_given(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert load_data(config(path, labels=("pos", "neg"))).label_names == ("pos", "neg")
    message = message_of(path, labels=("pos", "neutral"))
    assert "line 3: the label 'neg' is none of the 2 classes" in message and "data.labels" in message
    assert "one class" in message_of(write(path, [row | {"label": "pos"} for row in ROWS]))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "text,label\ncafé,pos\n".encode("latin-1"), "a.csv is not UTF-8: byte 14 .*iconv"),
        ("a.jsonl", '{"text": "café", "label": "pos"}\n'.encode("latin-1"), "a.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": \n{"text": "a", "label": 1}\n\n[]\n', "line 1 is not JSON.*; line 4 is not an object"),
        ("a.csv", b"text,label\na,b\nc,d,e,f\n\ng,h,i\n",
         "a.csv cannot be read: line 3 has 4 values; line 5 has 3 values; the header names 2"),
        ("a.csv", b'text,label\na,b\n"c\nd,e\n', "line 3: unexpected end of data; fix: write each quote"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.parquet", b"PAR1 not really", "a.parquet cannot be read"),
        ("a.xlsx", b"", "none of .csv"),
        ("a.csv", None, "does not exist"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_data(config(tmp_path / name))


def test_a_text_may_be_long(tmp_path):
    rows = [row | {"text": row["text"] + " word" * 40_000} for row in ROWS]
    assert sizes(load_data(config(write(tmp_path / "a.csv", rows))))["train"] == 20


# folders of images


def picture(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)


def pictures(root, seeds=None):
    for seed in range(20) if seeds is None else seeds:
        picture(root / ("cats" if seed % 2 else "dogs") / f"{seed}.PNG", seed)
    return DataConfig(name="image_folder", path=str(root), dev_share=0.2, test_share=0.2)


def test_a_folder_for_each_class(tmp_path):
    config = pictures(tmp_path)
    picture(tmp_path / "cats" / "again.png", 1)
    picture(tmp_path / "dogs" / "other.png", 3)
    picture(tmp_path / "cats" / "1.rationale.png", 100)
    picture(tmp_path / "cats" / "3.RATIONALE.PNG", 101)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_data(config)
    assert data.label_names == ("cats", "dogs") and "2 duplicates dropped" in data.origin
    assert sizes(data) == {"train": 12, "dev": 4, "test": 4}
    for part in data.splits.values():
        assert [path.parent.name for path in part.images] == [data.label_names[label] for label in part.labels]
    assert data.contradictions == ("cats/3.PNG 'cats' (kept), dogs/other.png 'dogs'",)


def test_folders_for_splits(tmp_path):
    for split, seeds in (("train", range(20)), ("val", range(20, 24)), ("test", range(24, 28))):
        pictures(tmp_path / split, seeds)
    picture(tmp_path / "train" / "cats" / "leak.png", 25)
    config = DataConfig(name="image_folder", path=str(tmp_path))
    data = load_data(config)
    assert not is_unsplit(config) and sizes(data) == {"train": 20, "dev": 4, "test": 4}
    assert not any("leak" in str(path) for path in data.splits["train"].images), "kept where it measures"
    picture(tmp_path / "test" / "birds" / "1.png", 99)
    with pytest.raises(DataError, match="'birds' is none of the 2 classes"):
        load_data(config)


def test_images_of_a_folder_without_splits_can_be_taken_whole(tmp_path):
    config = pictures(tmp_path, range(6))
    picture(tmp_path / "cats" / "again.png", 1)
    whole = load_whole(config, ("dogs", "birds", "cats"))
    assert is_unsplit(config) and sorted(whole.labels.tolist()) == [0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(DataError, match="cats/1.PNG: the label 'cats' is none of the 1 classes; cats/3.PNG"):
        load_whole(config, ("dogs",))


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("nowhere", "is no folder"), ("bare", "no folders of images"), ("outer", "empty holds no images"),
     ("one", "one class")],
)  # fmt: skip
def test_image_folders_that_make_no_sense_are_named(tmp_path, folder, problem):
    (tmp_path / "bare").mkdir()
    (tmp_path / "outer" / "empty").mkdir(parents=True)
    pictures(tmp_path / "one", range(0, 10, 2))
    with pytest.raises(DataError, match=problem):
        load_data(DataConfig(name="image_folder", path=str(tmp_path / folder)))
