"""The real Triton on the tiny model's repository: the same answers as the model, over gRPC and HTTP."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from servers import children_of, is_alive, wait_until

from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ModelMissingError, ServerError, ServerUnavailableError
from rekd_deploy.repository.config import GRAPH, SELECTOR
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.program import find_installed
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.status import StepTotals
from rekd_train.files import sha256

pytestmark = pytest.mark.triton

OUTPUTS = ("scores", "mask", "logits", "probabilities")
GOOD = {"input_ids": np.array([[2, 9, 10, 3]]), "attention_mask": np.ones((1, 4), np.int64)}


@pytest.fixture(params=["grpc_url", "http_url"])
def url(server, request):
    return getattr(server, request.param)


@pytest.fixture(scope="module")
def many(texts):
    """Texts of every length, more than one request holds."""
    short = [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70)]
    return [*short, "good film " * 10_000]


@pytest.fixture(scope="module")
def expected(rationalizer, many):
    return rationalizer.predict(many)


def assert_same(predictions, expected):
    for prediction, wanted in zip(predictions, expected, strict=True):
        assert (prediction.text, prediction.label, prediction.rate, prediction.truncated) == (
            wanted.text, wanted.label, wanted.rate, wanted.truncated,
        )  # fmt: skip
        assert [(s.start, s.end) for s in prediction.rationale] == [(s.start, s.end) for s in wanted.rationale]
        assert [piece.position for piece in prediction.pieces] == [piece.position for piece in wanted.pieces]
        np.testing.assert_allclose([*prediction.probabilities.values()], [*wanted.probabilities.values()], atol=1e-4)


def get(url, path):
    """The body of a response with status 200."""
    with closing(http.client.HTTPConnection(url.split("/")[2], timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()


def totals(server):
    return StepTotals.of(json.loads(get(server.http_url, f"/v2/models/{SELECTOR}/stats"))["model_stats"][0])


def test_answers_are_the_models(url, many, expected):
    with Client(url) as client:
        assert_same(client.predict(many), expected)
    assert expected[-1].truncated


def test_texts_of_all_lengths_are_joined_and_answered_as_if_alone(server, rationalizer, many):
    """Four clients, lengths as they come, while the models' processes stand still: all wait when they go on.

    For a tenth of a second: Triton takes a process that is silent for two for dead.
    """
    requests = [dict(rationalizer.preprocessor([text]).inputs) for text in many[:-1:12]]
    assert len({request["input_ids"].shape for request in requests}) == 3
    with closing(open_transport(server.grpc_url, 20.0)) as transport:
        alone = [transport.submit("rekd", request, OUTPUTS).result() for request in requests]
        before = totals(server)

        def send(client):
            order = np.random.default_rng(client).permutation(len(requests))
            return [(alone[index], transport.submit("rekd", requests[index], OUTPUTS)) for index in order]

        stubs = children_of(server.process_id)
        try:
            for stub in stubs:
                os.kill(stub, signal.SIGSTOP)
            with ThreadPoolExecutor(4) as pool:
                sent = [each for client in pool.map(send, range(4)) for each in client]
        finally:
            for stub in stubs:
                os.kill(stub, signal.SIGCONT)
        for expected, future in sent:
            for name, wanted in expected.items():
                np.testing.assert_allclose(future.result()[name], wanted, rtol=0, atol=1e-5)
    assert totals(server).since(before)["rows_per_batch"] >= 4


def test_model_that_is_not_served(url):
    with Client(url, model="nonesuch") as client, pytest.raises(ModelMissingError, match="'nonesuch'"):
        client.predict(["good"])


def test_administration_is_closed(server):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(server.grpc_url)
    with pytest.raises(InferenceServerException, match="restricted|expecting header"):
        client.register_system_shared_memory("region", "/region", 64)
    with pytest.raises(InferenceServerException):
        client.load_model("rekd")
    client.close()
    with closing(http.client.HTTPConnection(server.http_url.split("/")[2], timeout=10)) as connection:
        connection.request("POST", "/v2/repository/models/rekd/unload")
        assert connection.getresponse().status in (403, 400)
    assert "nv_inference_request_success" in get(server.metrics_url, "/metrics"), "the metrics are open"


# servers of their own


def test_graph_that_does_not_load(wheel, repository, tmp_path):
    root = shutil.copytree(repository, tmp_path / "broken")
    graph = root / SELECTOR / "1" / GRAPH
    graph.write_bytes(graph.read_bytes()[:1000])
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["repository"]["files"][f"{SELECTOR}/1/{GRAPH}"] = sha256(graph)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServerError, match=r"exit code 1(.|\n)*failed to load 'rekd_selector'(.|\n)*model\.onnx"):
        TritonServer(root, 0, 0, 0, log_file=tmp_path / "log").start()


def test_an_installed_server_and_the_newest_version_beside_an_earlier_one(
    wheel, artefacts, tmp_path, monkeypatch, rationalizer, texts
):
    """The wheel's parts laid out as a container has them."""
    root = write_repository(artefacts, tmp_path / "r")
    write_repository(replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": "0" * 64}), root, keep=2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(wheel.executable)
    wheel.place_backends(tmp_path)
    for name, value in wheel.environment().items():
        monkeypatch.setenv(name, value)
    program = find_installed(tmp_path)
    with TritonServer(root, 0, 0, 0, log_file=tmp_path / "log", program=program) as server:
        command = Path(f"/proc/{server.process_id}/cmdline").read_bytes().decode().split("\0")
        assert command[0] == str(tmp_path / "bin" / "tritonserver")
        assert f"--backend-directory={tmp_path / 'backends'}" in command

        def executed(version):
            found = json.loads(get(server.http_url, f"/v2/models/{SELECTOR}/versions/{version}/stats"))
            return found["model_stats"][0]["execution_count"]

        before = executed(1), executed(2)  # the warm-ups
        with Client(server.grpc_url) as client:
            assert_same(client.predict(texts), rationalizer.predict(texts))
        assert executed(1) == before[0] and executed(2) > before[1]
        for model, versions in (("rekd", ["2"]), ("rekd_selector", ["1", "2"]), ("rekd_predictor", ["1", "2"])):
            assert sorted(json.loads(get(server.http_url, f"/v2/models/{model}"))["versions"]) == versions


def descendants(process_id):
    children = children_of(process_id)
    return children + [each for child in children for each in descendants(child)]


@pytest.mark.parametrize(
    ("victim", "number", "code", "said"),
    [
        ("rekd-serve", signal.SIGTERM, 0, "stopped"),
        ("tritonserver", signal.SIGKILL, 1, "error: the Triton server was killed by signal 9"),
        ("rekd-serve", signal.SIGKILL, -signal.SIGKILL, "stop     Ctrl-C"),
    ],
)
def test_the_command_ends_with_all_that_it_started(wheel, repository, tmp_path, victim, number, code, said):
    output, ports = tmp_path / "output", [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", str(repository), *ports, "--log", str(tmp_path / "log")]
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Ctrl-C" in output.read_text() or process.poll() is not None, 60)
        started = descendants(process.pid)
        url = next(line.split()[1] for line in output.read_text().splitlines() if line.startswith("gRPC"))
        with Client(url) as client:
            assert len(client.predict(["good"])) == 1
        os.kill(process.pid if victim == "rekd-serve" else started[0], number)
        assert process.wait(20) == code
        wait_until(lambda: not any(map(is_alive, started)))
    finally:
        process.kill()
    assert said in output.read_text() and "Traceback" not in output.read_text()
    with Client(url) as client, pytest.raises(ServerUnavailableError):
        client.predict(["good"])
