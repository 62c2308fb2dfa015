"""rekd-export: what it writes, prints and returns."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import contents

from rekd_deploy.cli.export import app
from rekd_deploy.errors import ParityError
from rekd_deploy.export import graphs
from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import read_config
from rekd_deploy.repository.writer import write_repository

pytestmark = pytest.mark.slow


@pytest.fixture
def rekd_export(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_cli(app, *arguments)


def test_json_is_one_document_and_another_process_and_place_writes_the_same_bytes(checkpoint, repository, tmp_path):
    elsewhere, root = shutil.copytree(checkpoint, tmp_path / checkpoint.name), tmp_path / "b" / repository.name
    command = [sys.executable, "-m", "rekd_deploy.cli.export", str(elsewhere), "--output", str(root), "--json"]
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
    code, table, errors = rekd_export(checkpoint, "--output", root, "--batches", "8,16", "--parity-texts", texts)
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
