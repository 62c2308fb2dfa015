"""A repository is written whole or not at all, and nothing missing or altered is served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from rekd_deploy.contract.signature import text_pair_signature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.writer import check_repository, read_description, write_repository

LENGTHS = (16, 32, 48)
WARM_UPS = {"rekd_selector": ("attention_mask", "input_ids"), "rekd_predictor": ("input_ids", "kept", "positions")}
FILES = sorted([
    "manifest.json", "parity.npz", "rekd/1/.gitkeep", "rekd/config.pbtxt", "rekd/labels.txt",
    "rekd_predictor/labels.txt",
    *(
        f"{model}/{name}"
        for model in WARM_UPS
        for name in ("1/model.onnx", "1/model.py", "1/triton_batches.py", "1/triton_cuda.py", "config.pbtxt")
    ),
    *(
        f"{model}/warmup/{tensor}-{length}"
        for model, tensors in WARM_UPS.items() for tensor in tensors for length in LENGTHS
    ),
])  # fmt: skip


def listing(root):
    """Its files, without what a server's Python has left there."""
    files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return sorted(path.relative_to(root).as_posix() for path in files)


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def test_layout_and_manifest(repository, artefacts):
    assert listing(repository) == FILES
    manifest = check_repository(repository)
    assert sorted(manifest["repository"]["files"]) == FILES[1:]
    assert {key: value for key, value in manifest.items() if key != "repository"} == artefacts.manifest


def test_writing_twice_gives_the_same_bytes(artefacts, repository, tmp_path):
    again = write_repository(artefacts, tmp_path / "python")
    for name in FILES:
        assert (again / name).read_bytes() == (repository / name).read_bytes(), name


def test_description_comes_from_the_file(repository, rationalizer):
    assert read_description(repository).fingerprint == rationalizer.preprocessor.fingerprint


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(RepositoryError, match=name):
        check_repository(copy)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("manifest")])
def test_altered_file_is_named(copy, name):
    with open(copy / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(RepositoryError, match=f"{name} changed"):
        check_repository(copy)


def test_cut_off_graph_is_named(copy):
    graph = copy / "rekd_selector/1/model.onnx"
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(RepositoryError, match="rekd_selector/1/model.onnx changed"):
        check_repository(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"repository": {}}', '{"repository": 3}'])
def test_damaged_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(RepositoryError, match="manifest.json is damaged"):
        check_repository(copy)


def test_manifest_of_another_version(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["repository"]["version"] = 99
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match="format version 99"):
        check_repository(copy)


def test_stray_folder_is_named_and_a_stray_file_is_not(copy):
    (copy / "notes.txt").touch()
    check_repository(copy)
    (copy / "notes").mkdir()
    with pytest.raises(RepositoryError, match="folder notes"):
        check_repository(copy)


def test_second_version_folder(copy):
    (copy / "rekd_selector" / "2").mkdir()
    with pytest.raises(RepositoryError, match="rekd_selector: version folders"):
        check_repository(copy)


def test_no_repository(tmp_path):
    with pytest.raises(RepositoryError, match="no model repository at"):
        check_repository(tmp_path / "nowhere")
    with pytest.raises(RepositoryError, match="holds no exported model"):
        check_repository(tmp_path)


def test_older_repository_is_replaced(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "r", max_batch_size=4)
    before = (root / "rekd/config.pbtxt").read_bytes()
    write_repository(artefacts, root, max_batch_size=8)
    assert (root / "rekd/config.pbtxt").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    check_repository(root)


def test_a_folder_with_other_things_is_left_alone(artefacts, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RepositoryError, match=r"thesis\.tex.*would be lost"):
        write_repository(artefacts, tmp_path)
    assert listing(tmp_path) == ["thesis.tex"]
    with pytest.raises(RepositoryError, match="is a file"):
        write_repository(artefacts, tmp_path / "thesis.tex")


def test_nothing_is_written_when_config_and_graph_disagree(artefacts, tmp_path):
    wrong = replace(artefacts, signature=text_pair_signature(5, 2))
    with pytest.raises(RepositoryError, match=r"would not load.*positions.*kept"):
        write_repository(wrong, tmp_path / "r")
    assert listing(tmp_path) == []


def test_nothing_is_left_when_writing_fails(artefacts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rekd_deploy.repository.writer.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_repository(artefacts, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_external_weights_travel_with_the_graph(artefacts, tmp_path):
    graph = shutil.copyfile(artefacts.selector, tmp_path / "selector.onnx")
    (tmp_path / "selector.onnx.data").write_bytes(b"weights")
    root = write_repository(replace(artefacts, selector=graph), tmp_path / "r")
    assert (root / "rekd_selector/1/selector.onnx.data").read_bytes() == b"weights"
