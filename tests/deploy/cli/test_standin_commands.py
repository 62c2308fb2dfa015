"""The commands on the real CUDA provider, which computes nonsense here: where they run, and what is said of a fault."""

import json
from dataclasses import replace

import pytest
import standin
from families import KINDS

from rekd_deploy.export.graphs import export
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.standin

LSTM = "not captured as a CUDA graph"
REFUSALS = {
    "no driver": ({"without": "libcuda.so.1"}, "there is no NVIDIA driver on this machine"),
    "an old driver": ({"STANDIN_DRIVER": "35"}, "the NVIDIA driver is too old for CUDA 13"),
    "no GPU": ({"STANDIN_DRIVER": "100"}, "the driver shows no GPU"),
    "a broken driver": ({"STANDIN_DRIVER": "999"}, "CUDA does not start"),
    "no cuBLAS": ({"without": "libcublas.so.13"}, "libcublas.so.13"),
    "no cuDNN": ({"without": "libcudnn.so.9"}, "cuDNN is missing"),
    "a full card": ({"STANDIN_FAIL": "malloc"}, "the GPU has no memory left"),
    "no such GPU": ({"device": "cuda:3"}, "there is no GPU 3; this machine has 1"),
}
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


def test_graphs_are_loaded_and_run_on_the_gpu(unanswered):
    done = verify(unanswered, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["device"], found["without_cases"], found["uncaptured"]) == ("cuda", ["selector", "predictor"], {})
    done = query(unanswered)
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(done.stdout)["probabilities"]) == 2


def test_answers_that_are_wrong_there_are_refused_by_verification_and_gate(repository, unanswered, checkpoint):
    for done, *complaints in (
        (verify(repository), "does not answer as the exported model did", "a selector score"),
        (verify(unanswered, "--checkpoint", checkpoint), "the graphs are not the model", "a selector score differs",
         "do not follow the decision rule"),
    ):  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and all(complaint in line for complaint in complaints), line


def test_lstms_are_served_uncaptured_and_that_is_said(tmp_path):
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
