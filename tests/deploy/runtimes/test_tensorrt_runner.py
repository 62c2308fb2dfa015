"""The engine runner: what is bound where, in which profile, and that everything is given back. On a fake GPU."""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes import tensorrt_execution
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import TensorRTRunner
from rekd_deploy.runtimes.tensorrt_build import Range, profiles_of


@pytest.fixture
def runner(fake_rtx, artefacts, tmp_path):
    signature = artefacts.signature.selector
    profiles = profiles_of(signature, [Range(1, 1, 2), Range(3, 8, 8)], [Range(3, 16, 16), Range(17, 48, 48)])
    fake_rtx.plans[b"an engine"] = (str(artefacts.selector), profiles)
    (tmp_path / "plan").write_bytes(b"an engine")
    return TensorRTRunner(tmp_path / "plan", signature, "the selector", engine="tensorrt-rtx")


@pytest.fixture
def reference(artefacts):
    with OnnxRuntimeRunner(artefacts.selector, artefacts.signature.selector, "the graph") as reference:
        yield reference


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    mask = np.ones((batch, length), np.int64)
    mask[0, 3:] = 0
    ids = np.random.default_rng(batch * length).integers(4, 40, (batch, length))
    return {"input_ids": ids, "attention_mask": mask}


def test_answers_are_the_graphs_at_every_shape(runner, reference, fake_rtx, fake_gpu):
    with runner:
        for batch, length in ((1, 3), (8, 48), (2, 48), (3, 17), (1, 16), (1, 48)):
            inputs = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in tokens(batch, length).items()}
            assert batch == 1 or not inputs["input_ids"].flags.c_contiguous
            expected, found = reference.run(inputs), runner.run(inputs)
            assert list(found) == list(expected) == [spec.name for spec in runner.signature.outputs]
            for name in expected:
                assert found[name].dtype == expected[name].dtype
                np.testing.assert_array_equal(found[name], expected[name])
        assert fake_rtx.loaded[0].chosen == [3, 1, 3, 0, 1] and len(fake_gpu.blocks) == 2 + 4
        fake_gpu.calls.clear()
    assert not fake_gpu.blocks and fake_gpu.calls[0] == "cuCtxSetCurrent", "whoever closes may be another thread"
    assert fake_gpu.calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    with pytest.raises(EngineError, match="inside a `with` block"):
        runner.run(tokens(1, 3))


def test_threads_that_share_an_engine_get_their_own_answers_and_closing_waits_for_the_request_that_runs(
    runner, reference):
    requests = [tokens(1 + turn % 3, 12 + turn % 4) for turn in range(12)]
    expected = [reference.run(inputs)["scores"] for inputs in requests]
    with runner, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda turn: runner.run(requests[turn % 12])["scores"], range(240)))
    for turn, scores in enumerate(found):
        np.testing.assert_array_equal(scores, expected[turn % 12])
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


def test_what_goes_wrong_is_one_line_and_the_gpu_is_given_back(runner, artefacts, fake_gpu, tmp_path, monkeypatch):
    def refused(complaint, batch=1):
        with pytest.raises(EngineError, match=f"^the selector: .*{complaint}") as refusal, runner:
            runner.run(tokens(batch, 3))
        assert "\n" not in str(refusal.value) and not fake_gpu.blocks
        assert fake_gpu.calls[-1] in ("cuDevicePrimaryCtxRelease_v2", "cuDeviceGetCount")
    refused(r"the shapes .*\(9, 3\).* outside .*\(8, 48\)", batch=9)
    fake_gpu.out_of_memory = True
    refused(r"cuMemAlloc_v2: out of memory \(error 2\)")
    runner.signature = artefacts.signature.predictor
    refused("the engine has the tensors .*'attention_mask': .* not .*'kept': 'bool'")
    (tmp_path / "plan").write_bytes(b"other")
    refused(r"cannot be loaded on Fake RTX \(sm89\): the plan is of another version")
    fake_gpu.devices = 0
    refused("there is no GPU 0; this machine has 0")
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", Mock(side_effect=OSError("cannot open shared object file")))
    refused("there is no NVIDIA driver .*libcuda.so.1.*fix")
