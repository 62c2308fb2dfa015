"""A repository is written whole or not at all; nothing that is missing or altered is served."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import contents

from rekd_deploy import RepositoryError
from rekd_deploy.repository.manifest import signature_from_dict, verify_files
from rekd_deploy.repository.reader import check_repository, read_description
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import checkpoint_hash
from rekd_train.files import sha256

WARM_UPS = {"rekd_selector": ("attention_mask", "input_ids"), "rekd_predictor": ("input_ids", "kept", "positions")}
FILES = sorted([
    "manifest.json", "parity.npz", "rekd/1/.gitkeep", "rekd/config.pbtxt", "rekd/labels.txt",
    "rekd_predictor/labels.txt",
    *(f"{model}/{name}" for model in WARM_UPS
      for name in ("1/model.onnx", "1/model.py", "1/triton_graphs.py", "1/triton_tensors.py", "config.pbtxt")),
    *(f"{model}/warmup/{tensor}-{length}" for model, tensors in WARM_UPS.items() for tensor in tensors
      for length in (16, 32, 48))])  # fmt: skip


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def edited(copy, change):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest["repository"])
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_says_what_was_exported_in_the_same_bytes_each_time(
    artefacts, checkpoint, rationalizer, repository, tmp_path):
    manifest = artefacts.manifest
    expected = {"checkpoint_sha256": checkpoint_hash(checkpoint), "labels": ["negative", "positive"],
                "operator": "compact", "preprocessing_sha256": rationalizer.preprocessor.fingerprint,
                "probability_temperature": 1.3,
                "policy": {"bias": 0.1, "budget": 0.25, "minimum": 1, "selectable": "real"}, "capacity": 11,
                "lengths": [16, 32, 48], "slots": [4, 8, 11]}  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
    assert {"rekd", "torch", "onnx", "onnxscript", "onnxruntime"} <= set(manifest["versions"])
    for role, entry in manifest["artefacts"].items():
        graph = artefacts.graphs[role]
        assert (entry["opset"], entry["precision"], entry["fused"]["Attention"] > 0) == (20, "fp32", True)
        assert (entry["sha256"], entry["bytes"]) == (sha256(graph), graph.stat().st_size)
    assert manifest["parity"]["rule_violations"] == 0 and manifest["parity"]["limits"]["logits"] == 1e-4
    text = json.dumps(manifest, allow_nan=False)
    assert json.loads(text) == manifest and "/" not in text.replace("</", ""), "JSON without paths"
    assert sorted(contents(repository)) == FILES
    manifest = check_repository(repository)
    described = manifest.pop("repository")
    assert sorted(described["files"]) == FILES[1:] and manifest == artefacts.manifest
    assert described["batches"] == [8, 16, 32, 64] and described["target"] == "python"
    assert read_description(repository).fingerprint == rationalizer.preprocessor.fingerprint
    again = write_repository(artefacts, tmp_path / "python")
    for name in FILES:
        assert (again / name).read_bytes() == (repository / name).read_bytes(), name


def test_other_files_signatures_and_folders_are_named_and_left_alone(artefacts, tmp_path):
    content = artefacts.manifest["signature"]
    assert signature_from_dict(json.loads(json.dumps(content))) == artefacts.signature
    for damaged in ({"selector": content["selector"]}, {**content, "predictor": {"inputs": 3}}, []):
        with pytest.raises(RepositoryError, match="signature cannot be read"):
            signature_from_dict(damaged)
    altered = shutil.copy(artefacts.predictor, tmp_path / "predictor.onnx")
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    for selector, named in ((artefacts.selector, ""), (tmp_path / "selector.onnx", "selector.onnx, .*")):
        with pytest.raises(RepositoryError, match=f"^{tmp_path}/{named}predictor.onnx was altered or is missing.*fix"):
            verify_files(artefacts.manifest, {"selector": selector, "predictor": altered})
    before = contents(tmp_path)
    with pytest.raises(RepositoryError, match=r"predictor\.onnx.*would be lost"):
        write_repository(artefacts, tmp_path)
    with pytest.raises(RepositoryError, match="is a file"):
        write_repository(artefacts, altered)
    assert contents(tmp_path) == before
    graph = shutil.copyfile(artefacts.selector, tmp_path / "selector.onnx")
    (tmp_path / "selector.onnx.data").write_bytes(b"weights")
    root = write_repository(replace(artefacts, selector=graph), tmp_path / "r")
    assert (root / "rekd_selector/1/selector.onnx.data").read_bytes() == b"weights"


def unlisted(copy):
    graph = "rekd_selector/1/model.onnx"
    edited(copy, lambda described: described["files"].pop(graph))
    (copy / graph).unlink()


@pytest.mark.parametrize(("change", "complaint"), [
    *((lambda copy, name=name: (copy / name).unlink(), name)
      for name in ("manifest.json", "rekd/config.pbtxt", "rekd_predictor/1/model.onnx", "parity.npz")),
    *((lambda copy, name=name: (copy / name).write_bytes(b" "), f"{name} changed") for name in FILES[1::5]),
    *((lambda copy, content=content: (copy / "manifest.json").write_text(content), "manifest.json is damaged")
      for content in ("", "{", "[]", "{}", '{"repository": {}}', '{"repository": 3}')),
    (unlisted, "missing rekd_selector/1/model.onnx"),
    (lambda copy: edited(copy, lambda described: described.update(version=99)), "format version 99"),
    (lambda copy: (copy / "rekd_selector/2").mkdir(), "rekd_selector: version folders are 1, 2, the manifest has 1"),
    (lambda copy: (copy / "notes").mkdir(), "folder notes"), (shutil.rmtree, "no model repository at"),
    (lambda copy: shutil.rmtree(copy) or copy.mkdir(), "holds no exported model")])  # fmt: skip
def test_what_is_not_as_it_was_written_is_named(copy, change, complaint):
    (copy / "notes.txt").touch()
    check_repository(copy)
    change(copy)
    with pytest.raises(RepositoryError, match=complaint):
        check_repository(copy)
