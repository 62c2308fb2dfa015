"""The life of a chain of graphs on the real CUDA provider: what is captured, copied, given back, and how it fails."""

import pickle

import pytest
import standin
from families import KINDS
from precisions import conversion_of, model_of, traced

from rekd_deploy.graphs.modules import pair_signature

pytestmark = pytest.mark.standin

REPLAY = {"to_device": 2, "to_host": 3, "replay": 2}
"""Of two graphs with two inputs, three outputs of which are read."""


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory):
    """A folder with what the programs read: the graphs of a pair, and what they take and give."""
    standin.libraries()

    def made(kind="bert", models=None):
        signature, models = pair_signature(model_of(kind)), models or traced(kind, gpu=True)
        steps = [(models[role].SerializeToString(), signature.graph(role), role) for role in ("selector", "predictor")]
        folder = tmp_path_factory.mktemp(kind)
        (folder / "chain.pickle").write_bytes(pickle.dumps(steps))
        return folder

    return made


@pytest.fixture(scope="module")
def life(chain_of):
    (found,) = standin.run("device_life.py", chain_of(), chain_of("bilstm"))
    return found


def test_a_bucket_is_captured_once_and_replayed_and_memory_is_given_back(life):
    assert life["first"]["capture"] == life["longer"]["capture"] == 2
    assert life["longer"]["launch"] > 100 and life["longer"]["to_device"] == 2, "weights lie there already"
    assert life["again"] == life["back"] == life["another thread"] == REPLAY, "in memory of its own on the host"
    assert life["longer"]["host_malloc"] == 5, "two inputs, three outputs of a new shape"
    assert not {"capture", "replay"} & life["uncaptured"].keys()
    assert life["read"] == ["mask", "probabilities", "scores"] and life["uncaptured"]["to_host"] == 6
    assert life["tf32"] == ["0", "0"], "fp32 is fp32"
    assert life["threads"], "they take turns"
    assert life["kept"] == 3, "shapes at most"
    assert len(set(life["live"])) == 1 and life["live"][0] <= 2, "what the process keeps for the next chain"


def test_every_family_runs_captured_but_those_whose_kernels_copy_from_the_host(chain_of):
    for kind, found in zip(KINDS, standin.run("chains.py", "cuda", *map(chain_of, KINDS)), strict=True):
        first, again = found["runs"]
        if kind.startswith("bilstm"):
            said = dict.fromkeys(("selector", "predictor"), "its LSTM copies from the host at every run")
            assert found["uncaptured"] == said and not first["capture"] and again["launch"] > 10, kind
        else:
            assert found["uncaptured"] == {} and first["capture"] == 2, kind
            assert again == {"launch": 0, "capture": 0, "replay": 2}, kind


def test_what_onnx_runtime_refuses_to_capture_runs_uncaptured(life):
    refused = life["refused"]
    assert refused["uncaptured"] == dict.fromkeys(("selector", "predictor"), "its LSTM calls cudaMemcpyAsync")
    first, again = refused["runs"]
    assert first["capture"] == 1 and first["launch"] > 10, "refused once, then run launch by launch"
    assert "capture" not in again and again["launch"] > 10 and again["to_host"] == 6


@pytest.mark.parametrize("kind", ["malloc", "host_malloc", "to_device", "to_host", "launch", "replay", "capture"])
def test_a_gpu_that_fails_is_one_line_and_the_next_request_works(life, kind):
    seen = life["failures"][kind]
    assert seen
    for line in seen:
        assert line.startswith(("ONNX Runtime ", "CUDA failed in ")) and "\n" not in line
        assert kind != "malloc" or "the GPU has no memory left; fix: " in line


def test_a_graph_that_a_gpu_cannot_run_whole_is_refused(chain_of):
    (found,) = standin.run("chains.py", "cuda", chain_of(models=conversion_of("bert", "int8").models))
    assert "no kernels for GPUs, as those of int8; fix: export it again" in found["error"]
