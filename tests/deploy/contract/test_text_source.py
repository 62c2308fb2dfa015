"""Texts from files and standard input: streamed, and each bad line named."""

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
    def sourced(name, content, column=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [tuple(each) for each in TextSource(str(path), column)]
    return sourced


@pytest.mark.parametrize(("name", "content", "texts"), [
    ("r.txt", "\ufeffgood film\r\n\r\n  bad plot \n東京 🎬",
     [("good film", 1, {}), ("bad plot", 3, {}), ("東京 🎬", 4, {})]),
    ("r.txt", '{"text": "good"}', [('{"text": "good"}', 1, {})]),
    ("r.jsonl", '{"id": 7, "text": "good\\nfilm", "label": "x"}\n\n{"text": " 🎬"}',
     [("good\nfilm", 1, {"id": 7, "label": "x"}), (" 🎬", 3, {})]),
    ("other", '{"text": "good"}\n{"text": "bad"}', [("good", 1, {}), ("bad", 2, {})]),
    ("other", "good\n[1]", [("good", 1, {}), ("[1]", 2, {})]),
    ("r.csv", "title,text\na b,c d\n", [("c d", 1, {"title": "a b"})])])
def test_lines_json_lines_and_the_column_text(read, name, content, texts):
    assert read(name, content) == texts


def test_standard_input_arguments_chunks_and_what_cannot_be_read_at_all(monkeypatch, tmp_path, read):
    for line in (b'{"text": "good"}\n', b"good\n"):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=itertools.repeat(line)))
        assert [each.text for each in itertools.islice(TextSource("-"), 3)] == ["good"] * 3
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff\n")))
    with pytest.raises(FaultyItemsError, match="standard input: line 1"):
        list(TextSource("-"))
    assert [each.text for each in TextSource(arguments=["good", "東京"])] == ["good", "東京"]
    with pytest.raises(InputError, match="^text 2 is not UTF-8: byte 3 is 0xff; fix: "):
        list(TextSource(arguments=["good", "ba\udcffd"]))
    with pytest.raises(FaultyItemsError, match="text 3 is empty"):  # before any is used
        next(TextSource(arguments=["a", "b", ""]).chunks(1))
    (tmp_path / "r.txt").write_bytes(b"a\nb\nc\n\xff\nd\n")
    chunks = TextSource(str(tmp_path / "r.txt")).chunks(2)
    assert [[each.text for each in next(chunks)] for _ in range(2)] == [["a", "b"], ["c"]]
    with pytest.raises(FaultyItemsError, match="line 4"):
        next(chunks)
    for path, complaint in ((tmp_path / "nowhere.txt", r"nowhere\.txt cannot be read: No such file"),
                            (tmp_path, "Is a directory")):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            list(TextSource(str(path)))
    with pytest.raises(InputError, match="has no column 'review'; it has: title, text"):
        read("r.csv", "title,text\na b,c d\n", "review")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed; fix: pip install .*\[data\]"):
        read("r.parquet", "")


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("r.txt", b"good\nb\xffd\n", r"r\.txt: line 2 is not UTF-8: byte 2 is 0xff; fix: convert"),
    ("r.txt", "good".encode("utf-16"), r"txt: line 1 is not UTF-8: byte 1 is 0xff"),
    ("r.txt", b"\n \n", "holds no text"),
    ("r.jsonl", b'{"text": "good"}\n{"text": \n', r"r\.jsonl: line 2 is not a JSON object"),
    ("r.jsonl", b'"good"', "jsonl: line 1 is not a JSON object"),
    ("r.jsonl", b"[" * 100_000, "jsonl: line 1 is not a JSON object"),
    ("r.jsonl", b'{"text": 3}', "jsonl: line 1 is int"),
    ("r.jsonl", b'{"text": "\\ud800"}', "jsonl: line 1 has an unpaired surrogate"),
    ("r.jsonl", b'{"text": "good"}\n\n{"text": ""}\n{"text": "bad"}\n{"review": "x"}\n\xff\n',
     'line 3 is empty; line 5 is not a JSON object with the key "text"; line 6 is not UTF-8: byte 1 is 0xff; '
     r'fix: give at least one word, or write {"text": "..."} \(or name another key with --column NAME\), one a '
     "line, or convert it to UTF-8"),
    ("r.jsonl", b'{"text": ""}\n' * 25, "line 20 is empty; and 5 more; fix: give at least one word$"),
    ("r.csv", "title,review\na b,c d\n", "has no column 'text'; it has: title, review; fix: call the column"),
    ("r.csv", "id,word\n1,good\n", "has no column 'text'; it has: id, word; fix: call .* --column NAME"),
    ("r.csv", 'id,text\n1,good film\n2," "\n3,fine\n4,\n', "line 3 is only white space; line 5 is empty; fix: give")])
def test_bad_lines_and_rows_are_named(read, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(name, content)


ROWS = 'id,review\n1,"a good film, ""really"""\n2,bad\n3,"two\nlines"\n'


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "CSV"])
def test_tables_and_a_named_column(tmp_path, kind):
    path, records = tmp_path / f"r.{kind}", list(csv.DictReader(io.StringIO(ROWS)))
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows(csv.reader(io.StringIO(ROWS)))
    texts = [SourcedText(row["review"], number, {"id": row["id"]}) for number, row in enumerate(records, 1)]
    assert list(TextSource(str(path), "review")) == list(TextSource(str(path))) == texts
    assert [each.text for each in TextSource(str(path), "id")] == ["1", "2", "3"]
