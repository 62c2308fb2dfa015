"""The engine runner: what is bound where, in which profile, and that everything is given back. On a fake GPU."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_tensorrt import FakeDriver, FakeLibrary

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes import tensorrt_execution
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import TensorRTRunner
from rekd_deploy.runtimes.tensorrt_build import Range, profiles_of
from rekd_deploy.runtimes.tensorrt_entry import verify_engine
from rekd_train.files import sha256

PLAN = b"an engine"
MISSING: dict = {}


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def signature(artefacts):
    return artefacts.signature.selector


@pytest.fixture
def profiles(signature):
    return profiles_of(signature, [Range(1, 1, 2), Range(3, 8, 8)], [Range(3, 16, 16), Range(17, 48, 48)])


@pytest.fixture
def library(driver, artefacts, profiles, monkeypatch):
    library = FakeLibrary(driver)
    library.plans[PLAN] = (str(artefacts.selector), profiles)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return library


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(PLAN)
    return path


@pytest.fixture
def runner(library, plan, signature):
    return TensorRTRunner(plan, signature, "the selector", engine="tensorrt-rtx")


@pytest.fixture
def entry(plan, artefacts, profiles):
    return {
        "format": "tensorrt-rtx", "version": "1.7.1.116", "precision": "fp32",
        "status": "unverified", "sha256": sha256(plan), "graph_sha256": sha256(artefacts.selector),
        "profiles": json.loads(json.dumps(profiles)),
    }  # fmt: skip


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch * length)
    mask = np.ones((batch, length), np.int64)
    mask[0, 3:] = 0
    return {"input_ids": generator.integers(4, 40, (batch, length)), "attention_mask": mask}


def test_answers_are_the_graphs_at_every_shape(runner, library, artefacts, signature, driver):
    reference = OnnxRuntimeRunner(artefacts.selector, signature, "the graph")
    with runner, reference:
        for batch, length in ((1, 3), (8, 48), (2, 48), (3, 17), (1, 16), (1, 48)):
            inputs = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in tokens(batch, length).items()}
            assert batch == 1 or not inputs["input_ids"].flags.c_contiguous
            expected, found = reference.run(inputs), runner.run(inputs)
            assert list(found) == list(expected) == [spec.name for spec in signature.outputs]
            for name in expected:
                assert found[name].dtype == expected[name].dtype
                np.testing.assert_array_equal(found[name], expected[name])
        assert library.loaded[0].context.chosen == [3, 1, 3, 0, 1]
        assert len(driver.blocks) == len(signature.inputs) + len(signature.outputs)
        driver.calls.clear()
    assert not driver.blocks and driver.calls[0] == "cuCtxSetCurrent", "whoever closes may be another thread"
    assert driver.calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    with pytest.raises(EngineError, match="inside a `with` block"):
        runner.run(tokens(1, 3))


def test_threads_that_share_an_engine_get_their_own_answers(runner, artefacts, signature):
    requests = [tokens(1 + turn % 3, 12 + turn % 4) for turn in range(12)]
    with runner, OnnxRuntimeRunner(artefacts.selector, signature, "the graph") as reference:
        expected = [reference.run(inputs)["scores"] for inputs in requests]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda turn: runner.run(requests[turn % 12])["scores"], range(240)))
    for turn, scores in enumerate(found):
        np.testing.assert_array_equal(scores, expected[turn % 12])


def test_closing_waits_for_the_request_that_runs(runner):
    runner.__enter__()
    execution = runner.execution
    with ThreadPoolExecutor(1) as threads:
        with execution._lock:
            closing = threads.submit(runner.__exit__, None, None, None)
            with pytest.raises(TimeoutError):
                closing.result(0.2)
        closing.result(5)
    with pytest.raises(tensorrt_execution.ExecutionError, match="is closed"):
        execution.run(tokens(1, 3))


def test_shapes_outside_the_profiles_are_named(runner):
    with runner, pytest.raises(EngineError, match=r"the selector: the shapes .*\(9, 3\).* outside .*\(8, 48\)"):
        runner.run(tokens(9, 3))


def test_what_a_failing_gpu_says_is_one_line_and_nothing_stays(runner, driver):
    with runner, pytest.raises(EngineError, match=r"cuMemAlloc_v2: out of memory \(error 2\)"):
        driver.out_of_memory = True
        runner.run(tokens(1, 3))
    assert not driver.blocks and driver.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


def test_a_machine_without_gpu_or_driver_is_told(runner, driver, monkeypatch):
    driver.devices = 0
    with pytest.raises(EngineError, match="the selector: there is no GPU 0; this machine has 0"):
        runner.__enter__()

    def no_driver(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", no_driver)
    with pytest.raises(EngineError, match=r"the selector: there is no NVIDIA driver .*libcuda.so.1.*fix") as refusal:
        runner.__enter__()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "role", "complaint"),
    [
        (b"other", "selector", r"cannot be loaded on Fake RTX \(sm89\): the plan is of another version"),
        (PLAN, "predictor", "the engine has the tensors .*'attention_mask': .* not .*'kept': 'bool'"),
    ],
)
def test_a_foreign_engine_is_refused_and_the_gpu_given_back(
    runner, plan, artefacts, driver, content, role, complaint
):
    plan.write_bytes(content)
    runner.signature = artefacts.signature.graph(role)
    with pytest.raises(EngineError, match=complaint):
        runner.__enter__()
    assert driver.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


# verification


def test_verification_completes_the_entry(plan, entry, signature, library, artefacts):
    completed = verify_engine(plan, entry, signature, graph=artefacts.selector)
    assert completed == {**entry, "gpu": "Fake RTX (sm89)", "status": "verified"}
    assert entry["status"] == "unverified", "the entry given is not changed"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sha256": "0" * 64}, "model.plan was altered"),
        ({"graph_sha256": "0" * 64}, "is stale: it was not built from the selector.onnx beside it"),
        ({"version": "1.6.0"}, r"built with TensorRT-RTX 1.6.0, 1.7.1.116 is installed"),
        ({"profiles": [{"input_ids": [[1, 3], [1, 3], [1, 3]]}]}, "the manifest says"),
        (MISSING, "model.plan is missing"),
    ],
)
def test_verification_names_what_is_wrong(plan, entry, signature, library, artefacts, driver, change, complaint):
    if change == MISSING:
        plan.unlink()
    with pytest.raises(EngineError, match=complaint):
        verify_engine(plan, entry | change, signature, graph=artefacts.selector)
    assert not driver.blocks
