"""The life of a chain of graphs on the real CUDA provider: what is captured, copied, given back, and how it fails."""

from __future__ import annotations

import pickle

import pytest
import standin
from families import KINDS
from precisions import conversion_of, model_of, traced_for_gpu

from rekd_deploy.graphs.modules import pair_signature

pytestmark = pytest.mark.standin

REPLAY = {"to_device": 2, "to_host": 3, "replay": 2}
"""Of two graphs with two inputs, three outputs of which are read."""


def chain_of(folder, models, kind="bert"):
    """A folder with what the programs read: the graphs of a pair, and what they take and give."""
    signature = pair_signature(model_of(kind))
    steps = [(models[role].SerializeToString(), signature.graph(role), role) for role in ("selector", "predictor")]
    (folder / "chain.pickle").write_bytes(pickle.dumps(steps))
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    standin.libraries()
    return chain_of(tmp_path_factory.mktemp("chain"), traced_for_gpu("bert"))


@pytest.fixture(scope="module")
def life(chain, tmp_path_factory):
    lstms = chain_of(tmp_path_factory.mktemp("lstms"), traced_for_gpu("bilstm"), "bilstm")
    (found,) = standin.run("device_life.py", chain, lstms)
    return found


def test_a_bucket_is_captured_once_and_replayed_from_then_on(life):
    assert life["first"]["capture"] == life["longer"]["capture"] == 2
    assert life["longer"]["launch"] > 100 and life["longer"]["to_device"] == 2, "weights lie there already"
    assert life["again"] == life["back"] == life["another thread"] == REPLAY
    assert "capture" not in life["uncaptured"] and "replay" not in life["uncaptured"]


def test_every_family_runs_captured_but_those_whose_kernels_copy_from_the_host(tmp_path):
    standin.libraries()
    folders = []
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        folders.append(chain_of(tmp_path / kind, traced_for_gpu(kind), kind))
    for kind, found in zip(KINDS, standin.run("chains.py", "cuda", *folders), strict=True):
        first, again = found["runs"]
        if kind.startswith("bilstm"):
            said = dict.fromkeys(("selector", "predictor"), "its LSTM copies from the host at every run")
            assert found["uncaptured"] == said and not first["capture"] and again["launch"] > 10, kind
        else:
            assert found["uncaptured"] == {} and first["capture"] == 2, kind
            assert again == {"launch": 0, "capture": 0, "replay": 2}, kind


def test_what_onnx_runtime_refuses_to_capture_runs_uncaptured(life):
    assert life["refused"]["uncaptured"] == dict.fromkeys(
        ("selector", "predictor"), "its LSTM calls cudaMemcpyAsync"
    )
    first, again = life["refused"]["runs"]
    assert first["capture"] == 1 and first["launch"] > 10, "refused once, then run launch by launch"
    assert "capture" not in again and again["launch"] > 10 and again["to_host"] == 6


def test_what_is_read_is_copied_back_and_nothing_else(life):
    assert life["read"] == ["mask", "probabilities", "scores"]
    assert life["uncaptured"]["to_host"] == 6


def test_the_gpu_copies_from_and_to_memory_of_its_own_on_the_host(life):
    assert life["longer"]["host_malloc"] == 5, "two inputs, three outputs of a new shape"
    assert "host_malloc" not in life["again"]


def test_fp32_is_fp32(life):
    assert life["tf32"] == ["0", "0"]


def test_threads_take_turns(life):
    assert life["threads"]


def test_memory_is_given_back_over_a_thousand_requests_of_changing_shapes(life):
    assert life["kept"] == 3, "shapes at most"
    assert len(set(life["live"])) == 1 and life["live"][0] <= 2, "what the process keeps for the next chain"


@pytest.mark.parametrize("kind", ["malloc", "host_malloc", "to_device", "to_host", "launch", "replay", "capture"])
def test_a_gpu_that_fails_is_one_line_and_the_next_request_works(life, kind):
    seen = life["failures"][kind]
    assert seen
    for line in seen:
        assert line.startswith(("ONNX Runtime ", "CUDA failed in ")) and "\n" not in line
    if kind == "malloc":
        assert all("the GPU has no memory left; fix: " in line for line in seen)


@pytest.mark.parametrize(
    ("library", "device", "said"),
    [
        ("libcuda.so.1", "cuda", "there is no NVIDIA driver on this machine"),
        ("libcublas.so.13", "cuda", "libcublas.so.13"), ("libcudnn.so.9", "cuda", "cuDNN is missing"),
        ("", "cuda:3", "there is no GPU 3; this machine has 1"),
    ],
)
def test_what_is_missing_is_one_line_with_the_fix(library, device, said, chain):
    (found,) = standin.run("chains.py", device, chain, without=library)
    assert said in found["error"] and "; fix: " in found["error"] and "\n" not in found["error"]


def test_a_graph_that_a_gpu_cannot_run_whole_is_refused(tmp_path):
    (found,) = standin.run("chains.py", "cuda", chain_of(tmp_path, conversion_of("bert", "int8").models))
    assert "no kernels for GPUs, as those of int8; fix: export it again" in found["error"]
