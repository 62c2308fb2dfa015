"""The rendered files at work: Triton started by a container's arguments, nginx by its configuration, TLS between."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rekd_deploy.client.address import TlsSettings
from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ServerError
from rekd_deploy.production.container import KEY_VARIABLE, Listening, command
from rekd_deploy.production.dashboard import panels
from rekd_deploy.production.proxy import CONNECTION_REQUESTS, ProxyPaths, nginx_command, nginx_config
from rekd_deploy.production.queue_time import scaling_query
from rekd_deploy.production.settings import ProductionSettings
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK
from rekd_deploy.server.wheel import find_wheel
from rekd_train.errors import MissingExtraError

pytestmark = [pytest.mark.triton, pytest.mark.debian]

KEY = "0123456789abcdef"
ANSWERS = ("scores", "mask", "logits", "probabilities")
IDS = np.array([[2, 9, 10, 11, 3]], dtype=np.int64)
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


@dataclass(frozen=True)
class Deployment:
    settings: ProductionSettings
    authority: Path
    """Certificate that clients trust."""
    access_log: Path

    @property
    def address(self) -> str:
        """Of the proxy."""
        return f"localhost:{self.settings.tls_port}"


@pytest.fixture(scope="module")
def nginx() -> str:
    found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("nginx is not installed; fix: apt-get install nginx-light")
    return found


@pytest.fixture(scope="module")
def deployment(nginx, repository, tmp_path_factory) -> Iterator[Deployment]:
    import trustme

    try:
        wheel = find_wheel()
    except (MissingExtraError, ServerError) as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("production")
    settings = ProductionSettings(
        repository=str(repository),
        max_request_mib=1,
        **dict(zip(("http_port", "grpc_port", "metrics_port", "tls_port"), free_ports(4), strict=True)),
    )

    authority, paths = trustme.CA(), ProxyPaths(
        str(folder / "tls.crt"), str(folder / "tls.key"), str(folder), str(folder / "access.log")
    )  # fmt: skip
    certificate = authority.issue_cert("localhost", settings.hostname)
    certificate.private_key_pem.write_to_path(paths.key)
    for part in certificate.cert_chain_pems:
        part.write_to_path(paths.certificate, append=True)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    config = folder / "nginx.conf"
    config.write_text(nginx_config(settings, LOOPBACK, paths))

    server = command(settings, Listening(metrics=LOOPBACK), f"$({KEY_VARIABLE})")
    server = [str(wheel.executable), *(part.replace(f"$({KEY_VARIABLE})", KEY) for part in server[1:])]
    server.append(f"--backend-directory={wheel.place_backends(folder)}")  # which a container's image knows
    work = folder / "work"
    work.mkdir()
    with (
        running(server, folder / "triton.log", env=wheel.environment(), cwd=work),
        running([nginx, *nginx_command(str(config))[1:]], folder / "nginx.log"),
    ):
        deployment = Deployment(settings, folder / "authority.pem", folder / "access.log")
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                if as_kubelet(deployment, "/v2/health/ready") == 200:
                    break
            logs = "".join((folder / name).read_text(errors="replace") for name in ("triton.log", "nginx.log"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)
        yield deployment


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(arguments: list[str], log: Path, **options) -> Iterator[subprocess.Popen]:
    with open(log, "wb") as file:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        assert code == 0, log.read_text(errors="replace")


def as_kubelet(deployment: Deployment, path: str) -> int:
    """A probe: HTTPS to the address, whatever the certificate says."""
    connection = http.client.HTTPSConnection(
        LOOPBACK, deployment.settings.tls_port, timeout=5, context=ssl._create_unverified_context()
    )
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def trusting(deployment: Deployment) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=deployment.authority)


def https(deployment: Deployment, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status and body of a client's request."""
    connection = http.client.HTTPSConnection(
        "localhost", deployment.settings.tls_port, timeout=10, context=trusting(deployment)
    )
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def plain(port: int, method: str, path: str, **headers: str):
    """Status and body of a request to the server itself."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture
def over_grpc(deployment):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(
        deployment.address, ssl=True, root_certificates=str(deployment.authority)
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(deployment):
    transport = open_transport(f"{LOOPBACK}:{deployment.settings.grpc_port}", 10.0)
    yield transport.submit("rekd", INPUTS, ANSWERS).result()
    transport.close()


def asked(library):
    inputs = []
    for name, array in INPUTS.items():
        inputs.append(library.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def test_grpc_over_tls(over_grpc, expected):
    import tritonclient.grpc as library

    assert over_grpc.is_server_ready() and over_grpc.is_model_ready("rekd")
    answer = over_grpc.infer("rekd", asked(library))
    for name, array in expected.items():
        np.testing.assert_array_equal(answer.as_numpy(name), array)


def test_https(deployment, expected):
    import tritonclient.http as library

    with library.InferenceServerClient(
        deployment.address, ssl=True, ssl_context_factory=lambda: trusting(deployment)
    ) as client:
        assert client.is_server_ready() and client.get_model_config("rekd")["platform"] == "ensemble"
        answer = client.infer("rekd", asked(library))
    for name, array in expected.items():
        np.testing.assert_array_equal(answer.as_numpy(name), array)


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_our_client_over_tls(deployment, rationalizer, texts, scheme):
    tls = TlsSettings(root_certificates=deployment.authority)
    with Client(f"{scheme}://{deployment.address}", tls=tls) as client:
        answers = client.predict(texts)
    for answer, wanted in zip(answers, rationalizer.predict(texts), strict=True):
        assert answer.label == wanted.label
        assert [(span.start, span.end) for span in answer.rationale] == [
            (span.start, span.end) for span in wanted.rationale
        ]


def test_a_client_that_does_not_know_the_certificate_gets_nothing(deployment):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    connection = http.client.HTTPSConnection("localhost", deployment.settings.tls_port, timeout=5)
    with contextlib.closing(connection), pytest.raises(ssl.SSLCertVerificationError):
        connection.request("GET", "/v2/health/ready")
    with InferenceServerClient(deployment.address, ssl=True) as client, pytest.raises(InferenceServerException):
        client.is_server_live(client_timeout=5)


MANAGEMENT = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/rekd/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
]


@pytest.mark.parametrize(("method", "path"), MANAGEMENT, ids=lambda value: value)
def test_management_takes_the_key_and_is_not_passed_on_even_with_it(deployment, method, path):
    ports = deployment.settings
    assert plain(ports.http_port, method, path)[0] == 403
    assert plain(ports.http_port, method, path, **{KEY_HEADER: KEY})[0] != 403
    status, body = https(deployment, method, path, **{KEY_HEADER: KEY})
    assert status == 404 and b"nginx" in body


def test_management_over_grpc_is_not_passed_on(deployment, over_grpc):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(f"{LOOPBACK}:{deployment.settings.grpc_port}") as direct:
        assert direct.get_model_repository_index({GRPC_KEY_HEADER: KEY}).models
        with pytest.raises(InferenceServerException, match="restricted|expecting header"):
            direct.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        over_grpc.get_model_repository_index({GRPC_KEY_HEADER: KEY})


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/", "/v2x", "/v2/models/stats", "/v2/models/rekd/stats", "/v2/models/rekd/../../repository/index"],
)
def test_nothing_else_is_passed_on(deployment, path):
    assert https(deployment, "GET", path)[0] == 404


def test_too_large_a_request_does_not_reach_the_server(deployment, over_grpc):
    import tritonclient.grpc as library
    from tritonclient.utils import InferenceServerException

    assert https(deployment, "POST", "/v2/models/rekd/infer", bytes(2 << 20))[0] == 413
    large = library.InferInput("input_ids", [1, 1 << 18], "INT64")
    large.set_data_from_numpy(np.ones((1, 1 << 18), np.int64))
    with pytest.raises(InferenceServerException, match="413"):
        over_grpc.infer("rekd", [large])


def test_a_probe_needs_neither_name_nor_certificate(deployment):
    assert as_kubelet(deployment, "/v2/health/live") == 200


def test_connections_are_renewed_without_a_failed_request(deployment, over_grpc):
    before = len(deployment.access_log.read_text().splitlines())
    requests = CONNECTION_REQUESTS * 2
    assert all(over_grpc.is_server_live() for _ in range(requests))
    deadline = time.monotonic() + 5  # the proxy logs a request once it has been answered
    while len(lines := deployment.access_log.read_text().splitlines()[before:]) < requests:
        assert time.monotonic() < deadline, f"{len(lines)} of {requests} requests in the log"
        time.sleep(0.1)
    entries = [json.loads(line) for line in lines]
    assert len(entries) == requests and all(entry["status"] == 200 for entry in entries)
    assert len({entry["connection"] for entry in entries}) >= 2


def test_a_proxy_that_is_told_to_end_finishes_what_is_under_way(nginx, deployment, tmp_path):
    settings = deployment.settings.model_copy(update={"tls_port": free_ports(1)[0]})
    folder = deployment.access_log.parent
    paths = ProxyPaths(str(folder / "tls.crt"), str(folder / "tls.key"), str(tmp_path), str(tmp_path / "access.log"))
    (tmp_path / "nginx.conf").write_text(nginx_config(settings, LOOPBACK, paths))
    other = Deployment(settings, deployment.authority, tmp_path / "access.log")
    body = json.dumps(
        {"inputs": [{"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.ravel().tolist()}
                    for name, array in INPUTS.items()]}
    ).encode()  # fmt: skip
    with running([nginx, *nginx_command(str(tmp_path / "nginx.conf"))[1:]], tmp_path / "log") as process:
        connection = http.client.HTTPSConnection(
            "localhost", settings.tls_port, timeout=10, context=trusting(deployment)
        )
        with contextlib.closing(connection):
            wait_until(lambda: as_kubelet(other, "/v2/health/live") == 200)
            connection.putrequest("POST", "/v2/models/rekd/infer")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:10])
            time.sleep(0.2)  # nginx has read the head of the request
            process.send_signal(signal.SIGQUIT)
            wait_until(lambda: not accepts_connections(settings.tls_port))
            connection.send(body[10:])
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["model_name"] == "rekd"
        assert process.wait(10) == 0


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


DOCUMENTED = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"}
"""Metrics that the server has only where it finds a GPU: Triton's user guide, "GPU Metrics"."""


def series(deployment: Deployment) -> dict[str, list[dict[str, str]]]:
    """Label sets of each metric that the server shows."""
    found: dict[str, list[dict[str, str]]] = {}
    for line in plain(deployment.settings.metrics_port, "GET", "/metrics")[1].splitlines():
        if match := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], []).append(dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")))
    return found


def selectors(expression: str) -> list[tuple[str, list]]:
    """Metric and conditions of each series that PromQL asks for."""
    import promql_parser

    found, pending = [], [promql_parser.parse(expression)]
    while pending:
        node = pending.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, node.matchers.matchers))
        for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
            below = getattr(node, name, None)
            pending += below if isinstance(below, list) else [below] if below is not None else []
    return found


def test_every_series_of_dashboard_and_autoscaling_is_there(deployment, expected):
    shown = series(deployment)
    choices = {"$model": ".*", "$instance": ".*", "$__rate_interval": "1m"}
    expressions = [query.expression for group in panels(deployment.settings).values() for panel in group
                   for query in panel.queries]  # fmt: skip
    for expression in [*expressions, scaling_query(deployment.settings)]:
        for variable, value in choices.items():
            expression = expression.replace(variable, value)
        asked_for = selectors(expression)
        assert asked_for, expression
        for metric, conditions in asked_for:
            if metric in DOCUMENTED:
                continue
            own = [each for each in conditions if each.name not in ("instance", "namespace")]  # Prometheus adds these
            assert any(all(holds(each, labels) for each in own) for labels in shown.get(metric, [])), expression


def holds(matcher, labels: dict[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    kind = str(matcher.op).rpartition(".")[2]
    matches = re.fullmatch(matcher.value, value) is not None if kind in ("Re", "NotRe") else matcher.value == value
    return matches is (kind in ("Re", "Equal"))
