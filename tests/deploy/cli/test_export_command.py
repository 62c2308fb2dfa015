"""rekd-export: what it writes, prints and returns."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from rekd_deploy.errors import ParityError, RepositoryError
from rekd_deploy.export.run import publish


def rekd_export(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "rekd_deploy.cli.export", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    """One run of the command, in a process with other hash seeds than this one, on given texts."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "texts.txt").write_text("good plot\nawful story and a bad actor\n", encoding="utf-8")
    done = rekd_export(
        checkpoint, "--output", folder / "repository", "--parity-texts", folder / "texts.txt", "--max-batch-size", 16,
        "--json", PYTHONHASHSEED="7", COLUMNS="200",
    )
    assert done.returncode == 0, done.stderr
    return folder / "repository", done


def test_json_is_one_document_and_nothing_else(published):
    root, done = published
    document = json.loads(done.stdout)
    assert document["repository"] == str(root)
    assert document["parity"]["source"] == "file" and document["parity"]["examples"] == 2
    assert set(document["seconds"]) == {"load", "selector", "predictor", "parity", "repository"}
    assert document["artefacts"]["selector"]["bytes"] == (root / "rekd_selector/1/model.onnx").stat().st_size
    assert json.loads((root / "manifest.json").read_text())["parity"] == document["parity"]


def test_another_process_writes_the_same_graphs(published, artefacts):
    root, _ = published
    assert (root / "rekd_selector/1/model.onnx").read_bytes() == artefacts.selector.read_bytes()
    assert (root / "rekd_predictor/1/model.onnx").read_bytes() == artefacts.predictor.read_bytes()


def test_an_endpoint_that_was_there_is_exported_again_with_a_warning(published, checkpoint, artefacts, tmp_path):
    from rekd_deploy.repository.writer import write_repository

    root = write_repository(artefacts, tmp_path / "repository", text_endpoint=True)
    done = rekd_export(checkpoint, "--output", root, "--max-batch-size", 16, "--json", COLUMNS="200")
    assert done.returncode == 0 and (root / "rekd_text" / "2").is_dir()
    for part in ("warning: exported, too: rekd_text, since", "--no-text-endpoint leaves it out"):
        assert part in done.stderr
    assert json.loads(done.stdout)["kept"] == ["rekd_text"] and json.loads(published[1].stdout)["kept"] == []
    done = rekd_export(checkpoint, "--output", root, "--no-text-endpoint", COLUMNS="200")
    assert done.returncode == 0 and "warning" not in done.stderr and not (root / "rekd_text").exists()


def test_max_batch_size_reaches_the_configs(published):
    from rekd_deploy.repository.config import read_config

    root, _ = published
    assert read_config(root / "rekd" / "config.pbtxt").max_batch_size == 16


def test_a_failing_gate_leaves_the_old_repository(checkpoint, tmp_path, monkeypatch):
    import rekd_deploy.export.graphs

    def refuse(*arguments, **sessions):
        raise ParityError("a class logit differs")

    root = tmp_path / "repository"
    root.mkdir()
    (root / "manifest.json").write_text("old")
    monkeypatch.setattr(rekd_deploy.export.graphs, "check_parity", refuse)
    with pytest.raises(ParityError):
        publish(checkpoint, root)
    assert (root / "manifest.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]


def test_the_table_names_artefacts_figures_and_the_repository(artefacts, tmp_path):
    from rich.console import Console

    from rekd_deploy.cli.export_summary import summary
    from rekd_deploy.export.run import Publication

    seconds = dict.fromkeys(("load", "selector", "predictor", "parity", "repository"), 1.25)
    console = Console(width=140, record=True)
    with console.capture() as shown:
        console.print(*summary(Publication(tmp_path, artefacts.manifest, seconds)), sep="\n")
    text = shown.get()
    for expected in ("selector.onnx", "predictor.onnx", "kB", "fp32", "limit 1e-04", "0 of ", "1.2", "made up"):
        assert expected in text


def test_an_output_that_holds_something_else_is_refused_before_any_work(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RepositoryError, match="holds thesis.tex"):
        publish(checkpoint, tmp_path, report=lambda step: pytest.fail(f"started: {step}"))


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere"], 1, "error: no checkpoint at nowhere"),
        (["nowhere", "--target", "mainframe"], 2, "'mainframe' is not one of python"),
        (["nowhere", "--max-batch-size", "0"], 2, "--max-batch-size"),
        ([], 2, "Missing argument"),
    ],
)
def test_exit_codes(arguments, code, complaint):
    done = rekd_export(*arguments, COLUMNS="200")
    assert done.returncode == code and complaint in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


def test_help_shows_examples_and_loads_no_torch():
    code = (
        "import sys\nfrom rekd_deploy.cli.export import main\nsys.argv = ['rekd-export', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rekd-export runs/demo/student" in done.stdout


def test_another_process_and_place_writes_the_same_bytes(checkpoint, repository, tmp_path):
    elsewhere = shutil.copytree(checkpoint, tmp_path / "copied checkpoint")
    done = rekd_export(elsewhere, "--output", tmp_path / "b" / "repository", "--json", PYTHONHASHSEED="11")
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path / "b" / "repository") == listing(repository)


def listing(root):
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]  # a server's
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
