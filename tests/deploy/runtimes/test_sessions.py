"""What is proved is what is served: the gate opens its sessions as each target does."""

import onnxruntime
import pytest

from rekd_deploy.export import graphs as export
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.repository.backend.graphs import OnnxGraph
from rekd_deploy.repository.backend.model import usable_cores
from rekd_deploy.repository.config import THREADS, parameters_of, read_config
from rekd_deploy.repository.reader import GRAPH_MODELS

FIELDS = (
    "intra_op_num_threads", "inter_op_num_threads", "execution_mode", "execution_order", "graph_optimization_level",
    "enable_mem_pattern", "enable_mem_reuse", "enable_cpu_mem_arena", "use_deterministic_compute",
)  # fmt: skip


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """The options of every session that is opened, as values."""
    seen, real = [], onnxruntime.InferenceSession

    def session(model, options, *, providers):
        seen.append(({name: str(getattr(options, name)) for name in FIELDS}, providers))
        return real(model, options, providers=providers)

    def only_how_threads_wait(options, key, value):
        assert key == "session.force_spinning_stop", "which changes no answer"

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", only_how_threads_wait)
    return seen


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
def test_the_gate_and_verify_do_as_the_target_does(target, gpu, threads, checkpoint, tmp_path, opened, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a setting of this shell, not of the server
    gate, proved = [], export.check_parity

    def check_parity(*arguments, **more):
        opened.clear()
        report = proved(*arguments, **more)
        gate.extend(opened)
        return report

    monkeypatch.setattr(export, "check_parity", check_parity)
    root = publish(checkpoint, tmp_path / "r", target=target, threads=threads, single_graph=True, gpu=gpu).root
    opened.clear()
    for model in GRAPH_MODELS.values():
        serve(root / model, target)
    verify(root)
    assert len(gate) == 3 + 2 and opened == gate[:1] * 6 and gate == gate[:1] * 5, "two of them for the decisions"
    assert gate[0][0]["intra_op_num_threads"] == str(threads) or threads == 0
