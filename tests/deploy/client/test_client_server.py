"""The client against the real Triton: both protocols, TLS, headers, threads, and a server that dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import trustme
from proxies import Proxy

from rekd_deploy.client.client import AsyncClient, Client
from rekd_deploy.client.connection import RetryPolicy, TlsSettings
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    InsecureServerError,
    RejectedError,
    ServerError,
    ServerUnavailableError,
)
from rekd_deploy.server.server import TritonServer

pytestmark = pytest.mark.triton

PROTOCOLS = ("grpc", "http")
URLS = {"grpc": "grpc_url", "http": "http_url"}
NEVER_AGAIN = RetryPolicy(attempts=1)


@pytest.fixture(params=PROTOCOLS)
def protocol(request):
    return request.param


@pytest.fixture
def url(server, protocol):
    return getattr(server, URLS[protocol])


@pytest.fixture(scope="module")
def many(texts):
    """Texts of every length, more than one request holds."""
    return [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70)]


@pytest.fixture(scope="module")
def expected(rationalizer, many):
    return dict(zip(many, rationalizer.predict(many), strict=True))


def same(answers, expected):
    for answer in answers:
        wanted = expected[answer.text]
        assert (answer.label, answer.rate, answer.truncated) == (wanted.label, wanted.rate, wanted.truncated)
        assert [(s.start, s.end) for s in answer.rationale] == [(s.start, s.end) for s in wanted.rationale]
        np.testing.assert_allclose([*answer.probabilities.values()], [*wanted.probabilities.values()], atol=1e-4)
    return True


def test_both_clients_answer_as_the_model(url, many, expected):
    with Client(url) as client:
        assert [answer.text for answer in client.predict(many)] == many
        assert same(client.predict(many), expected)

    async def ask():
        async with AsyncClient(url) as client:
            assert (await client.description()).labels == ("negative", "positive")
            return await asyncio.gather(*(client.predict(many[n : n + 30]) for n in range(0, len(many), 30)))

    answers = [answer for some in asyncio.run(ask()) for answer in some]
    assert [answer.text for answer in answers] == many and same(answers, expected)


def test_windows_as_the_pipeline_has_them(url, repository, texts):
    many = [*texts, "good film and a dull plot " * 60]
    with Pipeline(repository) as pipeline, Client(url) as client:
        wanted = {each.text: each for each in pipeline.predict(many, windows=True)}
        answers = client.predict(many, windows=True)
    assert same(answers, wanted) and not any(answer.truncated for answer in answers)
    assert max(span.end for span in answers[-1].rationale) > len(many[-1]) * 0.8


def test_connections_are_used_again(server, protocol):
    with Proxy(server.ports[protocol]) as proxy:
        scheme = "http://" if protocol == "http" else ""
        with Client(f"{scheme}127.0.0.1:{proxy.port}") as client:
            for _ in range(20):
                client.predict(["good film"])
            assert proxy.connections == 1
            proxy.cut()
            client.predict(["good film"])  # one that broke is noticed, and replaced
            assert proxy.connections == 2


def test_a_request_in_flight_when_its_connection_breaks_is_sent_again(server, protocol, many, expected):
    with Proxy(server.ports[protocol]) as proxy:
        scheme = "http://" if protocol == "http" else ""
        with Client(f"{scheme}127.0.0.1:{proxy.port}", retry=RetryPolicy(attempts=50, longest_pause=0.2)) as client:
            client.predict(["good"])
            stop = threading.Event()

            def vandal():
                while not stop.wait(0.1):
                    proxy.cut()

            thread = threading.Thread(target=vandal)
            thread.start()
            try:
                for _ in range(5):
                    assert same(client.predict(many), expected)
            finally:
                stop.set()
                thread.join()
            assert proxy.connections > 2


def test_eight_threads_of_one_client(url, many, expected):
    with Client(url) as client:

        def ask(seed):
            generator = np.random.default_rng(seed)
            for _ in range(6):
                some = [many[i] for i in generator.choice(len(many), size=generator.integers(1, 90))]
                answers = client.predict(some)
                assert [answer.text for answer in answers] == some and same(answers, expected)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(8)))


def test_a_process_that_closes_no_client_ends_and_says_nothing(url):
    code = "import sys; from rekd_deploy import Client; print(Client(sys.argv[1]).predict(['good plot'])[0].label)"
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in ("negative", "positive")


def test_closing_while_calls_are_on_their_way(url, many, expected):
    client = Client(url)
    client.predict(["good"])

    def ask():
        while True:
            try:
                assert same(client.predict(many), expected)
            except ClientError as error:
                return str(error)

    with ThreadPoolExecutor(16) as pool:
        calling = [pool.submit(ask) for _ in range(16)]
        time.sleep(0.3)
        client.close()
        assert {each.result(30) for each in calling} == {
            "the client is closed; fix: open another, or close it once its calls are done"
        }


# TLS and headers


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """An authority, its root certificate's file, and a client's certificate and key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "roots.pem")
    mine = authority.issue_cert("client@example")
    for number, blob in enumerate(mine.cert_chain_pems):
        blob.write_to_path(folder / "client.pem", append=number > 0)
    mine.private_key_pem.write_to_path(folder / "client.key")
    return authority, folder


def tls_context(authority, *, asks_the_client: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if asks_the_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_tls(server, protocol, tls, many, expected):
    authority, folder = tls
    with Proxy(server.ports[protocol], tls_context(authority, asks_the_client=False)) as proxy:
        address = f"{protocol}s://127.0.0.1:{proxy.port}"
        with Client(address, tls=TlsSettings(folder / "roots.pem")) as client:
            assert same(client.predict(many), expected)
        with Client(address, timeout=5.0) as client, pytest.raises(InsecureServerError):
            client.predict(["good"])  # a root that the system does not know


def test_tls_with_a_certificate_of_the_clients_own(server, protocol, tls):
    authority, folder = tls
    mine = TlsSettings(folder / "roots.pem", folder / "client.pem", folder / "client.key")
    with Proxy(server.ports[protocol], tls_context(authority, asks_the_client=True)) as proxy:
        address = f"{protocol}s://127.0.0.1:{proxy.port}"
        with Client(address, tls=mine) as client:
            assert len(client.predict(["good"])) == 1
        nobody = TlsSettings(folder / "roots.pem")
        with (
            Client(address, tls=nobody, timeout=5.0, retry=NEVER_AGAIN) as client,
            pytest.raises((InsecureServerError, ServerUnavailableError)),
        ):
            client.predict(["good"])


@pytest.fixture
def key(server, protocol):
    """The header that opens the server's restricted interfaces, shared memory among them."""
    command = Path(f"/proc/{server.process_id}/cmdline").read_text()
    name, value = re.search(r"shared-memory[^:\0]*:([\w-]+)=(\w+)", command).groups()
    return {f"triton-grpc-protocol-{name}" if protocol == "grpc" else name: value}


def test_headers_are_sent_with_every_request(url, protocol, key):
    def shared_memory(transport):
        if protocol == "grpc":
            transport._call(transport._client.get_system_shared_memory_status, "", 5.0)
        else:
            transport._get("v2/systemsharedmemory/status", "", 5.0)

    name, value = next(iter(key.items()))
    for headers, refused in (({name.upper(): value}, False), ({name: "wrong"}, True), ({}, True)):
        transport = open_transport(url, 5.0, headers=headers)
        with closing(transport), pytest.raises(RejectedError) if refused else nullcontext():
            shared_memory(transport)


# ids


def test_a_refused_request_is_found_in_the_server_by_its_id(server, url):
    ids = np.full((65, 8), 9, dtype=np.int64)
    with closing(open_transport(url, 5.0)) as transport, pytest.raises(RejectedError, match="order-17"):
        tensors = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        transport.submit("rekd", tensors, ("mask",), request_id="order-17").result()


# a server that dies


@contextmanager
def started_again(repository, ports, folder):
    """As a supervisor would: Triton 2.51 may abort while it starts on a busy machine (boost's lock_exception)."""
    for attempt in range(3):
        server = TritonServer(repository, *ports, log_file=folder / f"again-{attempt}")
        try:
            server.start()
            break
        except ServerError as error:
            server.stop()
            if "killed by signal 6" not in str(error) or attempt == 2:
                raise
    try:
        yield
    finally:
        server.stop()


def test_a_server_killed_under_load(server, repository, tmp_path, many, expected):
    """Whoever does not wait gets a typed error, whoever does gets the right answer; nobody gets a wrong one."""
    first = TritonServer(repository, 0, 0, 0, log_file=tmp_path / "first")
    first.start()
    ports = [first.ports[name] for name in ("grpc", "http", "metrics")]
    stop, ready = threading.Event(), threading.Barrier(9)
    outcomes = {"impatient": [], "patient": []}

    def ask(seed):
        kind = "patient" if seed % 4 < 2 else "impatient"
        retry = RetryPolicy(attempts=1000, longest_pause=0.5) if kind == "patient" else NEVER_AGAIN
        generator = np.random.default_rng(seed)
        with Client(getattr(first, list(URLS.values())[seed % 2]), retry=retry, timeout=60.0) as client:
            client.predict(["good"])
            ready.wait(120)
            while not stop.is_set():
                some = [many[i] for i in generator.choice(len(many), size=generator.integers(1, 90))]
                try:
                    answers = client.predict(some, deadline=180.0)
                    assert [answer.text for answer in answers] == some and same(answers, expected)
                    outcomes[kind].append("right")
                except ServerUnavailableError as error:
                    outcomes[kind].append(type(error).__name__)
                    stop.wait(0.05)
        return True

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, seed) for seed in range(8)]
        try:
            ready.wait(120)
            time.sleep(0.5)
            os.kill(first.process_id, signal.SIGKILL)
            time.sleep(0.3)
            first.stop()
            before = {kind: len(found) for kind, found in outcomes.items()}
            with started_again(repository, ports, tmp_path):
                until = time.monotonic() + 60
                while time.monotonic() < until and any(
                    "right" not in found[before[kind] :] for kind, found in outcomes.items()
                ):
                    time.sleep(0.05)
                stop.set()
                assert all(each.result(180) for each in asking)
        finally:
            stop.set()
    assert set(outcomes["patient"]) == {"right"}
    assert set(outcomes["impatient"]) == {"right", "ServerUnavailableError"}
    for kind, found in outcomes.items():
        assert "right" in found[before[kind] :], "they go on with the server that took its place"


def test_a_deadline_too_short_for_any_server(url, many):
    with Client(url) as client:
        client.predict(["good"])
        with pytest.raises(DeadlineError):
            client.predict(many * 20, deadline=0.01)
        assert len(client.predict(["good"])) == 1
