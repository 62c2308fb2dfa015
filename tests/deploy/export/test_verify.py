"""rekd-export --verify: what is not as it was exported is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

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
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes.base import check_inputs
from rekd_train.files import sha256

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


def other_weights(path):
    """As a graph of another checkpoint: the same shape, other numbers."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), largest.name))
    path.write_bytes(model.SerializeToString())


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


def test_a_flipped_byte(copy):
    content = bytearray((copy / PREDICTOR).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / PREDICTOR).write_bytes(content)
    with pytest.raises(RepositoryError, match=f"{PREDICTOR} changed since the export") as refusal:
        verify(copy)
    assert SELECTOR not in str(refusal.value) and "\n" not in str(refusal.value)


def test_swapped_files(copy):
    (copy / SELECTOR).rename(copy / "aside")
    (copy / PREDICTOR).rename(copy / SELECTOR)
    (copy / "aside").rename(copy / PREDICTOR)
    with pytest.raises(RepositoryError, match=f"{SELECTOR} is the content of {PREDICTOR}") as refusal:
        verify(copy)
    assert f"{PREDICTOR} is the content of {SELECTOR}" in str(refusal.value)
    assert "does not load" in str(refusal.value)


def test_a_graph_of_another_checkpoint(copy):
    other_weights(copy / SELECTOR)
    with pytest.raises(RepositoryError, match=f"{SELECTOR} answers otherwise than the exported model: a graph of"):
        verify(copy)


def test_the_same_graph_in_other_bytes(copy):
    model = onnx.load(copy / SELECTOR)
    model.doc_string = "polished"
    (copy / SELECTOR).write_bytes(model.SerializeToString())
    with pytest.raises(RepositoryError, match=f"{SELECTOR} still answers as the exported model"):
        verify(copy)


@pytest.mark.parametrize(("name", "what"), [(SELECTOR, "a selector score differs"), (PREDICTOR, "a class logit")])
def test_a_graph_of_another_checkpoint_in_a_forged_manifest(copy, name, what):
    other_weights(copy / name)
    sign(copy, name)
    with pytest.raises(RepositoryError, match=f"{name} does not answer as the exported model did.*{what}"):
        verify(copy)


def test_a_corrupt_graph_in_a_forged_manifest(copy):
    (copy / PREDICTOR).write_bytes(b"\xff" * 100)
    sign(copy, PREDICTOR)
    with pytest.raises(RepositoryError, match=f"{PREDICTOR} is no ONNX file"):
        verify(copy)


def test_a_graph_with_other_tensors_in_a_forged_manifest(copy):
    shutil.copyfile(copy / PREDICTOR, copy / SELECTOR)
    sign(copy, SELECTOR)
    with pytest.raises(RepositoryError, match="rekd_selector: the graph's inputs are"):
        verify(copy)


def test_a_configuration_of_another_model_in_a_forged_manifest(copy):
    config = copy / "rekd" / "config.pbtxt"
    config.write_text(config.read_text().replace("negative", "hostile"))
    sign(copy, "rekd/config.pbtxt")
    with pytest.raises(RepositoryError, match=r"rekd/config.pbtxt describes other labels"):
        verify(copy)


def test_damaged_answers(copy):
    (copy / "parity.npz").write_bytes((copy / "parity.npz").read_bytes()[:500])
    with pytest.raises(RepositoryError, match=r"parity.npz changed"):
        verify(copy)
    sign(copy, "parity.npz")
    with pytest.raises(RepositoryError, match=r"parity.npz is damaged"):
        verify(copy)


def test_a_repository_without_stored_answers(artefacts, tmp_path):
    root = write_repository(replace(artefacts, reference=None), tmp_path / "r")
    verification = verify(root)
    assert verification.graphs == {} and verification.without_cases == ["selector", "predictor"]
    assert any("not compared" in line for line in verification_lines(verification))


def test_nothing_there(tmp_path):
    with pytest.raises(RepositoryError, match="no model repository at"):
        verify(tmp_path / "nowhere")


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


def test_cases_are_written_the_same_every_time(rationalizer, texts, tmp_path):
    one, other = (record(rationalizer, texts, tmp_path / name) for name in ("one.npz", "other.npz"))
    assert one.read_bytes() == other.read_bytes()


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


# the command


def rekd_export(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rekd_deploy.cli.export", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_names_the_file_in_one_line(copy):
    (copy / SELECTOR).write_bytes(b"")
    done = rekd_export("--verify", copy)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and SELECTOR in done.stderr


def test_verification_loads_no_torch(repository):
    code = (
        f"import sys\nsys.argv = ['rekd-export', '--verify', {str(repository)!r}, '--json']\n"
        "from rekd_deploy.cli.export import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--verify", "somewhere"], "both given"),
        (["--verify", "somewhere", "--keep", "2", "--dry-run"], "--dry-run, --keep does not go with it"),
        (["nowhere", "--checkpoint", "somewhere"], "it goes with --verify"),
        (["nowhere", "--device", "tpu"], "there is no device 'tpu'"),
        (["nowhere", "--lengths", "64;128"], "no list of whole numbers"),
        (["nowhere", "--batches", "0"], "batch 0 is outside"),
    ],
)
def test_usage(arguments, complaint):
    done = rekd_export(*arguments)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr
