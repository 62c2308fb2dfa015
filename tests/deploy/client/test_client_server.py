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
from families import assert_same_answers
from proxies import Proxy, server_context

from rekd_deploy.client.client import AsyncClient, Client
from rekd_deploy.client.connection import RetryPolicy, TlsSettings
from rekd_deploy.client.transport import Request, open_transport
from rekd_deploy.errors import ClientError, InsecureServerError, RejectedError, ServerError, ServerUnavailableError
from rekd_deploy.server.server import TritonServer

pytestmark = pytest.mark.triton

NEVER_AGAIN = RetryPolicy(attempts=1)


@pytest.fixture(params=["grpc", "http"])
def protocol(request):
    return request.param


@pytest.fixture
def url(server, protocol):
    return f"{protocol}://127.0.0.1:{server.ports[protocol]}"


@pytest.fixture(scope="module")
def many(texts):
    """Texts of every length, more than one request holds."""
    return [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70)]


@pytest.fixture(scope="module")
def expected(rationalizer, many):
    return dict(zip(many, rationalizer.predict(many), strict=True))


def same(predictions, texts, expected):
    assert [found.text for found in predictions] == texts
    assert_same_answers(predictions, [expected[text] for text in texts])
    return True


@pytest.fixture
def proxied(server, protocol):
    """A function: TLS towards the client, or None -> a proxy before the server."""
    return lambda context=None: Proxy(server.ports[protocol], context)


def test_both_clients_answer_as_the_model(url, many, expected):
    with Client(url) as client:
        assert same(client.predict(many), many, expected)

    async def predict():
        async with AsyncClient(url) as client:
            assert (await client.description()).labels == ("negative", "positive")
            return await asyncio.gather(*(client.predict(many[n : n + 30]) for n in range(0, len(many), 30)))

    assert same([found for some in asyncio.run(predict()) for found in some], many, expected)


def test_connections_are_used_again(proxied, protocol):
    with proxied() as proxy, Client(f"{protocol}://127.0.0.1:{proxy.port}") as client:
        for _ in range(20):
            client.predict(["good film"])
        assert proxy.connections == 1
        proxy.cut()
        client.predict(["good film"])  # one that broke is noticed, and replaced
        assert proxy.connections == 2


def test_a_process_that_closes_no_client_ends_and_says_nothing(url):
    code = "import sys; from rekd_deploy import Client; print(Client(sys.argv[1]).predict(['good plot'])[0].label)"
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in ("negative", "positive")


def test_closing_while_calls_are_on_their_way(url, many):
    client = Client(url)

    def predict():
        while True:
            try:
                client.predict(many)
            except ClientError as error:
                return str(error)

    with ThreadPoolExecutor(16) as pool:
        calling = [pool.submit(predict) for _ in range(16)]
        time.sleep(0.3)
        client.close()
        assert {each.result(30) for each in calling} == {
            "the client is closed; fix: close it once its calls are done"
        }


# TLS, headers, ids


@pytest.mark.parametrize("asks_the_client", [False, True])
def test_tls(proxied, protocol, texts, expected, tmp_path, asks_the_client):
    authority = trustme.CA()
    context, mine = server_context(authority), authority.issue_cert("client@example")
    roots, certificate, key = (tmp_path / name for name in ("roots.pem", "client.pem", "client.key"))
    authority.cert_pem.write_to_path(roots)
    certificate.write_bytes(b"".join(blob.bytes() for blob in mine.cert_chain_pems))
    mine.private_key_pem.write_to_path(key)
    settings, stranger = TlsSettings(roots), None  # a root that the system does not know
    if asks_the_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        settings, stranger = TlsSettings(roots, certificate, key), settings
    with proxied(context) as proxy:
        address = f"{protocol}s://127.0.0.1:{proxy.port}"
        with Client(address, tls=settings) as client:
            assert same(client.predict(texts), texts, expected)
        with Client(address, tls=stranger, timeout=5.0, retry=NEVER_AGAIN) as client:
            allowed = (InsecureServerError, ServerUnavailableError) if asks_the_client else InsecureServerError
            with pytest.raises(allowed):
                client.predict(["good"])


def test_headers_are_sent_with_every_request(server, url, protocol):
    """The key that opens the server's restricted interfaces, shared memory among them, is a header."""
    command = Path(f"/proc/{server.process_id}/cmdline").read_text()
    name, value = re.search(r"shared-memory[^:\0]*:([\w-]+)=(\w+)", command).groups()
    name = f"triton-grpc-protocol-{name}" if protocol == "grpc" else name
    request = Request("", 5.0)
    for headers, refused in (({name.upper(): value}, False), ({name: "wrong"}, True), ({}, True)):
        transport = open_transport(url, 5.0, headers=headers)
        with closing(transport), pytest.raises(RejectedError) if refused else nullcontext():
            if protocol == "grpc":
                transport._call(transport._client.get_system_shared_memory_status, request)
            else:
                transport._exchange("GET", "v2/systemsharedmemory/status", request)


def test_a_refused_request_is_found_in_the_server_by_its_id(url):
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
            with server:
                yield
            return
        except ServerError as error:
            if "killed by signal 6" not in str(error) or attempt == 2:
                raise


def test_a_server_killed_under_load(repository, tmp_path, many, expected):
    """Whoever does not wait gets a typed error, whoever does gets the right answer; nobody gets a wrong one."""
    first = TritonServer(repository, 0, 0, 0, log_file=tmp_path / "first")
    first.start()
    ports = [first.ports[name] for name in ("grpc", "http", "metrics")]
    stop, ready = threading.Event(), threading.Barrier(9)
    outcomes = {"impatient": [], "patient": []}

    def predict(seed):
        kind = "patient" if seed % 4 < 2 else "impatient"
        retry = RetryPolicy(attempts=1000, longest_pause=0.5) if kind == "patient" else NEVER_AGAIN
        generator = np.random.default_rng(seed)
        with Client((first.grpc_url, first.http_url)[seed % 2], retry=retry, timeout=60.0) as client:
            client.predict(["good"])
            ready.wait(120)
            while not stop.is_set():
                some = [many[i] for i in generator.choice(len(many), size=generator.integers(1, 90))]
                try:
                    assert same(client.predict(some, deadline=180.0), some, expected)
                    outcomes[kind].append("right")
                except ServerUnavailableError as error:
                    outcomes[kind].append(type(error).__name__)
                    stop.wait(0.05)
        return True

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(predict, seed) for seed in range(8)]
        try:
            ready.wait(120)
            time.sleep(0.5)
            os.kill(first.process_id, signal.SIGKILL)
            time.sleep(0.3)
            first.stop()
            before = {kind: len(found) for kind, found in outcomes.items()}
            with started_again(repository, ports, tmp_path):
                until = time.monotonic() + 60
                while not all("right" in outcomes[kind][before[kind] :] for kind in before):
                    assert time.monotonic() < until, "they go on with the server that took its place"
                    time.sleep(0.05)
                stop.set()
                assert all(each.result(180) for each in running)
        finally:
            stop.set()
    assert set(outcomes["patient"]) == {"right"}
    assert set(outcomes["impatient"]) == {"right", "ServerUnavailableError"}
