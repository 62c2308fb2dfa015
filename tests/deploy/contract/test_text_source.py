"""Texts from files and standard input: streamed, and each bad line named."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from rekd_deploy.contract.text_source import SourcedText, TextSource
from rekd_train.errors import FaultyItemsError, InputError, MissingExtraError


@pytest.fixture
def read(tmp_path):
    """A function: name, content, column -> what is read of such a file."""

    def sourced(name, content, column=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(TextSource(str(path), column))

    return sourced


def texts_of(sourced):
    return [each.text for each in sourced]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("r.txt", "\ufeffgood film\r\n\r\n  bad plot \n東京 🎬", ["good film", "bad plot", "東京 🎬"]),
        ("r.txt", '{"text": "good"}', ['{"text": "good"}']),
        ("r.jsonl", '{"text": "good\\nfilm", "label": 1}\n\n{"text": " 🎬"}', ["good\nfilm", " 🎬"]),
        ("other", '{"text": "good"}\n{"text": "bad"}', ["good", "bad"]),
        ("other", "good\n[1]", ["good", "[1]"]),
    ],
)
def test_lines_and_json_lines(read, name, content, texts):
    assert texts_of(read(name, content)) == texts


@pytest.fixture
def standard_input(monkeypatch):
    return lambda lines: monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines))


@pytest.mark.parametrize("line", [b'{"text": "good"}\n', b"good\n"])
def test_standard_input_may_never_end(standard_input, line):
    standard_input(itertools.repeat(line))
    assert texts_of(itertools.islice(TextSource("-"), 3)) == ["good"] * 3


def test_bad_lines_of_standard_input_are_reported_and_left_out(standard_input):
    standard_input(io.BytesIO(b"good\n\xff\nbad\n \xff\n"))
    reported = []
    source = TextSource("-", report=reported.append)
    assert [each.number for each in source] == [1, 3] and source.left_out == len(reported) == 2
    assert str(reported[1]).startswith("standard input: line 4 is not UTF-8: byte 2 is 0xff")
    standard_input(io.BytesIO(b"\xff\n"))
    with pytest.raises(FaultyItemsError, match="standard input: line 1"):
        list(TextSource("-"))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("r.txt", b"good\nb\xffd\n", r"r\.txt: line 2 is not UTF-8: byte 2 is 0xff; fix: convert"),
        ("r.txt", "good".encode("utf-16"), r"txt: line 1 is not UTF-8: byte 1 is 0xff"),
        ("r.txt", b"\n \n", "holds no text"),
        ("r.jsonl", b'{"text": "good"}\n{"text": \n', r"r\.jsonl: line 2 is not a JSON object"),
        ("r.jsonl", b'{"review": "good"}', "jsonl: line 1 is not a JSON object with the key"),
        ("r.jsonl", b'"good"', "jsonl: line 1 is not a JSON object"),
        ("r.jsonl", b"[" * 100_000, "jsonl: line 1 is not a JSON object"),
        ("r.jsonl", b'{"text": 3}', "jsonl: line 1 is int"),
        ("r.jsonl", b'{"text": "\\ud800"}', "jsonl: line 1 has an unpaired surrogate"),
        (
            "r.jsonl", b'{"text": "good"}\n\n{"text": ""}\n{"text": "bad"}\n{"review": "x"}\n\xff\n',
            'line 3 is empty; line 5 is not a JSON object with the key "text"; line 6 is not UTF-8: byte 1 is 0xff; '
            r'fix: give at least one word, or write {"text": "..."} \(or name another key with --column NAME\), one a '
            "line, or convert it to UTF-8",
        ),
        ("r.jsonl", b'{"text": ""}\n' * 25, "line 20 is empty; and 5 more; fix: give at least one word$"),
    ],
)
def test_bad_lines_are_named(read, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(name, content)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        list(TextSource(str(tmp_path / "nowhere.txt")))
    with pytest.raises(InputError, match="Is a directory"):
        list(TextSource(str(tmp_path)))


def test_arguments():
    assert texts_of(TextSource(arguments=["good", "東京"])) == ["good", "東京"]
    with pytest.raises(InputError, match="^text 2 is not UTF-8: byte 3 is 0xff; fix: "):
        list(TextSource(arguments=["good", "ba\udcffd"]))


def test_chunks_before_a_bad_line_come_before_the_error(tmp_path):
    path = tmp_path / "r.txt"
    path.write_bytes(b"a\nb\nc\n\xff\nd\n")
    chunks = TextSource(str(path)).chunks(2)
    assert [texts_of(next(chunks)), texts_of(next(chunks))] == [["a", "b"], ["c"]]
    with pytest.raises(FaultyItemsError, match="line 4"):
        next(chunks)
    with pytest.raises(FaultyItemsError, match="text 3 is empty"):  # before any is used
        next(TextSource(arguments=["a", "b", ""]).chunks(1))


def test_what_comes_with_a_text_is_kept(read):
    lines = '{"id": 7, "text": "good", "label": "x"}\n{"text": "bad"}\n'
    assert read("r.jsonl", lines) == [SourcedText("good", 1, {"id": 7, "label": "x"}), SourcedText("bad", 2, {})]
    assert read("r.jsonl", '{"id": 7, "review": "good"}\n', "review") == [SourcedText("good", 1, {"id": 7})]


ROWS = 'id,review\n1,"a good film, ""really"""\n2,bad\n3,"two\nlines"\n'


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "CSV"])
def test_tables(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(csv.DictReader(io.StringIO(ROWS)))), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows(csv.reader(io.StringIO(ROWS)))
    texts = list(TextSource(str(path)))
    assert texts == [
        SourcedText('a good film, "really"', 1, {"id": "1"}), SourcedText("bad", 2, {"id": "2"}),
        SourcedText("two\nlines", 3, {"id": "3"}),
    ]
    assert list(TextSource(str(path), "review")) == texts
    assert texts_of(TextSource(str(path), "id")) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "column", "complaint"),
    [
        ("title,review\na b,c d\n", None, "has no column 'text'; it has: title, review; fix: call the column"),
        ("id,word\n1,good\n", None, "has no column 'text'; it has: id, word; fix: call"),
        ("title,text\na b,c d\n", "review", "has no column 'review'; it has: title, text; fix: call .* --column NAME"),
        ('id,text\n1,good film\n2," "\n3,fine\n4,\n', None, "line 3 is only white space; line 5 is empty; fix: give"),
    ],
)
def test_tables_without_a_plain_choice_or_with_bad_rows(read, content, column, complaint):
    with pytest.raises(InputError, match=complaint):
        read("r.csv", content, column)


def test_of_several_columns_text_is_read(read):
    assert read("r.csv", "title,text\na b,c d\n") == [SourcedText("c d", 1, {"title": "a b"})]


def test_without_pyarrow_a_parquet_file_is_refused_with_the_fix(tmp_path, monkeypatch):
    (tmp_path / "r.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed; fix: pip install .*\[data\]"):
        list(TextSource(str(tmp_path / "r.parquet")))
