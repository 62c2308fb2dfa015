"""The client against the real Triton. One that is killed or exchanged under load: test_triton_operations."""

import asyncio
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from urllib.request import urlopen

import numpy as np
import pytest
import trustme
from families import assert_same_answers
from proxies import Proxy, server_context
from servers import wait_until

from rekd_deploy.client.client import AsyncClient, Client
from rekd_deploy.client.connection import RetryPolicy, TlsSettings
from rekd_deploy.client.transport import Request, open_transport
from rekd_deploy.errors import ClientError, InsecureServerError, RejectedError, ServerUnavailableError
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER
from rekd_deploy.server.status import read_status

pytestmark = pytest.mark.triton


@pytest.fixture(params=["grpc", "http"])
def protocol(request):
    return request.param


@pytest.fixture
def url(server, protocol):
    return f"{protocol}://127.0.0.1:{server.ports[protocol]}"


@pytest.fixture(scope="module")
def many(texts):
    """Texts of every length, more than one request holds, the last one longer than the model reads."""
    return [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70), "good film " * 10_000]


@pytest.fixture
def proxied(server, protocol):
    """A function: TLS towards the client, or None -> a proxy before the server."""
    return lambda context=None: Proxy(server.ports[protocol], context)


def test_both_clients_answer_as_the_model(url, many, rationalizer):
    async def predict():
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.predict(many[n : n + 30]) for n in range(0, len(many), 30)))

    with Client(url) as client:
        found = client.predict(many)
    expected = rationalizer.predict(many)
    assert_same_answers(found, expected)
    assert_same_answers([each for some in asyncio.run(predict()) for each in some], expected)
    assert found[-1].truncated


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
        assert {each.result(30) for each in calling} == {"the client is closed; fix: close it once its calls are done"}


@pytest.mark.parametrize("asks_the_client", [False, True])
def test_tls(proxied, protocol, texts, rationalizer, tmp_path, asks_the_client):
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
            assert_same_answers(client.predict(texts), rationalizer.predict(texts))
        assert read_status(address, tls=settings).ready
        refused = (InsecureServerError, ServerUnavailableError) if asks_the_client else InsecureServerError
        once = RetryPolicy(attempts=1)
        with Client(address, tls=stranger, timeout=5.0, retry=once) as client, pytest.raises(refused):
            client.predict(["good"])
        with pytest.raises(ServerUnavailableError, match="with TLS grpcs:// or https://$"):
            read_status(f"{protocol}://127.0.0.1:{proxy.port}", timeout=3.0)


def test_administration_takes_the_key_and_the_metrics_do_not(server, protocol, url):
    name, request = {"grpc": GRPC_KEY_HEADER, "http": KEY_HEADER}[protocol], Request("", 5.0)
    for headers, refused in (({name.upper(): server.key}, False), ({name: "wrong"}, True), ({}, True)):
        transport = open_transport(url, 5.0, headers=headers)
        with closing(transport), pytest.raises(RejectedError) if refused else nullcontext():
            if protocol == "grpc":
                transport._call(transport._client.get_system_shared_memory_status, request)
            else:
                transport._exchange("GET", "v2/systemsharedmemory/status", request)
    with urlopen(server.metrics_url) as response:
        assert b"nv_inference_request_success" in response.read()


def test_a_refused_request_is_found_in_the_servers_log_by_its_id(server, protocol, url):
    ids = np.full((2, 8), 5000)
    with closing(open_transport(url, 5.0)) as transport, pytest.raises(RejectedError, match="outside the vocabulary"):
        tensors = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        transport.submit("rekd", tensors, ("mask",), request_id=f"by {protocol}").result()
    wait_until(lambda: f"[request id: by {protocol}] input_ids[0, 0] is 5000" in server.log_file.read_text())


def test_a_model_that_is_not_served(url):
    with Client(url, model="nonesuch") as client, pytest.raises(ClientError, match="does not serve .* 'nonesuch'"):
        client.predict(["good"])
