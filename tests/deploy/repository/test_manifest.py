"""The manifest says what an export is, and files are held against it."""

import json
import shutil

import pytest

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.manifest import signature_from_dict, signature_to_dict, verify_files
from rekd_train.checkpoints.checkpoint import checkpoint_hash


@pytest.fixture
def files(artefacts, tmp_path):
    return {
        role: shutil.copy(getattr(artefacts, role), tmp_path / f"{role}.onnx") for role in ("selector", "predictor")
    }


def test_manifest_says_what_was_exported(artefacts, checkpoint, rationalizer):
    manifest = artefacts.manifest
    assert manifest["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    assert manifest["preprocessing_sha256"] == rationalizer.preprocessor.fingerprint
    assert manifest["policy"] == {"bias": 0.1, "budget": 0.25, "minimum": 1, "selectable": "real"}
    assert manifest["labels"] == ["negative", "positive"] and manifest["probability_temperature"] == 1.3
    assert manifest["capacity"] == 11 and manifest["lengths"] == [16, 32, 48] and manifest["operator"] == "compact"
    assert {"rekd", "torch", "onnx", "onnxscript", "onnxruntime"} <= set(manifest["versions"])
    for entry in manifest["artefacts"].values():
        assert (entry["opset"], entry["precision"], len(entry["sha256"])) == (20, "fp32", 64)
    assert manifest["parity"]["rule_violations"] == 0 and manifest["parity"]["limits"]["logits"] == 1e-4


def test_manifest_is_json_without_paths(artefacts):
    text = json.dumps(artefacts.manifest, allow_nan=False)
    assert json.loads(text) == artefacts.manifest
    assert "/" not in text.replace("</", "")


def test_signature_survives_json(artefacts):
    content = json.loads(json.dumps(signature_to_dict(artefacts.signature)))
    assert content == artefacts.manifest["signature"]
    assert signature_from_dict(content) == artefacts.signature
    with pytest.raises(RepositoryError, match="signature cannot be read"):
        signature_from_dict({"selector": content["selector"]})


def test_untouched_files_pass(artefacts, files):
    verify_files(artefacts.manifest, files)


def test_a_flipped_byte_is_found_and_named(artefacts, files):
    content = bytearray(files["predictor"].read_bytes())
    content[len(content) // 2] ^= 1
    files["predictor"].write_bytes(content)
    with pytest.raises(RepositoryError, match=r"predictor\.onnx was altered") as refusal:
        verify_files(artefacts.manifest, files)
    assert "selector.onnx" not in str(refusal.value)


def test_a_cut_and_a_missing_file_are_named_together(artefacts, files):
    files["selector"].write_bytes(files["selector"].read_bytes()[:-1])
    files["predictor"].unlink()
    with pytest.raises(RepositoryError, match=r"selector\.onnx has \d+ bytes.*predictor\.onnx is missing.*fix: "):
        verify_files(artefacts.manifest, files)


def test_a_swapped_file_is_recognised(artefacts, files):
    entry = dict(artefacts.manifest["artefacts"]["predictor"], bytes=files["selector"].stat().st_size)
    manifest = {"artefacts": {"selector": artefacts.manifest["artefacts"]["selector"], "predictor": entry}}
    with pytest.raises(RepositoryError, match="it is the selector"):
        verify_files(manifest, {"predictor": files["selector"]})


def test_an_artefact_that_the_manifest_lacks_is_named(artefacts, files):
    with pytest.raises(RepositoryError, match="the manifest has no artefact 'single'"):
        verify_files(artefacts.manifest, {"single": files["selector"]})
