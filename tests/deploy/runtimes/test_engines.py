"""Runners hold what they take only inside `with`, and name what is wrong with an input."""

import sys
from importlib import metadata

import numpy as np
import pytest

from rekd_deploy.contract.signature import BATCH, GraphSignature, TensorSpec
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes import onnxruntime as engine
from rekd_deploy.runtimes.base import check_inputs
from rekd_train.errors import MissingExtraError


@pytest.fixture
def selector(artefacts):
    return engine.OnnxRuntimeRunner(artefacts.selector, artefacts.signature.selector, "the selector")


def inputs(batch: int = 2, length: int = 5) -> dict[str, np.ndarray]:
    return {name: np.ones((batch, length), np.int64) for name in ("input_ids", "attention_mask")}


def test_runs_inside_with_only(selector):
    with pytest.raises(EngineError, match="inside a `with` block"):
        selector.run(inputs())
    for _ in range(2):
        with selector:
            assert list(selector.run(inputs())) == ["scores", "mask", "positions", "kept"]
            with pytest.raises(EngineError, match="already running"):
                selector.__enter__()
    with pytest.raises(EngineError, match="inside a `with` block"):
        selector.run(inputs())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"positions": np.ones((2, 3))}, "input 'positions' is unknown"),
        ({"input_ids": np.ones((2, 5), np.int32)}, "input 'input_ids' is int32, not int64"),
        ({"input_ids": np.ones(5, np.int64)}, r"input 'input_ids' has the shape \(5,\), not \('batch', 'length'\)"),
        ({"attention_mask": np.ones((2, 6), np.int64)}, r"'attention_mask' has the shape \(2, 6\); input_ids says 5"),
        ({"input_ids": np.ones((0, 5), np.int64)}, r"'input_ids' has the shape \(0, 5\); an axis is empty"),
    ],
)
def test_a_wrong_input_is_named(artefacts, changes, complaint):
    given = {name: array for name, array in {**inputs(), **changes}.items() if array is not None}
    with pytest.raises(EngineError, match=f"the selector: .*{complaint}"):
        check_inputs(given, artefacts.signature.selector, "the selector")


def test_a_fixed_axis_is_checked():
    signature = GraphSignature((TensorSpec("positions", "int64", (BATCH, 11)),), ())
    with pytest.raises(EngineError, match=r"'positions' has the shape \(2, 7\); the graph says 11, not 7"):
        check_inputs({"positions": np.zeros((2, 7), np.int64)}, signature, "the predictor")


def test_a_damaged_file_another_graph_and_a_failing_run_are_one_line(artefacts, selector, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(artefacts.selector.read_bytes()[:1000])
    with pytest.raises(EngineError, match="ONNX Runtime cannot load the cut one.*fix: ") as refusal:
        engine.OnnxRuntimeRunner(tmp_path / "cut.onnx", artefacts.signature.selector, "the cut one").__enter__()
    assert "\n" not in str(refusal.value)
    with pytest.raises(EngineError, match=r"the predictor has the tensors \['input_ids', 'attention_mask'"):
        engine.OnnxRuntimeRunner(artefacts.selector, artefacts.signature.predictor, "the predictor").__enter__()
    with selector, pytest.raises(EngineError, match="ONNX Runtime failed on the selector") as refusal:
        selector.run({**inputs(), "input_ids": np.full((2, 5), 10_000)})
    assert "\n" not in str(refusal.value)


def test_a_missing_runtime_says_what_to_install(selector, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '.*\[cpu\]'"):
        selector.__enter__()


def test_both_flavours_installed_is_one_clear_error(selector, monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are both installed.*pip uninstall"):
        selector.__enter__()


def test_threads_follow_what_the_process_may_use(monkeypatch):
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(engine.Path, "read_text", lambda path: "150000 100000")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert engine.available_cores() == 2
    monkeypatch.setattr(engine.Path, "read_text", lambda path: "max 100000")
    assert engine.available_cores() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engine.available_cores() == 3
