"""ONNX Runtime's real CUDA provider on a CUDA that pretends: graphs, chains, the model inside Triton, the commands."""

import json
import pickle
from dataclasses import replace

import pytest
import standin
from families import KINDS
from google.protobuf.json_format import MessageToDict
from precisions import conversion_of, gpu_graphs, model_of, traced

from rekd_deploy.export.graphs import export
from rekd_deploy.export.options import GPU_PRECISIONS
from rekd_deploy.export.run import publish
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.config import SINGLE, read_config
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.standin

SHAPE_ARITHMETIC = {"Squeeze", "Concat", "Add", "Sub", "Mul", "Div", "Max", "Min", "Gather", "Unsqueeze", "Cast"}
"""What the host may do with sizes of axes. That nothing else is done there, the provider says by taking the capture."""


@pytest.mark.parametrize("precision", GPU_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied_inside_a_graph_and_all_of_it_can_be_captured(kind, precision, tmp_path):
    standin.libraries()
    paths = gpu_graphs(kind, precision, tmp_path)
    assert {path.stem for path in paths} == {"selector", "predictor", "single"}
    found = standin.run("placement.py", *paths)
    assert len(found) == len(paths) == 9
    for graph in found:
        name = graph["path"].removeprefix(str(tmp_path))
        assert graph["problem"] == "" and graph["placed"], name
        assert graph["copies"] == 0, (name, graph["on_cpu"])
        assert {operator for operator, _ in graph["on_cpu"]} <= SHAPE_ARITHMETIC, (name, graph["on_cpu"])
        assert graph["refusal"] == "", (name, graph["on_cpu"])


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


def test_every_family_runs_captured_or_it_is_said_why_not(chain_of, life):
    for kind, found in zip(KINDS, standin.run("chains.py", "cuda", *map(chain_of, KINDS)), strict=True):
        first, again = found["runs"]
        if kind.startswith("bilstm"):
            said = dict.fromkeys(("selector", "predictor"), "its LSTM copies from the host at every run")
            assert found["uncaptured"] == said and not first["capture"] and again["launch"] > 10, kind
        else:
            assert found["uncaptured"] == {} and first["capture"] == 2, kind
            assert again == {"launch": 0, "capture": 0, "replay": 2}, kind
    refused = life["refused"]
    assert refused["uncaptured"] == dict.fromkeys(("selector", "predictor"), "its LSTM calls cudaMemcpyAsync")
    first, again = refused["runs"]
    assert first["capture"] == 1 and first["launch"] > 10, "refused once, then run launch by launch"
    assert "capture" not in again and again["launch"] > 10 and again["to_host"] == 6
    (found,) = standin.run("chains.py", "cuda", chain_of(models=conversion_of("bert", "int8").models))
    assert "no kernels for GPUs, as those of int8; fix: export it again" in found["error"]


@pytest.mark.parametrize("kind", ["malloc", "host_malloc", "to_device", "to_host", "launch", "replay", "capture"])
def test_a_gpu_that_fails_is_one_line_and_the_next_request_works(life, kind):
    seen = life["failures"][kind]
    assert seen
    for line in seen:
        assert line.startswith(("ONNX Runtime ", "CUDA failed in ")) and "\n" not in line
        assert kind != "malloc" or "the GPU has no memory left; fix: " in line


def run(kind, folder, *arguments):
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


def test_shapes_are_captured_once_as_tritons_own_backend_could_not(seen):
    assert seen["first"]["capture"] == 1
    for turn in ("again", "joined", "one", "one again"):  # one text was tried as the model was opened
        counts = {kind: seen[turn][kind] for kind in ("to_device", "to_host", "launch", "capture", "replay")}
        assert counts == {"to_device": 2, "to_host": 2, "launch": 0, "capture": 0, "replay": 1}, "what is asked for"
    assert seen["second"]["capture"] == 1
    for turn in ("beyond", "beyond again"):  # the most shapes that are captured
        assert seen[turn]["errors"] == [None] and seen[turn]["launch"] > 0
        assert seen[turn]["capture"] == seen[turn]["replay"] == 0
    assert [shapes["mask"] for shapes in seen["joined"]["shapes"]] == [[2, 16], [1, 16]], "cut to their rows"
    assert seen["first"]["shapes"][0]["probabilities"][0] == 3
    for kind in ("replay", "to_device", "to_host"):
        failed, after, later = seen[kind]
        assert failed["errors"][0].startswith("the graph failed: "), kind
        assert after["errors"] == [None] and after["capture"] == 1 and later["replay"] == 1 and later["launch"] == 0
    assert seen["kept"] == [False] * 3, "no memory while the error is answered"
    first, again, longer = seen["rebound"]
    assert first[0] > 0 and first[2]
    assert again == longer == [0, 1, False], "the first request once more, and no answer"


def test_lstms_are_served_uncaptured_and_that_is_said(tmp_path):
    """A replay would run on memory that is another's by then, and a capture that is refused would fail the warm-up."""
    found = run("bilstm", tmp_path, "alike")
    for turn in (found["first"], found["again"]):
        assert turn["errors"] == [None] and turn["capture"] == turn["replay"] == 0 and turn["launch"] > 10
    assert turn["shapes"][0]["probabilities"][0] == 3
    (line,) = found["warnings"]
    assert "LSTM" in line and "no CUDA graph" in line


LSTM = "not captured as a CUDA graph"
REFUSALS = {"no driver": ({"without": "libcuda.so.1"}, "there is no NVIDIA driver on this machine"),
            "an old driver": ({"STANDIN_DRIVER": "35"}, "the NVIDIA driver is too old for CUDA 13"),
            "no GPU": ({"STANDIN_DRIVER": "100"}, "the driver shows no GPU"),
            "a broken driver": ({"STANDIN_DRIVER": "999"}, "CUDA does not start"),
            "no cuBLAS": ({"without": "libcublas.so.13"}, "libcublas.so.13"),
            "no cuDNN": ({"without": "libcudnn.so.9"}, "cuDNN is missing"),
            "a full card": ({"STANDIN_FAIL": "malloc"}, "the GPU has no memory left"),
            "no such GPU": ({"device": "cuda:3"}, "there is no GPU 3; this machine has 1")}  # fmt: skip
"""What is wrong on the machine, and what is said."""


@pytest.fixture(scope="module")
def unanswered(artefacts, tmp_path_factory):
    """A repository without stored answers, which the stand-in's could not equal."""
    standin.libraries()
    return write_repository(replace(artefacts, reference=None), tmp_path_factory.mktemp("unanswered") / "r")


def verify(root, *options, device="cuda", **machine):
    command = ["-m", "rekd_deploy.cli.export", "--verify", root, "--device", device, *options]
    return standin.process(*command, borrowing=True, **machine)


def query(root, device="cuda", **machine):
    command = ["-m", "rekd_deploy.cli.query", "--local", root, "--device", device, "--json", "a fine film"]
    return standin.process(*command, borrowing=True, **machine)


def test_graphs_run_on_the_gpu_and_wrong_answers_are_refused(unanswered, repository, checkpoint):
    done = verify(unanswered, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["device"], found["without_cases"], found["uncaptured"]) == ("cuda", ["selector", "predictor"], {})
    done = query(unanswered)
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(done.stdout)["probabilities"]) == 2
    for done, *complaints in (
        (verify(repository), "does not answer as the exported model did", "a selector score"),
        (verify(unanswered, "--checkpoint", checkpoint), "the graphs are not the model", "a selector score differs",
         "do not follow the decision rule")):  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and all(complaint in line for complaint in complaints), line


def test_lstms_are_verified_and_queried_uncaptured_and_that_is_said(tmp_path):
    standin.libraries()
    checkpoint = save(KINDS["bilstm"](), tmp_path / "c", metrics={"test": {"accuracy": 0.5}}, training={"name": "tiny"})
    (tmp_path / "work").mkdir()
    root = write_repository(replace(export(checkpoint, tmp_path / "work"), reference=None), tmp_path / "r")
    done = verify(root, "--json")
    said = "its LSTM copies from the host at every run"
    assert json.loads(done.stdout)["uncaptured"] == dict.fromkeys(("selector", "predictor"), said), done.stderr
    for each in (done, query(root)):
        assert each.returncode == 0 and [LSTM in line for line in each.stderr.splitlines()] == [True, True]
    assert sum(LSTM in line for line in verify(root).stdout.splitlines()) == 2


@pytest.mark.parametrize("command", [verify, query])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_one_line_with_the_fix(case, command, unanswered):
    machine, said = REFUSALS[case]
    done = command(unanswered, **machine)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "", case
    assert line.startswith("error: ") and said in line and "; fix: " in line, line
