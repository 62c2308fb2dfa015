"""Texts from files and standard input: streamed, and each bad line named."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from types import SimpleNamespace

import pytest

from rekd_deploy.contract.text_source import SourcedText, TextSource
from rekd_train.errors import FaultyItemsError, InputError, MissingExtraError


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return [sourced.text for sourced in TextSource(str(path))]


def test_one_text_a_line(tmp_path):
    content = "\ufeffgood film\r\n\r\n  bad plot \n東京 🎬".encode()
    assert read(tmp_path, "reviews.txt", content) == ["good film", "bad plot", "東京 🎬"]


def test_json_lines(tmp_path):
    lines = [{"text": "good\nfilm", "label": 1}, {"text": " 🎬"}]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    assert read(tmp_path, "reviews.jsonl", content) == ["good\nfilm", " 🎬"]
    assert read(tmp_path, "reviews.dat", content) == ["good\nfilm", " 🎬"]
    assert read(tmp_path, "reviews.txt", b'{"text": "good"}') == ['{"text": "good"}']
    assert read(tmp_path, "other", b"good\n[1]") == ["good", "[1]"]


@pytest.mark.parametrize("as_json", [True, False])
def test_standard_input(monkeypatch, as_json):
    content = b'{"text": "good"}\n' if as_json else b"good\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert [sourced.text for sourced in TextSource("-")] == ["good"]


def test_lines_are_read_as_they_are_asked_for():
    endless = TextSource("endless")._lines(itertools.repeat(b"good\n"))
    assert len(list(itertools.islice(endless, 3))) == 3


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("r.txt", b"good\nb\xffd\n", r"r\.txt: line 2 is not UTF-8: byte 2 is 0xff; fix: convert"),
        ("r.txt", "caf\xe9".encode("latin-1"), r"txt: line 1 is not UTF-8: byte 4 is 0xe9"),
        ("r.txt", "good".encode("utf-16"), r"txt: line 1 is not UTF-8: byte 1 is 0xff"),
        ("r.txt", b"", "holds no text"),
        ("r.txt", b"\n \n", "holds no text"),
        ("r.jsonl", b'{"text": "good"}\n{"text": \n', r"r\.jsonl: line 2 is not a JSON object"),
        ("r.jsonl", b'{"review": "good"}', "jsonl: line 1 is not a JSON object with the key"),
        ("r.jsonl", b'"good"', "jsonl: line 1 is not a JSON object"),
        ("r.jsonl", b"[" * 100_000, "jsonl: line 1 is not a JSON object"),
        ("r.jsonl", b'{"text": 3}', "jsonl: line 1 is int"),
        ("r.jsonl", b'{"text": " "}', "jsonl: line 1 is only white space"),
        ("r.jsonl", b'{"text": "\\ud800"}', "jsonl: line 1 has an unpaired surrogate"),
    ],
)
def test_bad_line_is_named(tmp_path, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, name, content)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        list(TextSource(str(tmp_path / "nowhere.txt")))
    with pytest.raises(InputError, match="Is a directory"):
        list(TextSource(str(tmp_path)))


def test_arguments():
    assert [sourced.text for sourced in TextSource(arguments=["good", "東京"])] == ["good", "東京"]
    with pytest.raises(InputError, match="^text 2 is not UTF-8: byte 3 is 0xff; fix: "):
        list(TextSource(arguments=["good", "ba\udcffd"]))
    with pytest.raises(InputError, match="text 1 is empty"):
        list(TextSource(arguments=[""]))


def test_all_bad_lines_are_named_at_once(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": ""}\n{"text": "bad"}\n{"review": "x"}\n\xff\n')
    source = TextSource(str(path))
    texts = iter(source)
    assert next(texts).text == "good"
    with pytest.raises(FaultyItemsError) as raised:
        next(texts)
    assert str(raised.value) == (
        f'{path}: line 3 is empty; line 5 is not a JSON object with the key "text"; line 6 is '
        'not UTF-8: byte 1 is 0xff; fix: give at least one word, or write {"text": "..."} (or name another key '
        "with --column NAME), one a line, or convert it to UTF-8"
    )
    path.write_text('{"text": ""}\n' * 25)
    with pytest.raises(FaultyItemsError, match="line 20 is empty; and 5 more; fix: give at least one word$"):
        list(source)


def test_what_comes_with_a_text_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": 7, "text": "good", "label": "x"}\n{"text": "bad"}\n')
    assert list(TextSource(str(path))) == [
        SourcedText("good", 1, {"id": 7, "label": "x"}), SourcedText("bad", 2, {})
    ]
    path.write_text('{"id": 7, "review": "good"}\n')
    assert list(TextSource(str(path), "review")) == [SourcedText("good", 1, {"id": 7})]


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
    assert [sourced.text for sourced in TextSource(str(path), "id")] == ["1", "2", "3"]


def test_a_table_without_a_plain_choice_names_its_columns(tmp_path):
    path = tmp_path / "r.csv"
    for content, columns in (("title,review\na b,c d\n", "title, review"), ("id,word\n1,good\n", "id, word")):
        path.write_text(content)
        with pytest.raises(InputError, match=f"has no column 'text'; it has: {columns}; fix: call the column"):
            list(TextSource(str(path)))
    path.write_text("title,text\na b,c d\n")
    assert list(TextSource(str(path))) == [SourcedText("c d", 1, {"title": "a b"})]
    with pytest.raises(InputError, match=r"has no column 'review'; it has: title, text; fix: call .* --column NAME"):
        list(TextSource(str(path), "review"))
    path.write_text("id,text\n1,good film\n2,\" \"\n3,fine\n4,\n")
    with pytest.raises(FaultyItemsError) as raised:
        list(TextSource(str(path)))
    assert list(raised.value.faults) == [2, 4]
    assert str(raised.value) == f"{path}: line 3 is only white space; line 5 is empty; fix: give at least one word"


def test_without_pyarrow_a_parquet_file_is_refused_with_the_fix(tmp_path, monkeypatch):
    (tmp_path / "r.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed; fix: pip install .*\[data\]"):
        list(TextSource(str(tmp_path / "r.parquet")))
