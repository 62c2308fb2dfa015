"""rekd-query from the command line to what it prints, with the pipeline or a stand-in for the server."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

from rekd_deploy.cli import query
from rekd_deploy.client.connection import TlsSettings
from rekd_deploy.errors import ServerUnavailableError
from rekd_train.cli.command import run
from rekd_train.inputs.prediction import Prediction


@pytest.fixture
def ask(capsys):
    """A function: arguments -> exit code, stdout, stderr."""

    def asked(*arguments):
        with pytest.raises(SystemExit) as request:
            run(query.app, [str(argument) for argument in arguments])
        return request.value.code, *capsys.readouterr()

    return asked


@pytest.fixture
def server(monkeypatch, rationalizer):
    """In place of a server: the model itself, and what was asked of it."""
    seen = SimpleNamespace(urls=[], chunks=[], failure=None, options=[], windows=[])
    seen.description = SimpleNamespace(settings=rationalizer.preprocessor.settings)

    class StandIn:
        def __init__(self, url, *, timeout, **options):
            seen.urls.append((url, timeout))
            seen.options.append(options)

        description = seen.description

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def predict(self, texts, *, windows=False):
            seen.windows.append(windows)
            if seen.failure:
                raise seen.failure
            seen.chunks.append(len(texts))
            return rationalizer.predict(texts)

    monkeypatch.setattr("rekd_deploy.client.client.Client", StandIn)
    return seen


def test_json_has_spans_of_the_text_as_given(ask, server):
    text = "A good film.<br />Really 🎬 good"
    code, out, _ = ask(text, "bad plot", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["text"] for answer in answers] == [text, "bad plot"]
    for answer in answers:
        assert set(answer) >= {"label", "probabilities", "rationale", "pieces", "rate", "truncated"}
        assert answer["rationale"] and answer["pieces"] and 0 < answer["rate"] <= 1 and answer["truncated"] is False
        for span in answer["rationale"]:
            assert answer["text"][span["start"] : span["end"]] == span["text"]
    assert server.urls == [("localhost:8001", 30.0)]


def test_local_answers_without_a_server(ask, repository, rationalizer):
    code, out, _ = ask("--local", repository, "good film", "--json")
    answer, expected = json.loads(out), rationalizer.predict(["good film"])[0]
    assert (code, answer["label"], answer["rate"]) == (0, expected.label, expected.rate)


def test_text_for_people(ask, server):
    code, out, _ = ask("a good film")
    assert code == 0 and "[[" in out and "%" in out and out.count("film") == 1


def test_url_and_timeout(ask, server):
    assert ask("good", "--url", "http://localhost:8000", "--timeout", "2")[0] == 0
    assert server.urls == [("http://localhost:8000", 2.0)]


def test_headers_and_tls(ask, server, tmp_path):
    files = [tmp_path / name for name in ("roots.pem", "mine.pem", "mine.key")]
    for file in files:
        file.touch()
    options = [text for pair in zip(("--ca", "--cert", "--key"), files, strict=True) for text in pair]
    given = ["--url", "https://a:1", "--header", "Authorization: Bearer a:b", "--header", "x-tenant:7", *options]
    assert ask("good", *given)[0] == 0
    assert server.options == [
        {"headers": {"Authorization": "Bearer a:b", "x-tenant": "7"}, "tls": TlsSettings(*files)}
    ]
    code, _, error = ask("good", "--url", "https://a:1", "--ca", tmp_path / "nowhere.pem")
    assert code == 1 and "nowhere.pem cannot be read" in error and error.count("\n") == 1


def test_windows(ask, server, repository):
    assert ask("good", "--windows")[0] == 0 and ask("good")[0] == 0
    assert server.windows == [True, False]
    code, out, _ = ask("--local", repository, "--windows", "--json", "good film and dull plot " * 50)
    answer = json.loads(out)
    assert code == 0 and answer["truncated"] is False and answer["rationale"][-1]["end"] > 1000


def test_file_streams_in_chunks(ask, server, tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_text("good film\n" * 600)
    code, out, _ = ask("--file", path, "--json")
    assert code == 0 and len(out.splitlines()) == 600 and server.chunks == [256, 256, 88]


def test_what_was_answered_before_a_bad_line_is_printed(ask, server, tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes(b"good film\n" * 300 + b"\xff\n" + b"good film\n" * 300 + b"\xff\n")
    code, out, error = ask("--file", path, "--json")
    assert code == 1 and len(out.splitlines()) == 300
    assert error == (
        f"error: {path}: line 301 is not UTF-8: byte 1 is 0xff; line 602 is not UTF-8: byte 1 is 0xff; "
        "fix: convert it to UTF-8\n"
    )


def test_a_bad_first_line_is_never_sent(ask, server, tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes(b"\xff\n")
    assert ask("--file", path)[0] == 1 and server.urls == []


def test_a_text_of_unknown_signs_is_placed(ask, server, tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes(("good film\n" * 256 + "fine\n\n\u200b\n").encode() + b"\xff\n" + b"good film\n" * 256 + b"\xff\n")
    code, out, error = ask("--file", path, "--json")
    assert code == 1 and len(out.splitlines()) == 256
    assert error == (
        f"error: {path}: line 259 holds no word that the tokenizer knows; line 260 is not UTF-8: byte 1 is 0xff; "
        "line 517 is not UTF-8: byte 1 is 0xff; fix: give at least one word, or convert it to UTF-8\n"
    )


def test_json_keeps_what_came_with_a_text(ask, server, tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"id": 7, "review": "good film", "label": "gold", "text": "other"}\n{"review": "bad", "x": NaN}\n')
    code, out, _ = ask("--file", path, "--column", "review", "--json")
    first, second = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and (first["id"], first["text"], second["text"], second["x"]) == (7, "good film", "bad", None)
    assert (first["input_label"], first["input_text"]) == ("gold", "other") and first["label"] != "gold"
    assert Prediction.from_dict(first).label == first["label"]


def test_answers_that_are_asked_about_again_lose_nothing(ask, server, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"text": "good film", "label": "second", "input_label": "first"}\n')
    _, out, _ = ask("--file", path, "--json")
    answer = json.loads(out)
    assert (answer["input_label"], answer["input_input_label"]) == ("first", "second")


def test_a_table_is_read_by_its_columns(ask, server, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("number,review\n1,a good film\n2,a bad plot\n")
    code, out, _ = ask("--file", path, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(a["number"], a["text"]) for a in answers] == [("1", "a good film"), ("2", "a bad plot")]


def test_a_text_model_given_an_image_says_what_it_reads(ask, server, repository):
    said = "reads texts, not images; fix: rekd-query \"TEXT\" or --file FILE\n"
    assert ask("--image", "shoe.png") == (1, "", f"error: the model of localhost:8001 {said}")
    assert ask("--local", repository, "--image", "shoe.png") == (1, "", f"error: the model of {repository} {said}")


@pytest.fixture
def stdin(monkeypatch):
    """A function: bytes -> standard input has them."""
    return lambda content: monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_standard_input(ask, server, stdin):
    stdin("東京 good\n".encode())
    code, out, _ = ask("--file", "-", "--json")
    assert code == 0 and json.loads(out)["text"] == "東京 good"


def test_a_bad_line_of_standard_input_is_left_out(ask, server, stdin):
    good = b'{"text": "good film"}\n'
    stdin(good * 255 + b"\xff\n" + good + b'{"text": "\\u200b"}\n' + good * 300)
    code, out, error = ask("--file", "-", "--json")
    assert code == 1 and len(out.splitlines()) == 556 and server.chunks == [256, 256, 255, 45]
    assert error == (
        "error: standard input: line 256 is not UTF-8: byte 1 is 0xff; fix: convert it to UTF-8\n"
        "error: standard input: line 258 holds no word that the tokenizer knows; fix: give at least one word\n"
    )


@pytest.mark.parametrize(("content", "sent"), [(b"\xff\n\n", 0), ("\u200b\n".encode(), 1)])
def test_standard_input_of_bad_lines_alone(ask, server, stdin, content, sent):
    stdin(content)
    code, out, error = ask("--file", "-")
    assert (code, out, len(server.urls)) == (1, "", sent) and error.startswith("error: standard input: line 1 ")


def test_empty_standard_input(ask, server, stdin):
    stdin(b"")
    code, _, error = ask("--file", "-")
    assert code == 1 and error.startswith("error: standard input holds no text; fix:") and server.urls == []


def test_a_hundred_thousand_characters(ask, server):
    code, out, _ = ask("good film " * 10_000, "--json")
    assert code == 0 and json.loads(out)["truncated"] is True


@pytest.mark.parametrize("text", ["", " \n\t", "caf\udce9"])
def test_bad_text_is_one_line_and_never_sent(ask, server, text):
    code, out, error = ask(text)
    assert (code, out) == (1, "") and error.startswith("error: text 1 ") and error.count("\n") == 1
    assert server.urls == []


@pytest.mark.parametrize(
    "arguments",
    ["", "good --file x.txt", "good --url a:1 --local r", "good --timeout 0", "good --nonsense", "good --header x",
     "--image x.png --windows", "good --save d", "good --column x", "good --local r --header x:y",
     "good --local r --ca x"],
)
def test_usage(ask, server, arguments):
    code, out, error = ask(*arguments.split())
    assert (code, out) == (2, "") and "Traceback" not in error and server.urls == []


def test_no_server(ask, server):
    server.failure = ServerUnavailableError("no Triton server answers at x")
    assert ask("good") == (1, "", "error: no Triton server answers at x\n")


def test_debug_shows_where(ask, server):
    server.failure = ServerUnavailableError("no Triton server answers at x")
    code, _, error = ask("good", "--debug")
    assert code == 1 and "Traceback" in error


def test_damaged_repository(ask, tmp_path):
    code, out, error = ask("good", "--local", tmp_path)
    assert (code, out) == (1, "") and "holds no exported model" in error and error.count("\n") == 1
