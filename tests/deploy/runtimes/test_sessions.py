"""What is proved is what is served: the gate opens its sessions as each target does."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import onnxruntime
import pytest
from conftest import make_rationalizer
from onnxruntime_backend import Server

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
def graphs_of(fused: bool, gpu: bool, opset: int):
    return REAL_GRAPHS(make_rationalizer(), fused=fused, gpu=gpu, opset=opset)


def traced_once(rationalizer, *, fused, gpu, opset, report):
    """The same model's graphs are made once."""
    return {role: deepcopy(graph) for role, graph in graphs_of(fused, gpu, opset).items()}


def served(root, target: str) -> None:
    """Opens every member of a repository as its backend does."""
    if target == "onnxruntime":
        Server(root)
        return
    for model in GRAPH_MODELS.values():
        threads = int(parameters_of(read_config(root / model / "config.pbtxt"))[THREADS])
        OnnxGraph(root / model / "1", threads).close()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("target", ["python", "onnxruntime"])
def test_the_gate_and_verify_do_as_the_target_does(target, threads, checkpoint, tmp_path, opened, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a setting of this shell, not of the server
    gate = []

    def proved(*arguments, check=export.check_parity, **more):
        before = len(opened)
        report = check(*arguments, **more)
        gate.extend(opened[before:])
        return report

    monkeypatch.setattr(export, "check_parity", proved)
    monkeypatch.setattr(export, "traced_graphs", traced_once)
    gpu = False if target == "onnxruntime" else None
    publish(checkpoint, tmp_path / "repository", target=target, threads=threads, single_graph=True, gpu=gpu)
    opened.clear()
    served(tmp_path / "repository", target)
    as_served = list(opened)
    opened.clear()
    verify(tmp_path / "repository")
    again = list(opened)
    assert len(as_served) == 3 and len(gate) == 5 and len(again) == 3, "and two for the decisions"
    for one in (*gate, *again, *as_served):
        assert one == as_served[0]
    assert as_served[0][0]["intra_op_num_threads"] == str(threads) or threads == 0
