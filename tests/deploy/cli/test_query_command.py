"""rekd-query from the command line to what it prints, with the pipeline or a stand-in for the server."""

import io
import json
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest

from rekd_deploy.cli import query
from rekd_deploy.client.connection import TlsSettings
from rekd_deploy.errors import ServerUnavailableError
from rekd_train.inputs.prediction import Prediction

pytestmark = pytest.mark.slow


@pytest.fixture
def rekd_query(run_cli):
    return lambda *arguments: run_cli(query.app, *arguments)


@pytest.fixture
def server(monkeypatch, rationalizer):
    """In place of a server: the model itself; a mock of the client, what was asked of it in ``predict``."""
    client = MagicMock()
    opened = client.return_value.__enter__.return_value
    client.return_value.__exit__.return_value = None
    opened.description.settings = rationalizer.preprocessor.settings
    opened.predict.side_effect = lambda texts, windows: rationalizer.predict(texts)
    client.predict = opened.predict
    monkeypatch.setattr("rekd_deploy.client.client.Client", client)
    return client


def test_json_has_spans_and_what_came_with_a_text_and_files_stream_in_chunks(rekd_query, server, tmp_path):
    text = "A good film.<br />Really 🎬 good"
    code, printed, _ = rekd_query(text, "bad plot", "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [answer["text"] for answer in found] == [text, "bad plot"]
    for answer in found:
        assert Prediction.from_dict(answer).to_dict() == answer and answer["rationale"] and answer["pieces"]
        assert all(answer["text"][span["start"] : span["end"]] == span["text"] for span in answer["rationale"])
    code, printed, _ = rekd_query("a good film")
    assert code == 0 and "[[" in printed and "%" in printed and printed.count("film") == 1, "for people"
    assert server.call_args_list == [call("localhost:8001", timeout=30.0, headers={}, tls=None)] * 2
    (tmp_path / "reviews.txt").write_text("good film\n" * 600)
    code, printed, _ = rekd_query("--file", tmp_path / "reviews.txt", "--json")
    assert code == 0 and printed.count("\n") == 600
    assert [len(each.args[0]) for each in server.predict.call_args_list] == [256, 256, 88]
    path, table = tmp_path / "reviews.jsonl", tmp_path / "reviews.csv"
    path.write_text(
        '{"id": 7, "review": "good film", "label": "gold", "input_label": "old"}\n{"review": "bad", "x": NaN}\n')
    first, second = map(json.loads, rekd_query("--file", path, "--column", "review", "--json")[1].splitlines())
    assert (first["id"], first["text"], second["text"], second["x"]) == (7, "good film", "bad", None)
    assert (first["input_label"], first["input_input_label"]) == ("gold", "old"), "what is asked again loses nothing"
    assert first["label"] == Prediction.from_dict(first).label != "gold"
    table.write_text("number,review\n1,a good film\n")
    answer = json.loads(rekd_query("--file", table, "--json")[1])
    assert (answer["number"], answer["text"]) == ("1", "a good film")


def test_options_reach_the_connection_and_the_model(rekd_query, server, repository, tmp_path):
    files = [tmp_path / name for name in ("roots.pem", "mine.pem", "mine.key")]
    for file in files:
        file.touch()
    pem = [text for pair in zip(("--ca", "--cert", "--key"), files, strict=True) for text in pair]
    given = ["--timeout", "2", "--header", "Authorization: Bearer a:b", "--header", "x-tenant:7", *pem]
    assert rekd_query("good", "--url", "https://a:1", *given)[0] == rekd_query("good", "--windows")[0] == 0
    headers = {"Authorization": "Bearer a:b", "x-tenant": "7"}
    assert server.call_args_list[0] == call("https://a:1", timeout=2.0, headers=headers, tls=TlsSettings(*files))
    assert [each.kwargs["windows"] for each in server.predict.call_args_list] == [False, True]
    code, printed, _ = rekd_query("--local", repository, "--windows", "--json", "good film and dull plot " * 50)
    answer = json.loads(printed)
    assert code == 0 and answer["truncated"] is False and answer["rationale"][-1]["end"] > 1000
    assert server.call_count == 2, "a pipeline asks no server"


GOOD, NO_UTF8, EMPTY = b"good film\n", "is not UTF-8: byte 1 is 0xff", "\u200b\n".encode()
WORDLESS = "holds no word that the tokenizer knows"
TO_UTF8, WORDS = "fix: convert it to UTF-8", "fix: give at least one word"


@pytest.mark.parametrize(("piped", "content", "printed", "errors"), [
    (False, b"\xff\n", 0, [f": line 1 {NO_UTF8}; {TO_UTF8}"]),
    (False, GOOD * 256 + b"fine\n\n" + EMPTY + b"\xff\n" + GOOD * 256 + b"\xff\n", 256,
     [f": line 259 {WORDLESS}; line 260 {NO_UTF8}; line 517 {NO_UTF8}; {WORDS}, or convert it to UTF-8"]),
    (True, "東京 good\n".encode(), 1, []), (True, b"\xff\n\n", 0, [f": line 1 {NO_UTF8}; {TO_UTF8}"]),
    (True, GOOD * 255 + b"\xff\n" + EMPTY + GOOD * 300, 555,
     [f": line 256 {NO_UTF8}; {TO_UTF8}", f": line 257 {WORDLESS}; {WORDS}"]),
    (True, b"", 0, [' holds no text; fix: give one text a line, or JSON lines with the key "text"'])])
def test_bad_lines_end_a_file_and_are_left_out_of_standard_input(
    rekd_query, server, monkeypatch, tmp_path, piped, content, printed, errors
):
    path = tmp_path / "reviews.txt"
    path.write_bytes(content)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    code, out, error = rekd_query("--file", "-" if piped else path, "--json")
    assert (code, out.count("\n"), server.called) == (int(bool(errors)), printed, printed > 0)
    assert error == "".join(f"error: {'standard input' if piped else path}{each}\n" for each in errors)


@pytest.mark.parametrize(("arguments", "code"), [
    *((arguments.split(), 2) for arguments in (
        "", "good --file x.txt", "good --url a:1 --local r", "good --timeout 0", "good --nonsense", "good --header x",
        "--image x.png --windows", "good --save d", "good --column x", "good --device cuda", "good --local r --ca x",
        "good --local r --header x:y")),
    *(([text], 1) for text in (" \n\t", "caf\udce9")), (["good", "--ca", "nowhere.pem"], 1)])
def test_arguments_that_cannot_be_used(rekd_query, server, arguments, code):
    found, printed, error = rekd_query(*arguments)
    assert (found, printed) == (code, "") and "Traceback" not in error and not server.called
    assert code == 2 or error.startswith("error: ") and error.count("\n") == 1


def test_failures_are_one_line_and_debug_shows_where(rekd_query, server, repository, tmp_path):
    said = 'reads texts, not images; fix: rekd-query "TEXT" or --file FILE\n'
    assert rekd_query("--image", "shoe.png") == (1, "", f"error: the model of localhost:8001 {said}")
    assert rekd_query("--local", repository, "--image", "x.png") == (1, "", f"error: the model of {repository} {said}")
    server.predict.side_effect = ServerUnavailableError("no Triton server answers at x")
    assert rekd_query("good") == (1, "", "error: no Triton server answers at x\n")
    assert "Traceback" in rekd_query("good", "--debug")[2]
    code, printed, error = rekd_query("good", "--local", tmp_path)
    assert (code, printed) == (1, "") and "holds no exported model" in error and error.count("\n") == 1
