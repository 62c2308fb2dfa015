"""The real Triton: how texts are joined, what it says of itself, servers that are installed, broken or ended."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from families import another, assert_same_answers
from servers import children_of, is_alive, wait_until

from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ServerError, ServerUnavailableError
from rekd_deploy.repository.config import COMPONENTS, ENSEMBLE, GRAPH, SELECTOR
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.program import find_installed
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.status import read_status
from rekd_train.files import sha256

pytestmark = pytest.mark.triton


@contextmanager
def standing_still(processes):
    """For a tenth of a second: Triton takes a process that is silent for two for dead."""
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def steps_of(url):
    status = read_status(url)
    assert status.ready and status.versions == [1] and status.triton
    return {step.model: step for step in status.steps}


@pytest.mark.parametrize("attribute", ["grpc_url", "http_url"])
def test_texts_of_all_lengths_are_joined_answered_as_if_alone_and_counted(server, rationalizer, texts, attribute):
    """Four clients, lengths as they come, while the models' processes stand still: all wait when they go on."""
    some = [*texts, *("good film and " * n + "end" for n in range(0, 60, 7))]
    requests = [dict(rationalizer.preprocessor([text]).inputs) for text in some]
    assert len({request["input_ids"].shape for request in requests}) == 3
    url, outputs = getattr(server, attribute), ("scores", "mask", "logits", "probabilities")
    with closing(open_transport(url, 20.0)) as transport:
        alone = [transport.submit("rekd", request, outputs).result() for request in requests]
        before = steps_of(url)

        def send_all(client):
            order = np.random.default_rng(client).permutation(len(requests))
            return [(alone[index], transport.submit("rekd", requests[index], outputs)) for index in order]

        with standing_still(children_of(server.process_id)), ThreadPoolExecutor(4) as pool:
            sent = [each for client in pool.map(send_all, range(4)) for each in client]
        for expected, future in sent:
            for name, wanted in expected.items():
                np.testing.assert_allclose(future.result()[name], wanted, rtol=0, atol=1e-5)
    after = steps_of(url)
    assert set(after) == {"rekd", "rekd_selector", "rekd_predictor"}
    for model, step in after.items():
        assert step.requests - before[model].requests == step.rows - before[model].rows == 4 * len(requests)
    assert after[SELECTOR].since(before[SELECTOR])["rows_per_batch"] >= 4
    means = after[SELECTOR].to_dict()
    parts = sum(means[f"{name}_ms"] for name in ("queue", "input", "compute", "output", "other"))
    assert 0 < means["compute_ms"] < means["request_ms"] and parts == pytest.approx(means["request_ms"])


def test_the_status_command(server, tmp_path):
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", "--status", server.http_url]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "160"}
    document, table = (
        subprocess.run([*command, *more], check=True, capture_output=True, text=True, env=environment).stdout
        for more in (["--json"], [])
    )
    found = json.loads(document)
    assert found["ready"] is found["live"] is True and "rekd" in {step["model"] for step in found["steps"]}
    assert "ready, Triton" in table and "rekd_selector" in table


# servers of their own


def test_graph_that_does_not_load(wheel, repository, tmp_path):
    root = shutil.copytree(repository, tmp_path / "broken")
    graph, manifest = root / SELECTOR / "1" / GRAPH, json.loads((root / "manifest.json").read_text())
    graph.write_bytes(graph.read_bytes()[:1000])
    manifest["repository"]["files"][f"{SELECTOR}/1/{GRAPH}"] = sha256(graph)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServerError, match=r"exit code 1(.|\n)*failed to load 'rekd_selector'(.|\n)*model\.onnx"):
        TritonServer(root, 0, 0, 0, log_file=tmp_path / "log").start()


def test_an_installed_server_and_the_newest_version_beside_an_earlier_one(
    wheel, artefacts, tmp_path, monkeypatch, rationalizer, texts
):
    """The wheel's parts laid out as a container has them."""
    root = write_repository(artefacts, tmp_path / "r")
    write_repository(another(artefacts, 2), root, keep=2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(wheel.executable)
    wheel.place_backends(tmp_path)
    for name, value in wheel.environment().items():
        monkeypatch.setenv(name, value)
    with TritonServer(root, 0, 0, 0, log_file=tmp_path / "log", program=find_installed(tmp_path)) as server:
        command = Path(f"/proc/{server.process_id}/cmdline").read_bytes().decode().split("\0")
        assert command[0] == str(tmp_path / "bin" / "tritonserver")
        assert f"--backend-directory={tmp_path / 'backends'}" in command

        def executed():
            steps = read_status(server.http_url).steps
            return {(step.model, step.version): step.executions for step in steps}

        before = executed()  # the warm-ups
        assert set(before) == {(ENSEMBLE, 2), *((name, version) for name in COMPONENTS for version in (1, 2))}
        with Client(server.grpc_url) as client:
            assert_same_answers(client.predict(texts), rationalizer.predict(texts))
        after = executed()
        assert after[SELECTOR, 1] == before[SELECTOR, 1] and after[SELECTOR, 2] > before[SELECTOR, 2]


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
        started = children_of(process.pid, deep=True)
        url = re.search(r"(?m)^gRPC\s+(\S+)", output.read_text())[1]
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
