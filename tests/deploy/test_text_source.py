"""Texts from files and standard input: streamed, and each bad line named."""

from __future__ import annotations

import io
import itertools
import json
from types import SimpleNamespace

import pytest

from rekd_deploy.text_source import _texts_of_lines, texts_from_arguments, texts_from_file
from rekd_train.errors import InputError


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return [sourced.text for sourced in texts_from_file(str(path))]


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
    assert [sourced.text for sourced in texts_from_file("-")] == ["good"]


def test_lines_are_read_as_they_are_asked_for():
    endless = _texts_of_lines(itertools.repeat(b"good\n"), "endless", None)
    assert len(list(itertools.islice(endless, 3))) == 3


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("r.txt", b"good\nb\xffd\n", r"r\.txt, line 2 is not UTF-8: byte 2 is 0xff"),
        ("r.txt", "caf\xe9".encode("latin-1"), r"line 1 is not UTF-8: byte 4 is 0xe9"),
        ("r.txt", "good".encode("utf-16"), r"line 1 is not UTF-8: byte 1 is 0xff"),
        ("r.txt", b"", "holds no text"),
        ("r.txt", b"\n \n", "holds no text"),
        ("r.jsonl", b'{"text": "good"}\n{"text": \n', r"r\.jsonl, line 2 is not a JSON object"),
        ("r.jsonl", b'{"review": "good"}', "line 1 is not a JSON object with the key"),
        ("r.jsonl", b'"good"', "line 1 is not a JSON object"),
        ("r.jsonl", b'{"text": 3}', "line 1 is int"),
        ("r.jsonl", b'{"text": " "}', "line 1 is only white space"),
        ("r.jsonl", b'{"text": "\\ud800"}', "line 1 has an unpaired surrogate"),
    ],
)
def test_bad_line_is_named(tmp_path, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, name, content)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        list(texts_from_file(str(tmp_path / "nowhere.txt")))
    with pytest.raises(InputError, match="Is a directory"):
        list(texts_from_file(str(tmp_path)))


def test_arguments():
    assert [sourced.text for sourced in texts_from_arguments(["good", "東京"])] == ["good", "東京"]
    with pytest.raises(InputError, match="text 2 is not UTF-8: byte 3 is 0xff"):
        list(texts_from_arguments(["good", "ba\udcffd"]))
    with pytest.raises(InputError, match="text 1 is empty"):
        list(texts_from_arguments([""]))
