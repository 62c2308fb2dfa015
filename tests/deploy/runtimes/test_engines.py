"""Runners hold what they take only inside `with`, name what is wrong, and run as the targets do that are proved."""

import sys
from importlib import metadata

import numpy as np
import onnxruntime
import pytest

from rekd_deploy.contract.signature import BATCH, GraphSignature, TensorSpec
from rekd_deploy.errors import EngineError
from rekd_deploy.export import graphs as export
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.repository.backend.graphs import OnnxGraph
from rekd_deploy.repository.backend.model import usable_cores
from rekd_deploy.repository.config import THREADS, parameters_of, read_config
from rekd_deploy.repository.reader import GRAPH_MODELS
from rekd_deploy.runtimes import onnxruntime as engine
from rekd_deploy.runtimes.base import check_inputs
from rekd_train.errors import MissingExtraError

INPUTS = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask")}


@pytest.fixture
def selector(artefacts):
    return engine.OnnxRuntimeRunner(artefacts.selector, artefacts.signature.selector, "the selector")


def test_it_runs_inside_with_only_failures_are_one_line_and_threads_follow_what_may_be_used(
    selector, artefacts, monkeypatch):
    for _ in range(2):
        with pytest.raises(EngineError, match="inside a `with` block"):
            selector.run(INPUTS)
        with selector:
            assert list(selector.run(INPUTS)) == ["scores", "mask", "positions", "kept"]
            with pytest.raises(EngineError, match="already running"):
                selector.__enter__()
    with pytest.raises(EngineError, match="inside a `with` block"):
        selector.run(INPUTS)
    content, words = artefacts.selector.read_bytes(), {**INPUTS, "input_ids": np.full((2, 5), 10_000)}
    for model, role, complaint in ((content[:1000], "selector", "ONNX Runtime cannot load the graph.*fix: "),
                                   (content, "predictor", r"the graph has the tensors \['input_ids', 'attention_mask'"),
                                   (content, "selector", "ONNX Runtime failed on the graph")):  # fmt: skip
        runner = engine.OnnxRuntimeRunner(model, artefacts.signature.graph(role), "the graph")
        with pytest.raises(EngineError, match=complaint) as refusal, runner:
            runner.run(words)
        assert "\n" not in str(refusal.value)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingExtraError, match=r"pip install -e '.*\[cpu\]'"):
            selector.__enter__()
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are both installed.*pip uninstall"):
        selector.__enter__()
    signature = GraphSignature((TensorSpec("positions", "int64", (BATCH, 11)),), ())
    with pytest.raises(EngineError, match=r"'positions' has the shape \(2, 7\); the graph says 11, not 7"):
        check_inputs({"positions": np.zeros((2, 7), np.int64)}, signature, "the predictor")
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    for quota, wished, cores in (("150000 100000", "", 2), ("max 100000", "", 4), ("max 100000", "3", 3)):
        monkeypatch.setattr(engine.Path, "read_text", lambda path, quota=quota: quota)
        monkeypatch.setenv("OMP_NUM_THREADS", wished)
        assert engine.available_cores() == cores


@pytest.mark.parametrize(("name", "array", "complaint"), [
    ("input_ids", None, "input 'input_ids' is missing"), ("positions", np.ones((2, 3)), "input 'positions' is unknown"),
    ("input_ids", np.ones((2, 5), np.int32), "input 'input_ids' is int32, not int64"),
    ("input_ids", np.ones(5, np.int64), r"input 'input_ids' has the shape \(5,\), not \('batch', 'length'\)"),
    ("attention_mask", np.ones((2, 6), np.int64), r"'attention_mask' has the shape \(2, 6\); input_ids says 5"),
    ("input_ids", np.ones((0, 5), np.int64), r"'input_ids' has the shape \(0, 5\); an axis is empty")])
def test_a_wrong_input_is_named(artefacts, name, array, complaint):
    given = {key: value for key, value in {**INPUTS, name: array}.items() if value is not None}
    with pytest.raises(EngineError, match=f"the selector: .*{complaint}"):
        check_inputs(given, artefacts.signature.selector, "the selector")


FIELDS = ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "execution_order",
          "graph_optimization_level", "enable_mem_pattern", "enable_mem_reuse", "enable_cpu_mem_arena",
          "use_deterministic_compute")  # fmt: skip


def serve(folder, target: str) -> None:
    """Opens a component model as its backend does."""
    config = read_config(folder / "config.pbtxt")
    parameters = parameters_of(config)
    if target == "python":
        OnnxGraph(folder / "1", int(parameters[THREADS]) or usable_cores()).close()
        return
    assert not config.optimization.graph.level, "all of ONNX Runtime's own"
    assert parameters["execution_mode"] == "0"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
    options.inter_op_num_threads = int(parameters["inter_op_thread_count"])
    options.enable_cpu_mem_arena = parameters["enable_mem_arena"] == "1"
    options.enable_mem_pattern = parameters["enable_mem_pattern"] == "1"
    onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize(("target", "gpu"), [("python", None), ("onnxruntime", False)])
def test_the_gate_and_verify_do_as_the_target_does(target, gpu, threads, checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a setting of this shell, not of the server
    opened, gate, proved, real = [], [], export.check_parity, onnxruntime.InferenceSession
    def session(model, options, *, providers):
        opened.append(({name: str(getattr(options, name)) for name in FIELDS}, providers))
        return real(model, options, providers=providers)
    def what_changes_no_answer(options, key, value):  # how threads wait; numbers below 1e-37 are 0
        assert key in ("session.force_spinning_stop", "session.set_denormal_as_zero")
    def check_parity(*arguments, **more):
        opened.clear()
        report = proved(*arguments, **more)
        gate.extend(opened)
        return report
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", what_changes_no_answer)
    monkeypatch.setattr(export, "check_parity", check_parity)
    root = publish(checkpoint, tmp_path / "r", target=target, threads=threads, single_graph=True, gpu=gpu).root
    opened.clear()
    for model in GRAPH_MODELS.values():
        serve(root / model, target)
    verify(root)
    assert len(gate) == 3 + 2 and opened == gate[:1] * 6 and gate == gate[:1] * 5, "two of them for the decisions"
    assert gate[0][0]["intra_op_num_threads"] == str(threads) or threads == 0
