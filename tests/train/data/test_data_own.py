"""The user's own texts: every format, and what is wrong said by line before any training."""

import csv
import json

import pytest

from rekd_train.config.run import DataConfig
from rekd_train.data import load_data
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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    data = load_data(config(write(tmp_path / f"mine{suffix}", ROWS)))
    assert data.label_names == ("neg", "pos")
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 20, "dev": 10, "test": 10}
    for part in data.splits.values():
        assert all(text.startswith("good") == bool(label) for text, label in zip(part.texts, part.labels, strict=True))
    assert sorted(text for part in data.splits.values() for text in part.texts) == sorted(row["text"] for row in ROWS)
    same = load_data(config(write(tmp_path / "reference.csv", ROWS)))
    assert data.splits["dev"].texts == same.splits["dev"].texts


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 11} for i in range(110)]
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        data = load_data(config(write(tmp_path / name, rows)))
        assert data.label_names == tuple(str(i) for i in range(11))
        assert all(int(t.split()[1]) % 11 == y for t, y in zip(*vars_of(data.splits["train"]), strict=True))


def vars_of(part):
    return part.texts, part.labels


def test_columns_have_the_names_that_the_configuration_says(tmp_path):
    path = write(tmp_path / "a.csv", [{"review": row["text"], "stars": row["label"]} for row in ROWS])
    data = load_data(config(path, text_column="review", label_column="stars"))
    assert data.label_names == ("neg", "pos")
    message = message_of(path)
    assert "no column 'text'" in message and "review, stars" in message and "data.text_column" in message


def test_words_that_look_like_nothing_stay_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,NA\nNone,None\n" + "".join(f"t{i},{('NA', 'None')[i % 2]}\n" for i in range(20)))
    assert load_data(config(path)).label_names == ("NA", "None")


def test_splits_come_from_a_column(tmp_path):
    rows = [row | {"part": ("train", "dev", "test")[i // 2 % 3]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", rows)
    data = load_data(config(path, split_column="part"))
    for name, part in data.splits.items():
        assert sorted(part.texts) == sorted(row["text"] for row in rows if row["part"] == name)
    rows[7]["part"] = "training"
    assert "line 9: the split" in message_of(write(path, rows), split_column="part")


def test_splits_come_from_files_and_what_is_missing_from_training(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    data = load_data(config(tmp_path))
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 16, "dev": 4, "test": 20}
    (tmp_path / "train.jsonl").unlink()
    assert "no training file" in message_of(tmp_path)


def test_a_text_is_kept_once_where_it_measures(tmp_path):
    write(tmp_path / "train.csv", [*ROWS[:20], ROWS[0], ROWS[30]])
    write(tmp_path / "test.csv", ROWS[20:])
    data = load_data(config(tmp_path))
    assert len(data.splits["train"]) + len(data.splits["dev"]) == 20 and len(data.splits["test"]) == 20
    assert ROWS[30]["text"] in data.splits["test"].texts
    assert "2 duplicates dropped" in data.origin


def test_human_rationales_travel_with_their_text(tmp_path):
    rows = [row | {"why": [[0, 4]] if i % 4 < 2 else None} for i, row in enumerate(ROWS)]
    cells = [row | {"why": json.dumps(row["why"]) if row["why"] else ""} for row in rows]
    for name, content in (("a.jsonl", rows), ("a.csv", cells), ("a.parquet", rows)):
        path = write(tmp_path / name, content)
        data = load_data(config(path, rationale_column="why"))
        for part in data.splits.values():
            numbers = [int(text.split()[-1]) for text in part.texts]
            assert part.rationales == [[(0, 4)] if number % 4 < 2 else None for number in numbers]
    assert load_data(config(path)).splits["train"].rationales is None


@pytest.mark.parametrize("spans", ["[[0, 999]]", "[[3, 3]]", "[[-1, 2]]", "[1, 2]", "not json"])
def test_a_rationale_that_does_not_fit_its_text_is_named(tmp_path, spans):
    rows = [row | {"why": ""} for row in ROWS]
    rows[4]["why"] = spans
    message = message_of(write(tmp_path / "a.csv", rows), rationale_column="why")
    assert "line 6: the rationale" in message


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_text_is_named_by_its_line(tmp_path, empty):
    rows = [dict(row) for row in ROWS]
    rows[6]["text"] = empty
    for name, place in (("a.csv", "line 8"), ("a.jsonl", "line 7"), ("a.parquet", "row 7")):
        assert f"{name}: {place}: the text is empty; fix" in message_of(write(tmp_path / name, rows))


def test_a_missing_label_is_named_by_its_line(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[2]["label"] = None
    for name, place in (("a.csv", "line 4"), ("a.jsonl", "line 3"), ("a.parquet", "row 3")):
        assert f"{place}: the label is missing" in message_of(write(tmp_path / name, rows))


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


def test_of_many_bad_rows_twenty_are_named(tmp_path):
    rows = [*ROWS, *({"text": "", "label": "neg"} for _ in range(1030))]
    assert "line 61: the text is empty; and 1,010 more; fix" in message_of(write(tmp_path / "a.csv", rows))


def test_in_a_folder_bad_rows_are_named_with_their_file(tmp_path):
    write(tmp_path / "train.csv", [*ROWS[:20], {"text": "", "label": "neg"}])
    write(tmp_path / "test.jsonl", [*ROWS[20:], {"text": "x", "label": "neutral"}])
    message = message_of(tmp_path)
    assert "train.csv line 22: the text is empty; test.jsonl line 21: the label 'neutral' is none of" in message


def test_a_text_with_contradicting_labels_is_named(tmp_path):
    rows = [*ROWS, ROWS[0], ROWS[1] | {"label": "pos"}, ROWS[1] | {"label": "pos"}]
    data = load_data(config(write(tmp_path / "a.csv", rows)))
    assert data.duplicates == 3
    assert data.contradictions == ("line 3 'neg' (kept), line 43 'pos', line 44 'pos': 'bad text, number 1'",)
    data = load_data(config(write(tmp_path / "b.csv", [*ROWS, ROWS[0] | {"label": "pso"}])))
    assert data.label_names == ("neg", "pos"), "no class without an example"
    assert data.contradictions == ("line 2 'pos' (kept), line 42 'pso': 'good text, number 0'",)
    write(tmp_path / "train.csv", rows[:20])
    write(tmp_path / "test.csv", [*rows[20:40], ROWS[3] | {"label": "pos"}])
    data = load_data(config(tmp_path))
    assert data.contradictions == ("test.csv line 22 'pos' (kept), train.csv line 5 'neg': 'bad text, number 3'",)


def test_labels_are_held_against_the_classes_given(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert load_data(config(path, labels=("pos", "neg"))).label_names == ("pos", "neg")
    message = message_of(path, labels=("pos", "neutral"))
    assert "line 3: the label 'neg' is none of the 2 classes" in message and "data.labels" in message


def test_one_class_is_nothing_to_learn(tmp_path):
    assert "one class" in message_of(write(tmp_path / "a.csv", [row | {"label": "pos"} for row in ROWS]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncafé,pos\n".encode("latin-1"))
    assert "latin.csv is not UTF-8" in message_of(latin) and "iconv" in message_of(latin)
    latin_lines = tmp_path / "latin.jsonl"
    latin_lines.write_bytes('{"text": "café", "label": "pos"}\n'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8" in message_of(latin_lines)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": 1}\n{"text": \n')
    assert "line 2" in message_of(broken)
    broken.write_text('{"text": \n{"text": "a", "label": 1}\n\n[]\n')
    assert "line 1 is not JSON" in message_of(broken) and "line 4 is not an object" in message_of(broken)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("text,label\na,b\nc,d,e,f\n\ng,h,i\n")
    wrong = "ragged.csv cannot be read: line 3 has 4 values; line 5 has 3 values; the header names 2"
    assert wrong in message_of(ragged)
    ragged.write_text("text,label\nwell, no,b\nc,d\n")
    assert "line 2 has 3 values" in message_of(ragged)
    ragged.write_text('text,label\na,b\n"c\nd,e\n')
    assert "ragged.csv cannot be read: line 3: unexpected end of data; fix: write each quote" in message_of(ragged)
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    assert "holds no rows" in message_of(empty)
    parquet = tmp_path / "broken.parquet"
    parquet.write_bytes(b"PAR1 not really")
    assert "broken.parquet cannot be read" in message_of(parquet)
    assert "none of .csv" in message_of(tmp_path / "a.xlsx")
    assert "does not exist" in message_of(tmp_path / "absent.csv")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{row['text'].replace(',', '')},{row['label']}\n" for row in ROWS),
                    encoding="utf-8-sig")  # fmt: skip
    assert load_data(config(path)).label_names == ("neg", "pos")
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")
    assert load_data(config(lines)).label_names == ("neg", "pos")
