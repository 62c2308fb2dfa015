"""The python backend's model on the real CUDA provider: both steps in one captured graph, exported as users do it."""

import json

import pytest
import standin
from google.protobuf.json_format import MessageToDict
from precisions import model_of

from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import SINGLE, read_config
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.standin


def run(kind, folder, *arguments):
    """What ``triton_gpu.py`` saw of the single graph of a pair."""
    standin.libraries()
    publish(save(model_of(kind), folder / "student"), folder / "models", gpu=True, batches=(1, 4))
    single = folder / "models" / SINGLE
    config = MessageToDict(read_config(single / "config.pbtxt"), preserving_proto_field_name=True)
    assert {group["kind"] for group in config["instance_group"]} == {"KIND_GPU"}
    (single / "config.json").write_text(json.dumps(config))
    (found,) = standin.run("triton_gpu.py", single, *arguments)
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run("bert", tmp_path_factory.mktemp("gpu"))


def test_a_shape_is_captured_once_and_replayed_on_batches_that_are_filled_up(seen):
    assert (seen["first"]["capture"], seen["one"]["capture"]) == (1, 1)
    for turn in ("again", "joined", "one again"):
        counts = {kind: seen[turn][kind] for kind in ("to_device", "to_host", "launch", "capture", "replay")}
        assert counts == {"to_device": 2, "to_host": 2, "launch": 0, "capture": 0, "replay": 1}, "what is asked for"
    assert seen["second"]["capture"] == 1
    for turn in ("beyond", "beyond again"):  # the most shapes that are captured
        assert seen[turn]["errors"] == [None] and seen[turn]["launch"] > 0
        assert seen[turn]["capture"] == seen[turn]["replay"] == 0
    assert [shapes["mask"] for shapes in seen["joined"]["shapes"]] == [[2, 16], [1, 16]], "cut to their rows"
    assert seen["first"]["shapes"][0]["probabilities"][0] == 3


def test_a_gpu_that_fails_is_an_error_of_the_request_and_the_next_one_works(seen):
    for kind in ("replay", "to_device", "to_host"):
        failed, after, later = seen[kind]
        assert failed["errors"][0].startswith("the graph failed: "), kind
        assert after["errors"] == [None] and after["capture"] == 1 and later["replay"] == 1 and later["launch"] == 0
    assert seen["kept"] == [False] * 3, "no memory while the error is answered"


def test_lstms_are_served_uncaptured_and_that_is_said(tmp_path):
    """A replay would run on memory that is another's by then, and a capture that is refused would fail the warm-up."""
    found = run("bilstm", tmp_path, "alike")
    for turn in (found["first"], found["again"]):
        assert turn["errors"] == [None] and turn["capture"] == turn["replay"] == 0 and turn["launch"] > 10
    assert turn["shapes"][0]["probabilities"][0] == 3
    (line,) = found["warnings"]
    assert "LSTM" in line and "no CUDA graph" in line


def test_graphs_cannot_be_captured_as_tritons_onnxruntime_backend_binds(seen):
    """Why the rules refuse enable_cuda_graph there. When this fails, ONNX Runtime has learnt it: look at it again."""
    first, again, longer = seen["rebound"]
    assert first[0] > 0 and first[2]
    assert again == longer == [0, 1, False], "the first request once more, and no answer"
