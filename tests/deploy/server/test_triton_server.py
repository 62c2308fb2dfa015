"""The real Triton on the tiny model's repository: the same answers as the model, over gRPC and HTTP."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ModelMissingError, RejectedError, ServerError, ServerUnavailableError
from rekd_deploy.repository.config import GRAPH, SELECTOR
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.process import children_of
from rekd_deploy.server.program import find_installed
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.status import StepTotals
from rekd_train.files import sha256

pytestmark = pytest.mark.triton

ANSWERS = ("scores", "mask", "logits", "probabilities")
PROTOCOLS = ("grpc_url", "http_url")


@pytest.fixture(params=PROTOCOLS)
def url(server, request):
    return getattr(server, request.param)


@pytest.fixture
def client(url):
    with Client(url) as client:
        yield client


@pytest.fixture
def transport(url):
    transport = open_transport(url, 10.0)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def many(texts):
    """Texts of every length, more than one request holds."""
    return [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70)]


@pytest.fixture(scope="module")
def expected(rationalizer, many):
    return rationalizer.predict(many)


def same(answers, expected):
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer.text, answer.label, answer.rate, answer.truncated) == (
            wanted.text, wanted.label, wanted.rate, wanted.truncated,
        )
        assert [(s.start, s.end) for s in answer.rationale] == [(s.start, s.end) for s in wanted.rationale]
        assert [piece.position for piece in answer.pieces] == [piece.position for piece in wanted.pieces]
        np.testing.assert_allclose([*answer.probabilities.values()], [*wanted.probabilities.values()], atol=1e-4)
    return True


def tensors(*rows):
    ids = np.array(rows, dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


GOOD = tensors([2, 9, 10, 3])


def test_answers_are_the_models(client, many, expected):
    assert same(client.predict(many), expected)


def test_hundred_thousand_characters(client, rationalizer):
    text = "good film " * 10_000
    assert client.predict([text])[0].truncated
    assert same(client.predict([text]), rationalizer.predict([text]))


@pytest.mark.parametrize("outputs", [s for n in range(1, 5) for s in itertools.combinations(ANSWERS, n)], ids="-".join)
def test_every_subset_of_the_answers(transport, outputs):
    everything = transport.submit("rekd", GOOD, ANSWERS).result()
    some = transport.submit("rekd", GOOD, outputs).result()
    assert list(some) == list(outputs)
    for name in outputs:
        np.testing.assert_array_equal(some[name], everything[name])


def test_mixed_requests_at_once(server, many, expected):
    wanted = {text: answer for text, answer in zip(many, expected, strict=True)}

    def ask(seed):
        generator = np.random.default_rng(seed)
        with Client(getattr(server, PROTOCOLS[seed % 2])) as client:
            for _ in range(6):
                some = [many[i] for i in generator.choice(len(many), size=generator.integers(1, 90))]
                same(client.predict(some), [wanted[text] for text in some])
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))


def test_requests_are_joined_into_batches(server, many):
    """More texts than model executions: the members' dynamic batching works."""

    def executions():
        counts = json.loads(_get(server.http_url, f"/v2/models/{SELECTOR}/stats"))["model_stats"][0]
        return int(counts["inference_count"]), int(counts["execution_count"])

    before = executions()
    transport = open_transport(server.grpc_url, 10.0)
    for future in [transport.submit("rekd", GOOD, ("mask",)) for _ in range(200)]:
        future.result()
    transport.close()
    until = time.monotonic() + 10.0
    while executions()[0] < before[0] + 200 and time.monotonic() < until:
        time.sleep(0.05)  # Triton counts an execution after it has sent its answers
    answered, executed = (after - start for after, start in zip(executions(), before, strict=True))
    assert answered == 200 and executed < 200


def test_texts_of_all_lengths_are_joined_and_answered_as_if_alone(server, rationalizer, many):
    """Four clients, lengths as they come, while the models' processes stand still: all wait when they go on.

    For a tenth of a second: Triton takes a process that is silent for two for dead.
    """

    def totals():
        return StepTotals.of(json.loads(_get(server.http_url, f"/v2/models/{SELECTOR}/stats"))["model_stats"][0])

    requests = [dict(rationalizer.preprocessor([text]).inputs) for text in many[::12]]
    assert len({request["input_ids"].shape for request in requests}) == 3
    with closing(open_transport(server.grpc_url, 20.0)) as transport:
        alone = [transport.submit("rekd", request, ANSWERS).result() for request in requests]
        before = totals()

        def ask(client):
            order = np.random.default_rng(client).permutation(len(requests))
            return [(alone[place], transport.submit("rekd", requests[place], ANSWERS)) for place in order]

        stubs = children_of(server.process_id)
        try:
            for stub in stubs:
                os.kill(stub, signal.SIGSTOP)
            with ThreadPoolExecutor(4) as pool:
                asked = [each for client in pool.map(ask, range(4)) for each in client]
        finally:
            for stub in stubs:
                os.kill(stub, signal.SIGCONT)
        for expected, future in asked:
            for name, wanted in expected.items():
                np.testing.assert_allclose(future.result()[name], wanted, rtol=0, atol=1e-5)
    assert totals().since(before)["rows_per_batch"] >= 4


def _bad_requests():
    ids = GOOD["input_ids"]
    yield "negative", GOOD | {"input_ids": ids - 100}, "outside the vocabulary"
    yield "beyond the vocabulary", GOOD | {"input_ids": ids + 94}, "outside the vocabulary"
    yield "unequal lengths", GOOD | {"attention_mask": np.ones((1, 3), np.int64)}, "must be equal"
    yield "no token", GOOD | {"attention_mask": ids * 0}, "all 0"
    yield "too long", tensors([5] * 49), "at most 48"
    yield "too many", tensors(*[[5, 6]] * 65), "batch-size must be <= 64"
    yield "unequal batches", GOOD | {"attention_mask": np.ones((2, 4), np.int64)}, "batch"
    yield "float", GOOD | {"input_ids": ids.astype(np.float32)}, "data-type|data type"
    yield "rank", {name: array[:, :, None] for name, array in GOOD.items()}, "shape"
    yield "flat", {name: array[0] for name, array in GOOD.items()}, "shape|batch"
    yield "missing input", {"input_ids": ids}, "attention_mask"
    yield "unknown input", GOOD | {"surprise": ids}, "surprise"


@pytest.mark.parametrize(("inputs", "reason"), [pytest.param(*rest, id=name) for name, *rest in _bad_requests()])
def test_bad_request_is_refused_with_a_reason_and_the_server_goes_on(transport, inputs, reason):
    good = [transport.submit("rekd", GOOD, ANSWERS) for _ in range(3)]
    with pytest.raises(RejectedError, match=reason):
        transport.submit("rekd", inputs, ANSWERS).result()
    good += [transport.submit("rekd", GOOD, ANSWERS) for _ in range(3)]
    for future in good:
        np.testing.assert_array_equal(future.result()["mask"], good[0].result()["mask"])


def test_handed_over_tensors_are_no_answers(transport):
    for name in ("positions", "kept"):
        with pytest.raises(RejectedError, match=name):
            transport.submit("rekd", GOOD, (name,)).result()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_id_of_a_request_that_fails_is_in_the_log(server, protocol):
    import importlib

    library = importlib.import_module(f"tritonclient.{protocol}")
    client = library.InferenceServerClient(f"127.0.0.1:{server.ports[protocol]}")
    given = []
    for name, array in (GOOD | {"input_ids": GOOD["input_ids"] - 100}).items():
        given.append(library.InferInput(name, array.shape, "INT64"))
        given[-1].set_data_from_numpy(array)
    with pytest.raises(Exception, match="outside the vocabulary"):
        client.infer("rekd", given, request_id=f"order-{protocol}-7")
    client.close()
    until = time.monotonic() + 10
    while f"order-{protocol}-7" not in server.log_file.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    lines = [line for line in server.log_file.read_text().splitlines() if f"[request id: order-{protocol}-7]" in line]
    assert len(lines) == 1 and lines[0].startswith("W") and "outside the vocabulary" in lines[0]


def test_model_that_is_not_served(url):
    with Client(url, model="nonesuch") as client, pytest.raises(ModelMissingError, match="'nonesuch'"):
        client.predict(["good"])


def test_wrong_protocol(server):
    for url in (server.grpc_url.join(["http://", ""]), server.http_url.removeprefix("http://")):
        with Client(url, timeout=5.0) as client, pytest.raises(ServerUnavailableError):
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
    assert _status(server.http_url, "POST", "/v2/repository/models/rekd/unload") in (403, 400)


def test_metrics(server):
    assert "nv_inference_request_success" in _get(server.metrics_url.removesuffix("/metrics"), "/metrics")


def _request(url, method, path):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _get(url, path):
    status, body = _request(url, "GET", path)
    assert status == 200, body
    return body


def _status(url, method, path):
    return _request(url, method, path)[0]


# servers that fail


def test_taken_port(server, repository):
    with pytest.raises(ServerError, match=f"port {server.ports['http']} cannot be used.*--http-port"):
        TritonServer(repository, 0, server.ports["http"], 0).start()


def test_graph_that_does_not_load(wheel, repository, tmp_path):
    root = shutil.copytree(repository, tmp_path / "broken")
    graph = root / SELECTOR / "1" / GRAPH
    graph.write_bytes(graph.read_bytes()[:1000])
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["repository"]["files"][f"{SELECTOR}/1/{GRAPH}"] = sha256(graph)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServerError, match=r"exit code 1(.|\n)*failed to load 'rekd_selector'(.|\n)*model\.onnx"):
        TritonServer(root, 0, 0, 0, log_file=tmp_path / "log").start()


def test_an_installed_server(wheel, repository, tmp_path, monkeypatch, rationalizer, texts):
    """The wheel's parts laid out as a container has them."""
    root = tmp_path / "opt"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tritonserver").symlink_to(wheel.executable)
    wheel.place_backends(root)
    for name, value in wheel.environment().items():
        monkeypatch.setenv(name, value)
    program = find_installed(root)
    with TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=program) as server:
        command = Path(f"/proc/{server.process_id}/cmdline").read_bytes().decode().split("\0")
        assert command[0] == str(root / "bin" / "tritonserver")
        assert f"--backend-directory={root / 'backends'}" in command
        with Client(server.grpc_url) as client:
            assert same(client.predict(texts), rationalizer.predict(texts))


# the command


@pytest.fixture
def command(wheel, repository, tmp_path):
    """rekd-serve in a process of its own, ready; and its output."""
    output = tmp_path / "output"
    arguments = [str(repository), "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rekd_deploy.cli.serve", *arguments, "--log", str(tmp_path / "log")],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    for _ in range(600):
        if "Ctrl-C" in output.read_text() or process.poll() is not None:
            break
        time.sleep(0.1)
    yield process, output
    process.kill()
    process.wait()


def _descendants(process_id):
    children = [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]
    return children + [each for child in children for each in _descendants(child)]


def _ended(process_ids, seconds=10.0):
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{each}").exists() for each in process_ids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly(command, number):
    process, output = command
    server_id = _descendants(process.pid)[0]
    everyone = _descendants(process.pid) + _descendants(server_id)
    url = next(line.split()[1] for line in output.read_text().splitlines() if line.startswith("gRPC"))
    with Client(url) as client:
        assert len(client.predict(["good"])) == 1
    process.send_signal(number)
    assert process.wait(20) == 0
    assert _ended(everyone) and "Traceback" not in output.read_text()
    with Client(url) as client, pytest.raises(ServerUnavailableError):
        client.predict(["good"])


def test_serve_says_when_the_server_dies(command):
    process, output = command
    everyone = _descendants(process.pid)
    os.kill(everyone[0], signal.SIGKILL)
    assert process.wait(20) == 1
    assert "error: the Triton server was killed by signal 9" in output.read_text()
    assert "Traceback" not in output.read_text() and _ended(everyone)


def test_serve_killed_outright_takes_the_server_along(command):
    process, _ = command
    everyone = _descendants(process.pid)
    process.kill()
    process.wait()
    assert _ended(everyone)


# versions


def test_the_newest_version_answers_beside_an_earlier_one(wheel, artefacts, tmp_path, rationalizer, texts):
    root = write_repository(artefacts, tmp_path / "r")
    later = replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": "0" * 64})
    write_repository(later, root, keep=2)
    with TritonServer(root, 0, 0, 0, log_file=tmp_path / "log") as server, Client(server.grpc_url) as client:
        def executed(version):
            found = json.loads(_get(server.http_url, f"/v2/models/{SELECTOR}/versions/{version}/stats"))
            return found["model_stats"][0]["execution_count"]

        before = executed(1), executed(2)  # the warm-ups
        assert same(client.predict(texts), rationalizer.predict(texts))
        for model, versions in (("rekd", ["2"]), ("rekd_selector", ["1", "2"]), ("rekd_predictor", ["1", "2"])):
            assert sorted(json.loads(_get(server.http_url, f"/v2/models/{model}"))["versions"]) == versions
        assert executed(1) == before[0] and executed(2) > before[1]
