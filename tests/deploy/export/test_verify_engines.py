"""Engines of a repository, verified where they can run and named where they are not what they should be."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
from fake_tensorrt import FakeDriver, FakeLibrary
from test_verify import other_weights, sign

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.verify import verify
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes.tensorrt import execution as tensorrt_execution
from rekd_deploy.runtimes.tensorrt.build import Range, profiles_of
from rekd_train.files import sha256

ROLES = ("selector", "predictor")


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def library(driver, monkeypatch):
    library = FakeLibrary(driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return library


@pytest.fixture
def root(artefacts, library, tmp_path):
    """A repository with two engines that the stand-in of TensorRT can run."""
    plans, entries = {}, json.loads(json.dumps(artefacts.manifest["artefacts"]))
    for role in ROLES:
        plans[role] = tmp_path / f"{role}.plan"
        plans[role].write_bytes(role.encode())
        profiles = profiles_of(artefacts.signature.graph(role), [Range(1, 8, 64)], [Range(3, 16, 48)])
        library.plans[role.encode()] = (str(getattr(artefacts, role)), profiles)
        entries[role]["engine"] = {
            "format": "tensorrt-rtx", "version": "1.7.1.116", "built_for": ["sm89"], "precision": "fp32",
            "observed": "not available", "status": "unverified", "bytes": len(role), "sha256": sha256(plans[role]),
            "graph_sha256": sha256(getattr(artefacts, role)), "profiles": json.loads(json.dumps(profiles)),
        }
    with_engines = replace(artefacts, engines=plans, manifest={**artefacts.manifest, "artefacts": entries})
    return write_repository(with_engines, tmp_path / "r")


def entry_of(root, role="selector"):
    return json.loads((root / "manifest.json").read_text())["artefacts"][role]["engine"]


def test_on_a_gpu_engines_run_and_the_manifest_is_completed(root):
    assert entry_of(root)["status"] == "unverified"
    verification = verify(root)
    assert verification.engines["selector"].agreement.score_difference < 1e-4
    assert verification.engines["predictor"].agreement.compared_classes > 20
    assert entry_of(root)["status"] == "verified" and entry_of(root, "predictor")["observed"] == "fp32"
    assert "verified on Fake RTX" in "\n".join(verification_lines(verification))
    assert json.loads(json.dumps(verification.to_dict()))["engines"]["selector"]["gpu"].startswith("Fake RTX")
    before = (root / "manifest.json").stat().st_mtime_ns
    verify(root)
    assert (root / "manifest.json").stat().st_mtime_ns == before


def test_engines_run_on_the_gpu_that_is_named(root, driver, monkeypatch):
    monkeypatch.setattr("rekd_deploy.export.verify.check_device", lambda device: None)  # of ONNX Runtime
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["parity"]["emulated"] = True  # so that the engines alone are run
    (root / "manifest.json").write_text(json.dumps(manifest))
    driver.devices = 1
    assert "GPU 1" in verify(root, device="cuda:1").engines["selector"].reason
    driver.devices = 2
    assert verify(root, device="cuda:1").engines["selector"].agreement.rows > 20


def test_without_a_gpu_they_stay_unverified_and_it_is_said(root, driver):
    driver.devices = 0
    verification = verify(root)
    assert entry_of(root)["status"] == "unverified" and set(verification.graphs) == set(ROLES)
    assert "selector engine unverified: there is no GPU 0" in "\n".join(verification_lines(verification))


def test_a_stale_engine_is_named_with_and_without_a_gpu(root, driver, tmp_path):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["artefacts"]["predictor"]["engine"]["graph_sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))
    for driver.devices in (1, 0):
        with pytest.raises(RepositoryError, match=r"rekd_predictor/1/model.plan is stale"):
            verify(root)


def test_an_engine_of_another_checkpoint_answers_otherwise(root, library, artefacts, tmp_path):
    other = shutil.copyfile(artefacts.selector, tmp_path / "other.onnx")
    other_weights(other)
    library.plans[b"selector"] = (str(other), library.plans[b"selector"][1])
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan does not answer.*a selector score differs"):
        verify(root)
    assert entry_of(root)["status"] == "unverified"


def test_an_altered_engine_is_named(root):
    (root / "rekd_selector/1/model.plan").write_bytes(b"other")
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan changed"):
        verify(root)
    sign(root, "rekd_selector/1/model.plan")
    with pytest.raises(RepositoryError, match=r"model.plan was altered"):
        verify(root)
