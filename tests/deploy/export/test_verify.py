"""rekd-export --verify: what is not as it was exported is found and named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from families import some_images
from onnx import numpy_helper

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.verify import verify
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.parity.gate import wrong_handovers
from rekd_deploy.parity.reference import Agreement, compare, complaints, handed_over, read_cases, record
from rekd_deploy.runtimes.base import check_inputs
from rekd_train.files import sha256

pytestmark = pytest.mark.slow

SELECTOR, PREDICTOR = "rekd_selector/1/model.onnx", "rekd_predictor/1/model.onnx"


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def sign(root, *names):
    """Write the files' hashes into the manifest, as someone would who means to deceive it."""
    manifest = json.loads((root / "manifest.json").read_text())
    for name in names:
        manifest["repository"]["files"][name] = sha256(root / name)
        for role, entry in manifest["artefacts"].items():
            if name == f"rekd_{role}/1/model.onnx":
                entry |= {"bytes": (root / name).stat().st_size, "sha256": sha256(root / name)}
    (root / "manifest.json").write_text(json.dumps(manifest))


def changed_weights(path) -> bytes:
    """A graph as of another checkpoint: the same shape, other numbers."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), largest.name))
    return model.SerializeToString()


def test_an_untouched_repository_is_verified(repository, checkpoint):
    verification = verify(repository)
    assert set(verification.graphs) == {"selector", "predictor"} and verification.parity == {}
    for agreement in verification.graphs.values():
        assert agreement.rows > 20 and agreement.score_difference < 1e-4 and agreement.logit_difference < 1e-4
    assert verification.graphs["selector"].positions > 300
    assert verification.graphs["predictor"].compared_classes == verification.graphs["predictor"].rows
    document = json.loads(json.dumps(verification.to_dict()))
    assert document["verified"] is True and document["version"] == 1
    assert "verified" in verification_lines(verification)[-1]


def test_with_the_checkpoint_the_whole_gate_runs(repository, checkpoint):
    verification = verify(repository, checkpoint=checkpoint)
    assert verification.parity["pair"]["constructed_rows"] > 100
    assert any("pair gate" in line for line in verification_lines(verification))


def test_another_checkpoint_is_named(repository, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    rule = json.loads((other / "policy.json").read_text())
    rule["policy"]["bias"] = 0.2
    (other / "policy.json").write_text(json.dumps(rule))
    with pytest.raises(RepositoryError, match=r"exported from the checkpoint [0-9a-f]{12}, but .*other is"):
        verify(repository, checkpoint=other)


def flipped(copy):
    content = bytearray((copy / PREDICTOR).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / PREDICTOR).write_bytes(content)


def swapped(copy):
    (copy / SELECTOR).rename(copy / "aside")
    (copy / PREDICTOR).rename(copy / SELECTOR)
    (copy / "aside").rename(copy / PREDICTOR)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (flipped, f": {PREDICTOR} changed since the export"),
        (swapped, f"{PREDICTOR} is the content of {SELECTOR}; {SELECTOR} is the content of {PREDICTOR}"),
        (lambda copy: (copy / "parity.npz").write_bytes(b"cut"), "parity.npz changed since the export"),
        (shutil.rmtree, "no model repository at"),
    ],
)
def test_a_changed_file_is_named(copy, change, complaint):
    change(copy)
    with pytest.raises(RepositoryError, match=complaint) as refusal:
        verify(copy)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "what"), [(SELECTOR, "a selector score differs"), (PREDICTOR, "a class logit")])
def test_a_graph_of_another_checkpoint_in_a_forged_manifest(copy, name, what):
    (copy / name).write_bytes(changed_weights(copy / name))
    sign(copy, name)
    with pytest.raises(RepositoryError, match=f"{name} does not answer as the exported model did.*{what}"):
        verify(copy)


def of_other_labels(copy):
    config = copy / "rekd" / "config.pbtxt"
    config.write_text(config.read_text().replace("negative", "hostile"))


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (PREDICTOR, lambda copy: (copy / PREDICTOR).write_bytes(b"\xff" * 100),
         f"{PREDICTOR} cannot be run: ONNX Runtime cannot load"),
        (SELECTOR, lambda copy: shutil.copyfile(copy / PREDICTOR, copy / SELECTOR),
         f"{SELECTOR} cannot be run: rekd_selector has the tensors"),
        ("rekd/config.pbtxt", of_other_labels, "rekd/config.pbtxt describes other labels"),
        ("parity.npz", lambda copy: (copy / "parity.npz").write_bytes(b"cut"), "parity.npz is damaged"),
    ],
)
def test_a_forged_manifest_hides_no_wrong_file(copy, name, change, complaint):
    change(copy)
    sign(copy, name)
    with pytest.raises(RepositoryError, match=complaint):
        verify(copy)


# the stored cases


def test_cases_are_the_models_answers(artefacts, rationalizer):
    cases, signature = read_cases(artefacts.reference), pair_signature(rationalizer)
    widths = {case.inputs["input_ids"].shape[1] for case in cases}
    assert {3, 16, 32, 48} <= widths and artefacts.reference.stat().st_size < 200_000
    for case in cases:
        handover = handed_over(signature.predictor, case.mask)
        known = case.inputs | handover
        check_inputs({spec.name: known[spec.name] for spec in signature.predictor.inputs}, signature.predictor, "")
        assert wrong_handovers({"mask": case.mask, **handover}) == 0


def test_images_are_stored_up_to_a_limit(image_rationalizer, tmp_path, monkeypatch):
    images = some_images()
    everything = read_cases(record(image_rationalizer, images, tmp_path / "all.npz"))
    assert sum(len(case.mask) for case in everything) > 12
    monkeypatch.setattr("rekd_deploy.parity.reference._LARGEST", 1)
    assert len(read_cases(record(image_rationalizer, images, tmp_path / "one.npz"))) == 1


def test_flips_beyond_near_ties_and_numbers_that_are_none_are_complaints(artefacts, rationalizer):
    signature = pair_signature(rationalizer).selector
    case = max(read_cases(artefacts.reference), key=lambda case: case.mask.size)
    limits = artefacts.manifest["parity"]["limits"]
    flipped = case.mask.copy()
    flipped[0, 1] ^= True
    for changed, expected in (({"mask": flipped}, "1 mask positions"), ({"scores": case.scores * np.nan}, "nan")):
        answers = {"scores": case.scores, "mask": case.mask} | changed
        agreement = compare("selector", lambda inputs, answers=answers: answers, signature, [case], 1e-9)
        assert any(expected in complaint for complaint in complaints(agreement, limits))
    assert complaints(Agreement(), limits) == []
