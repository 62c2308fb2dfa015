"""rekd-export: what it writes, prints and returns."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from rekd_deploy.cli.export import app
from rekd_deploy.cli.export_summary import summary
from rekd_deploy.errors import ParityError
from rekd_deploy.export import graphs
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import Publication, plan_export, publish
from rekd_deploy.repository.config import read_config
from rekd_deploy.repository.writer import write_repository
from rekd_train.cli.command import run

pytestmark = pytest.mark.slow


@pytest.fixture
def rekd_export(capsys, monkeypatch):
    """Runs the command in this process; its exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            run(app, [*map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    """One run of the command on given texts, in a process with other hash seeds than this one, from another place."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "texts.txt").write_text("good plot\nawful story and a bad actor\n", encoding="utf-8")
    elsewhere = shutil.copytree(checkpoint, folder / "copied checkpoint")
    command = [
        sys.executable, "-m", "rekd_deploy.cli.export", elsewhere, "--output", folder / "repository",
        "--parity-texts", folder / "texts.txt", "--batches", "8,16", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "repository", done.stdout


def test_json_is_one_document_and_nothing_else(published):
    root, printed = published
    document = json.loads(printed)
    assert document["repository"] == str(root) and document["kept"] == []
    assert document["parity"]["source"] == "file" and document["parity"]["examples"] == 2
    assert set(document["seconds"]) == {"load", "selector", "predictor", "parity", "repository"}
    assert document["artefacts"]["selector"]["bytes"] == (root / "rekd_selector/1/model.onnx").stat().st_size
    assert json.loads((root / "manifest.json").read_text())["parity"] == document["parity"]
    assert read_config(root / "rekd" / "config.pbtxt").max_batch_size == 16


def test_another_process_and_place_writes_the_same_graphs(published, artefacts):
    root, _ = published
    assert (root / "rekd_selector/1/model.onnx").read_bytes() == artefacts.selector.read_bytes()
    assert (root / "rekd_predictor/1/model.onnx").read_bytes() == artefacts.predictor.read_bytes()


def test_the_same_export_writes_the_same_bytes(rekd_export, checkpoint, repository, tmp_path):
    assert rekd_export(checkpoint, "--output", tmp_path / "b" / "repository")[0] == 0
    one, other = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()
         and path.parent.name != "__pycache__"}  # a server's
        for root in (tmp_path / "b" / "repository", repository)
    )  # fmt: skip
    assert one == other


def test_an_endpoint_that_was_there_is_exported_again_with_a_warning(rekd_export, checkpoint, artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "repository", text_endpoint=True)
    code, printed, errors = rekd_export(checkpoint, "--output", root, "--batches", "16", "--json")
    assert code == 0 and (root / "rekd_text" / "2").is_dir() and json.loads(printed)["kept"] == ["rekd_text"]
    for part in ("warning: exported, too: rekd_text, since", "--no-text-endpoint leaves it out"):
        assert part in errors
    code, printed, _ = rekd_export(checkpoint, "--output", root, "--no-text-endpoint", "--dry-run", "--json")
    document = json.loads(printed)
    assert code == 0 and document["kept"] == [] and "rekd_text" not in document["models"]


def test_a_failing_gate_leaves_the_old_repository(checkpoint, tmp_path, monkeypatch):
    def refuse(*arguments, **sessions):
        raise ParityError("a class logit differs")

    root = tmp_path / "repository"
    root.mkdir()
    (root / "manifest.json").write_text("old")
    monkeypatch.setattr(graphs, "check_parity", refuse)
    with pytest.raises(ParityError):
        publish(checkpoint, root)
    assert (root / "manifest.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]


def test_the_table_names_artefacts_figures_and_the_repository(checkpoint, artefacts, tmp_path):
    seconds = dict.fromkeys(("load", "selector", "predictor", "parity", "repository"), 1.25)
    plan = plan_export(checkpoint, tmp_path / "r", ExportOptions())
    console = Console(width=140, record=True)
    with console.capture() as shown:
        console.print(*summary(Publication(plan, artefacts.manifest, seconds)), sep="\n")
    text = shown.get()
    for expected in ("selector.onnx", "predictor.onnx", "kB", "fp32", "limit 1e-04", "0 of ", "1.2", "made up"):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere"], 1, "error: no checkpoint at nowhere"),
        (["nowhere", "--target", "mainframe"], 2, "'mainframe' is not one of python"),
        ([], 2, "Missing argument"),
        (["nowhere", "--verify", "somewhere"], 2, "both given"),
        (["--verify", "somewhere", "--keep", "2", "--dry-run"], 2, "--dry-run, --keep does not go with it"),
        (["nowhere", "--checkpoint", "somewhere"], 2, "it goes with --verify"),
        (["nowhere", "--device", "tpu"], 2, "there is no device 'tpu'"),
        (["nowhere", "--lengths", "64;128"], 2, "no list of whole numbers"),
        (["nowhere", "--batches", "0"], 2, "batch 0 is outside"),
        (["--verify", "nowhere"], 1, "error: no model repository at nowhere"),
    ],
)
def test_what_is_wrong_is_said_with_its_exit_code(rekd_export, arguments, code, complaint):
    found, printed, errors = rekd_export(*arguments)
    assert found == code and complaint in errors and not printed and "Traceback" not in errors
    assert code == 2 or len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "heavy", "shown"),
    [
        (["--help"], {"torch", "onnx", "onnxruntime", "numpy"}, "rekd-export runs/demo/student"),
        (["CKPT", "--output", "OUT", "--dry-run", "--json"], {"torch", "onnxruntime", "onnx"}, '"dry_run": true'),
        (["--verify", "REPO", "--json"], {"torch", "transformers"}, '"verified": true'),
    ],
)
def test_nothing_heavy_is_loaded_for_what_needs_none(checkpoint, repository, tmp_path, arguments, heavy, shown):
    paths = {"CKPT": str(checkpoint), "REPO": str(repository), "OUT": str(tmp_path / "r")}
    code = (
        f"import sys\nfrom rekd_deploy.cli.export import main\n"
        f"sys.argv = {['rekd-export', *(paths.get(word, word) for word in arguments)]!r}\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        f"heavy = {heavy!r} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout and list(tmp_path.iterdir()) == []
