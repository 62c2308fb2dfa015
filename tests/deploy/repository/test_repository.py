"""A repository is written whole or not at all; nothing that is missing or altered is served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.manifest import signature_from_dict, signature_to_dict, verify_files
from rekd_deploy.repository.reader import check_repository, read_description
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import checkpoint_hash

LENGTHS = (16, 32, 48)
WARM_UPS = {"rekd_selector": ("attention_mask", "input_ids"), "rekd_predictor": ("input_ids", "kept", "positions")}
FILES = sorted([
    "manifest.json", "parity.npz", "rekd/1/.gitkeep", "rekd/config.pbtxt", "rekd/labels.txt",
    "rekd_predictor/labels.txt",
    *(
        f"{model}/{name}"
        for model in WARM_UPS for name in ("1/model.onnx", "1/model.py", "1/triton_graphs.py", "config.pbtxt")
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


def test_manifest_says_what_was_exported(artefacts, checkpoint, rationalizer):
    manifest = artefacts.manifest
    assert manifest["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    assert manifest["preprocessing_sha256"] == rationalizer.preprocessor.fingerprint
    assert manifest["policy"] == {"bias": 0.1, "budget": 0.25, "minimum": 1, "selectable": "real"}
    assert manifest["labels"] == ["negative", "positive"] and manifest["probability_temperature"] == 1.3
    assert manifest["capacity"] == 11 and manifest["lengths"] == [16, 32, 48] and manifest["operator"] == "compact"
    assert manifest["slots"] == [4, 8, 11]
    assert {"rekd", "torch", "onnx", "onnxscript", "onnxruntime"} <= set(manifest["versions"])
    for entry in manifest["artefacts"].values():
        assert (entry["opset"], entry["precision"], len(entry["sha256"])) == (20, "fp32", 64)
        assert entry["bytes"] > 1000 and entry["fused"]["Attention"] > 0
    assert manifest["parity"]["rule_violations"] == 0 and manifest["parity"]["limits"]["logits"] == 1e-4
    text = json.dumps(manifest, allow_nan=False)
    assert json.loads(text) == manifest and "/" not in text.replace("</", ""), "JSON without paths"


def test_signature_survives_json(artefacts):
    content = json.loads(json.dumps(signature_to_dict(artefacts.signature)))
    assert content == artefacts.manifest["signature"]
    assert signature_from_dict(content) == artefacts.signature
    for damaged in ({"selector": content["selector"]}, {**content, "predictor": {"inputs": 3}}, []):
        with pytest.raises(RepositoryError, match="signature cannot be read"):
            signature_from_dict(damaged)


def test_files_that_are_not_the_manifests_are_named(artefacts, tmp_path):
    files = artefacts.graphs
    verify_files(artefacts.manifest, files)
    altered = shutil.copy(files["predictor"], tmp_path / "predictor.onnx")
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    with pytest.raises(RepositoryError, match=r"predictor\.onnx was altered.*fix: ") as refusal:
        verify_files(artefacts.manifest, {**files, "predictor": altered})
    assert "selector.onnx" not in str(refusal.value)
    with pytest.raises(RepositoryError, match=r"selector\.onnx, .*predictor\.onnx was altered or is missing"):
        verify_files(artefacts.manifest, {"selector": tmp_path / "selector.onnx", "predictor": altered})


def test_layout_and_manifest(repository, artefacts, rationalizer):
    assert listing(repository) == FILES
    manifest = check_repository(repository)
    assert sorted(manifest["repository"]["files"]) == FILES[1:]
    assert {key: value for key, value in manifest.items() if key != "repository"} == artefacts.manifest
    assert manifest["repository"]["batches"] == [8, 16, 32, 64] and manifest["repository"]["target"] == "python"
    assert read_description(repository).fingerprint == rationalizer.preprocessor.fingerprint


def test_writing_twice_gives_the_same_bytes(artefacts, repository, tmp_path):
    again = write_repository(artefacts, tmp_path / "python")
    for name in FILES:
        assert (again / name).read_bytes() == (repository / name).read_bytes(), name


@pytest.mark.parametrize("name", ["manifest.json", "rekd/config.pbtxt", "rekd_predictor/1/model.onnx", "parity.npz"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(RepositoryError, match=name):
        check_repository(copy)


def test_files_that_the_manifest_does_not_list_are_missed_all_the_same(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["repository"]["files"]["rekd_selector/1/model.onnx"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "rekd_selector/1/model.onnx").unlink()
    with pytest.raises(RepositoryError, match="missing rekd_selector/1/model.onnx"):
        check_repository(copy)


@pytest.mark.parametrize("name", FILES[1::5])
def test_altered_file_is_named(copy, name):
    with open(copy / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(RepositoryError, match=f"{name} changed"):
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


def test_stray_folders_are_named_and_a_stray_file_is_not(copy):
    (copy / "notes.txt").touch()
    check_repository(copy)
    (copy / "rekd_selector" / "2").mkdir()
    with pytest.raises(RepositoryError, match="rekd_selector: version folders are 1, 2, the manifest has 1"):
        check_repository(copy)
    (copy / "notes").mkdir()
    with pytest.raises(RepositoryError, match="folder notes"):
        check_repository(copy)


def test_no_repository(tmp_path):
    with pytest.raises(RepositoryError, match="no model repository at"):
        check_repository(tmp_path / "nowhere")
    with pytest.raises(RepositoryError, match="holds no exported model"):
        check_repository(tmp_path)


def test_a_folder_with_other_things_is_left_alone(artefacts, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RepositoryError, match=r"thesis\.tex.*would be lost"):
        write_repository(artefacts, tmp_path)
    assert listing(tmp_path) == ["thesis.tex"]
    with pytest.raises(RepositoryError, match="is a file"):
        write_repository(artefacts, tmp_path / "thesis.tex")


def test_external_weights_travel_with_the_graph(artefacts, tmp_path):
    graph = shutil.copyfile(artefacts.selector, tmp_path / "selector.onnx")
    (tmp_path / "selector.onnx.data").write_bytes(b"weights")
    root = write_repository(replace(artefacts, selector=graph), tmp_path / "r")
    assert (root / "rekd_selector/1/selector.onnx.data").read_bytes() == b"weights"
