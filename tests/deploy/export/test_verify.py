"""rekd-export --verify: what is not as it was exported is found and named."""

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


def test_an_untouched_repository_is_verified_and_another_checkpoint_is_named(repository, checkpoint, tmp_path):
    verification = verify(repository)
    assert set(verification.graphs) == {"selector", "predictor"} and verification.parity == {}
    for agreement in verification.graphs.values():
        assert agreement.rows > 20 and agreement.score_difference < 1e-4 and agreement.logit_difference < 1e-4
    predictor = verification.graphs["predictor"]
    assert verification.graphs["selector"].positions > 300 and predictor.compared_classes == predictor.rows
    document = json.loads(json.dumps(verification.to_dict()))
    assert (document["verified"], document["version"]) == (True, 1)
    assert "verified" in verification_lines(verification)[-1]
    verification = verify(repository, checkpoint=checkpoint)
    assert verification.parity["pair"]["constructed_rows"] > 100
    assert any("pair gate" in line for line in verification_lines(verification))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    rule = json.loads((other / "policy.json").read_text())
    rule["policy"]["bias"] = 0.2
    (other / "policy.json").write_text(json.dumps(rule))
    with pytest.raises(RepositoryError, match=r"exported from the checkpoint [0-9a-f]{12}, but .*other is"):
        verify(repository, checkpoint=other)


def edited(name, change):
    return lambda copy: (copy / name).write_bytes(change(copy / name))


def flipped(path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


def swapped(copy):
    one, other = ((copy / name).read_bytes() for name in (SELECTOR, PREDICTOR))
    (copy / SELECTOR).write_bytes(other)
    (copy / PREDICTOR).write_bytes(one)


@pytest.mark.parametrize(("change", "complaint"), [
    (edited(PREDICTOR, flipped), f": {PREDICTOR} changed since the export"),
    (swapped, f"{PREDICTOR} is the content of {SELECTOR}; {SELECTOR} is the content of {PREDICTOR}"),
    (edited("parity.npz", lambda path: b"cut"), "parity.npz changed since the export"),
    (shutil.rmtree, "no model repository at")])
def test_a_changed_file_is_named(copy, change, complaint):
    change(copy)
    with pytest.raises(RepositoryError, match=complaint) as refusal:
        verify(copy)
    assert "\n" not in str(refusal.value)


OTHERWISE = "does not answer as the exported model did"
LABELS = "rekd/config.pbtxt"


@pytest.mark.parametrize(("name", "change", "complaint"), [
    (SELECTOR, changed_weights, f"{SELECTOR} {OTHERWISE}.*a selector score differs"),
    (PREDICTOR, changed_weights, f"{PREDICTOR} {OTHERWISE}.*a class logit"),
    (PREDICTOR, lambda path: b"\xff" * 100, f"{PREDICTOR} cannot be run: ONNX Runtime cannot load"),
    (SELECTOR, lambda path: (path.parents[2] / PREDICTOR).read_bytes(),
     f"{SELECTOR} cannot be run: rekd_selector has the tensors"),
    (LABELS, lambda path: path.read_bytes().replace(b"negative", b"hostile"), f"{LABELS} describes other labels"),
    ("parity.npz", lambda path: b"cut", "parity.npz is damaged")])
def test_a_forged_manifest_hides_no_wrong_file(copy, name, change, complaint):
    edited(name, change)(copy)
    sign(copy, name)
    with pytest.raises(RepositoryError, match=complaint):
        verify(copy)


def test_cases_are_the_models_answers_up_to_a_limit_and_flips_beyond_near_ties_complaints(
    artefacts, rationalizer, image_rationalizer, tmp_path, monkeypatch):
    cases, signature = read_cases(artefacts.reference), pair_signature(rationalizer).predictor
    widths = {case.inputs["input_ids"].shape[1] for case in cases}
    assert {3, 16, 32, 48} <= widths and artefacts.reference.stat().st_size < 200_000
    for case in cases:
        handover = handed_over(signature, case.mask)
        known = case.inputs | handover
        check_inputs({spec.name: known[spec.name] for spec in signature.inputs}, signature, "")
        assert wrong_handovers({"mask": case.mask, **handover}) == 0
    images = some_images()
    everything = read_cases(record(image_rationalizer, images, tmp_path / "all.npz"))
    assert sum(len(case.mask) for case in everything) > 12
    monkeypatch.setattr("rekd_deploy.parity.reference._LARGEST", 1)
    assert len(read_cases(record(image_rationalizer, images, tmp_path / "one.npz"))) == 1
    case = max(read_cases(artefacts.reference), key=lambda case: case.mask.size)
    limits, other_mask = artefacts.manifest["parity"]["limits"], case.mask.copy()
    other_mask[0, 1] ^= True
    for changed, expected in (({"mask": other_mask}, "1 mask positions"), ({"scores": case.scores * np.nan}, "nan")):
        answers = {"scores": case.scores, "mask": case.mask} | changed
        agreement = compare("selector", lambda inputs, answers=answers: answers, artefacts.signature.selector, [case],
                            1e-9)  # fmt: skip
        assert any(expected in complaint for complaint in complaints(agreement, limits))
    assert complaints(Agreement(), limits) == []
