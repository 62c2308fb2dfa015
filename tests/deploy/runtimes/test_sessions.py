"""What is proved is what is served: the gate opens its sessions as each target does."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial

import onnxruntime
import pytest
from conftest import make_rationalizer

from rekd_deploy.export import graphs as export
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.repository.backend.model import OnnxGraph
from rekd_deploy.repository.config import THREADS, parameters_of, read_config
from rekd_deploy.repository.reader import GRAPH_MODELS

FIELDS = (
    "intra_op_num_threads", "inter_op_num_threads", "execution_mode", "execution_order", "graph_optimization_level",
    "enable_mem_pattern", "enable_mem_reuse", "enable_cpu_mem_arena", "use_deterministic_compute",
)  # fmt: skip
MATTERS_NOT = {"session.force_spinning_stop"}
"""How threads wait changes no answer; Triton's backend cannot set it."""


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """The options of every session that is opened, as values."""
    seen = []

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.entries = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value
            super().add_session_config_entry(key, value)

    real = onnxruntime.InferenceSession

    def session(model, options=None, **how):
        if isinstance(options, Options):
            entries = {key: value for key, value in options.entries.items() if key not in MATTERS_NOT}
            levels = {name: str(getattr(options, name)) for name in FIELDS}
            seen.append((levels, entries, how["providers"]))
        return real(model, options, **how)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return seen


REAL_GRAPHS = export.traced_graphs


@cache
def graphs_of(fused: bool, gpu: bool):
    return REAL_GRAPHS(make_rationalizer(), fused=fused, gpu=gpu)


def traced_once(rationalizer, *, fused, gpu, report):
    """The same model's graphs are made once."""
    return {role: deepcopy(graph) for role, graph in graphs_of(fused, gpu).items()}


def serve(root, target: str) -> None:
    """Opens every component model of a repository as its backend does."""
    for model in GRAPH_MODELS.values():
        config = read_config(root / model / "config.pbtxt")
        parameters = parameters_of(config)
        if target == "python":
            OnnxGraph(root / model / "1", int(parameters[THREADS])).close()
            continue
        assert not config.optimization.graph.level, "all of ONNX Runtime's own"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
        options.inter_op_num_threads = int(parameters["inter_op_thread_count"])
        options.enable_cpu_mem_arena = parameters["enable_mem_arena"] == "1"
        options.enable_mem_pattern = parameters["enable_mem_pattern"] == "1"
        assert parameters["execution_mode"] == "0"
        path = str(root / model / "1" / "model.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("target", ["python", "onnxruntime"])
def test_the_gate_and_verify_do_as_the_target_does(target, threads, checkpoint, tmp_path, opened, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a setting of this shell, not of the server
    gate = []
    for name in ("check_parity", "check_single_parity"):

        def proved(*arguments, check, **more):
            before = len(opened)
            report = check(*arguments, **more)
            gate.extend(opened[before:])
            return report

        monkeypatch.setattr(export, name, partial(proved, check=getattr(export, name)))
    monkeypatch.setattr(export, "traced_graphs", traced_once)
    gpu = False if target == "onnxruntime" else None
    publish(checkpoint, tmp_path / "repository", target=target, threads=threads, single_graph=True, gpu=gpu)
    opened.clear()
    serve(tmp_path / "repository", target)
    as_served = list(opened)
    opened.clear()
    verify(tmp_path / "repository")
    assert len(as_served) == 3 and len(gate) == 5 and len(opened) == 3, "and two for the decisions"
    for one in (*gate, *opened, *as_served):
        assert one == as_served[0]
    assert as_served[0][0]["intra_op_num_threads"] == str(threads) or threads == 0
