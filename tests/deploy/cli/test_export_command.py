"""rekd-export and rekd-query from the command line to what they write and print; a stand-in for the server."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
from conftest import contents

from rekd_deploy.cli import query
from rekd_deploy.cli.export import app
from rekd_deploy.client.connection import TlsSettings
from rekd_deploy.errors import ParityError, ServerUnavailableError
from rekd_deploy.export import graphs
from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import read_config
from rekd_deploy.repository.writer import write_repository
from rekd_train.inputs.prediction import Prediction

pytestmark = pytest.mark.slow

@pytest.fixture
def rekd_export(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_cli(app, *arguments)


def test_json_is_one_document_and_another_process_and_place_writes_the_same_bytes(checkpoint, repository, tmp_path):
    elsewhere, root = shutil.copytree(checkpoint, tmp_path / checkpoint.name), tmp_path / "b" / repository.name
    command = [sys.executable, "-m", "rekd_deploy.cli.export", str(elsewhere), "--output", str(root), "--json"]
    command += ["--no-single-graph", "--no-text-endpoint", "--instances", "1"]  # whatever this machine's cores
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["repository"] == str(root) and document["kept"] == []
    assert set(document["seconds"]) == {"load", "selector", "predictor", "parity", "repository"}
    assert document["artefacts"]["selector"]["bytes"] == (root / "rekd_selector/1/model.onnx").stat().st_size
    assert json.loads((root / "manifest.json").read_text())["parity"] == document["parity"]
    assert contents(root) == contents(repository)


def test_an_endpoint_that_was_there_is_exported_again_with_a_warning(rekd_export, checkpoint, artefacts, tmp_path):
    root, texts = write_repository(artefacts, tmp_path / "repository", text_endpoint=True), tmp_path / "texts.txt"
    texts.write_text("good plot\nawful story and a bad actor\n", encoding="utf-8")
    code, table, errors = rekd_export(
        checkpoint, "--target", "onnxruntime", "--output", root, "--batches", "8,16", "--parity-texts", texts
    )
    assert code == 0 and (root / "rekd_text" / "2").is_dir()
    for part in ("warning: exported, too: rekd_text, since", "--no-text-endpoint leaves it out"):
        assert part in errors
    for part in ("selector.onnx", "predictor.onnx", "kB", "fp32", "limit 1e-04", "0 of ", str(root), "2 "):
        assert part in table
    parity = json.loads((root / "manifest.json").read_text())["parity"]
    assert (parity["source"], parity["examples"]) == ("file", 2)
    assert read_config(root / "rekd" / "config.pbtxt").max_batch_size == 16
    code, printed, _ = rekd_export(checkpoint, "--output", root, "--no-text-endpoint", "--dry-run", "--json")
    document = json.loads(printed)
    assert code == 0 and document["kept"] == [] and "rekd_text" not in document["models"]


def test_a_failing_gate_leaves_the_old_repository(checkpoint, tmp_path, monkeypatch):
    manifest = tmp_path / "repository" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("old")
    monkeypatch.setattr(graphs, "check_parity", Mock(side_effect=ParityError("a class logit differs")))
    with pytest.raises(ParityError):
        publish(checkpoint, manifest.parent)
    assert manifest.read_text() == "old" and list(tmp_path.iterdir()) == [manifest.parent]


@pytest.mark.parametrize(("arguments", "code", "complaint"), [
    ("nowhere", 1, "error: no checkpoint at nowhere"),
    ("nowhere --target mainframe", 2, "'mainframe' is not one of python"), ("", 2, "Missing argument"),
    ("nowhere --verify somewhere", 2, "both given"),
    ("--verify somewhere --keep 2 --dry-run", 2, "--dry-run, --keep does not go with it"),
    ("nowhere --checkpoint somewhere", 2, "it goes with --verify"),
    ("nowhere --tune --threads 2", 2, "fix: leave out --instances and --threads"),
    ("nowhere --device tpu", 2, "there is no device 'tpu'"),
    ("nowhere --lengths 64;128", 2, "no list of whole numbers"), ("nowhere --batches 0", 2, "batch 0 is outside"),
    ("--verify nowhere", 1, "error: no model repository at nowhere")])
def test_what_is_wrong_is_said_with_its_exit_code(rekd_export, arguments, code, complaint):
    found, printed, errors = rekd_export(*arguments.split())
    assert found == code and complaint in errors and not printed and "Traceback" not in errors
    assert code == 2 or len(errors.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "heavy", "shown"), [
    (["CKPT", "--output", "OUT", "--dry-run", "--json"], {"torch", "onnxruntime", "onnx"}, '"dry_run": true'),
    (["--verify", "REPO", "--json"], {"torch", "transformers"}, '"verified": true')])
def test_nothing_heavy_is_loaded_for_what_needs_none(checkpoint, repository, tmp_path, arguments, heavy, shown):
    paths = {"CKPT": str(checkpoint), "REPO": str(repository), "OUT": str(tmp_path / "r")}
    code = (
        f"import sys\nfrom rekd_deploy.cli.export import main\n"
        f"sys.argv = {['rekd-export', *(paths.get(word, word) for word in arguments)]!r}\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        f"heavy = {heavy!r} & set(sys.modules); assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout and list(tmp_path.iterdir()) == []


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
    assert server.call_args_list == [call("localhost:8001", model="rekd", timeout=30.0, headers={}, tls=None)] * 2
    (tmp_path / "reviews.txt").write_text("good film\n" * 600)
    code, printed, _ = rekd_query("--file", tmp_path / "reviews.txt", "--json")
    assert code == 0 and printed.count("\n") == 600
    assert [len(each.args[0]) for each in server.predict.call_args_list[2:]] == [256, 256, 88]
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
    given += ["--model", "rekd_five"]
    assert rekd_query("good", "--url", "https://a:1", *given)[0] == rekd_query("good", "--windows")[0] == 0
    headers = {"Authorization": "Bearer a:b", "x-tenant": "7"}
    tls = TlsSettings(*files)
    assert server.call_args_list[0] == call("https://a:1", model="rekd_five", timeout=2.0, headers=headers, tls=tls)
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
    rekd_query, server, monkeypatch, tmp_path, piped, content, printed, errors):
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
        "good --local r --header x:y", "good --local r --model rekd_five")),
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
