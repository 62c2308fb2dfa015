"""The files in deploy/ at work: Triton started by compose's arguments, nginx by its configuration, TLS between."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import ssl
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from test_deploy_files import DEPLOY, queries

from rekd_deploy.client.client import Client
from rekd_deploy.client.connection import TlsSettings
from rekd_deploy.errors import RejectedError
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK, settled_ports
from rekd_deploy.server.status import ServerState, read_status

pytestmark = [pytest.mark.triton, pytest.mark.debian]

KEY = "0123456789abcdef"
ALICE = {"Authorization": "Basic YWxpY2U6c2VjcmV0"}
AS_KUBELET = ssl._create_unverified_context()
"""A probe takes whatever certificate it sees."""


@contextlib.contextmanager
def running(arguments: list[str], log, **options):
    with open(log, "wb") as file:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(20) == 0, log.read_text(errors="replace")


@contextlib.contextmanager
def proxy(deployment, folder, change=lambda text: text):
    """nginx by its file, at this machine's ports and folders; yields its process and port."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        pytest.skip("nginx is not installed; fix: apt-get install nginx-light")
    port = settled_ports({"http": 0})["http"]
    text = change((DEPLOY / "nginx" / "nginx.conf").read_text(encoding="utf-8"))
    for there, here in {
        " /tmp/": f" {folder}/", "/etc/rekd/": f"{folder}/", "/etc/rekd-tls/": f"{deployment.folder}/",
        "/dev/stdout": f"{folder}/access.log", "triton:8000": f"{LOOPBACK}:{deployment.http}",
        "triton:8001": f"{LOOPBACK}:{deployment.grpc}", "listen 8443": f"listen {port}", "size 64m": "size 1m",
    }.items():  # fmt: skip
        assert there in text, there
        text = text.replace(there, here)
    (folder / "nginx.conf").write_text(text)
    command = [nginx, "-e", "stderr", "-c", str(folder / "nginx.conf")]
    command += ["-g", "user root;"] if os.getuid() == 0 else []  # as in a container: one user for all of it
    tested = subprocess.run([*command, "-t", "-q"], capture_output=True, text=True)
    assert tested.returncode == 0 and not tested.stderr, tested.stderr
    with running(command, folder / "nginx.log") as process:
        wait_until(lambda: send(port, "GET", "/v2/health/ready", tls=AS_KUBELET)[0] == 200, 180)
        yield process, port


@pytest.fixture(scope="module")
def deployment(wheel, repository, tmp_path_factory):
    import trustme

    folder = tmp_path_factory.mktemp("production")
    found = SimpleNamespace(folder=folder, **settled_ports({"grpc": 0, "http": 0, "metrics": 0}))
    authority, found.authority = trustme.CA(), folder / "authority.pem"
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(folder / "tls.key"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    authority.cert_pem.write_to_path(str(found.authority))
    found.tls = ssl.create_default_context(cafile=found.authority)

    command = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["triton"]["command"]
    command = [re.sub(r"\$\{REKD_ADMIN_KEY.*\}", KEY, part).replace("0.0.0.0", LOOPBACK) for part in command]
    changed = {f"--{name}-port": getattr(found, name) for name in ("grpc", "http", "metrics")}
    changed |= {"--model-repository": repository, "--allow-gpu-metrics": "false"}  # the wheel has none
    command = [part for part in command[1:] if part.partition("=")[0] not in changed]
    changed["--backend-directory"] = wheel.place_backends(folder)  # which a container's image knows
    command = [str(wheel.executable), *command, *(f"{name}={value}" for name, value in changed.items())]
    with (
        running(command, folder / "triton.log", env=wheel.environment(), cwd=folder),
        proxy(found, folder) as (_, found.port),
    ):
        yield found


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(port: int, method: str, path: str, body=None, tls: ssl.SSLContext | None = None, **headers: str):
    """Status and body of an answer."""
    kind, options = (http.client.HTTPSConnection, {"context": tls}) if tls else (http.client.HTTPConnection, {})
    with contextlib.closing(kind("localhost", port, timeout=10, **options)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def over_grpc(deployment):
    from tritonclient.grpc import InferenceServerClient

    certificates = str(deployment.authority)
    with InferenceServerClient(f"localhost:{deployment.port}", ssl=True, root_certificates=certificates) as client:
        yield client


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_our_client_over_tls(deployment, rationalizer, texts, scheme):
    tls = TlsSettings(root_certificates=deployment.authority)
    with Client(f"{scheme}://localhost:{deployment.port}", tls=tls) as client:
        both = client.predict(texts), rationalizer.predict(texts)
    seen, wanted = ([(one.label, [(span.start, span.end) for span in one.rationale]) for one in each] for each in both)
    assert seen == wanted


def test_management_takes_the_key_and_is_not_passed_on_even_with_it(deployment, over_grpc):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    for line in (
        "POST /v2/repository/index", "POST /v2/repository/models/rekd/unload", "GET /v2/systemsharedmemory/status",
        "GET /v2/logging", "GET /v2/trace/setting", "GET /v2/models/rekd/stats",
    ):  # fmt: skip
        assert send(deployment.http, *line.split())[0] == 403, line
        assert send(deployment.http, *line.split(), **{KEY_HEADER: KEY})[0] != 403, line
        status, body = send(deployment.port, *line.split(), tls=deployment.tls, **{KEY_HEADER: KEY})
        assert status == 404 and b"nginx" in body, line
    with InferenceServerClient(f"{LOOPBACK}:{deployment.grpc}") as direct:
        assert direct.get_model_repository_index({GRPC_KEY_HEADER: KEY}).models
        with pytest.raises(InferenceServerException, match="restricted|expecting header"):
            direct.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        over_grpc.get_model_repository_index({GRPC_KEY_HEADER: KEY})
    for path in ("/", "/metrics", "/v2x", "/v2/models/stats", "/v2/models/rekd/../../repository/index"):
        assert send(deployment.port, "GET", path, tls=deployment.tls)[0] == 404, path


def test_the_status_takes_the_key(deployment):
    urls = {"grpc_url": f"{LOOPBACK}:{deployment.grpc}", "http_url": f"http://{LOOPBACK}:{deployment.http}"}
    state = ServerState(process_id=1, repository="", metrics_url="", log_file="", key=KEY, version=1, **urls)
    for url in urls.values():
        with pytest.raises(RejectedError, match="the statistics of .* take a key"):
            read_status(url)
        assert read_status(url.replace(LOOPBACK, "localhost"), [state]).ready


def test_too_large_a_request_does_not_reach_the_server(deployment, over_grpc):
    import tritonclient.grpc as library
    from tritonclient.utils import InferenceServerException

    assert send(deployment.port, "POST", "/v2/models/rekd/infer", bytes(2 << 20), deployment.tls)[0] == 413
    large = library.InferInput("input_ids", [1, 1 << 18], "INT64")
    large.set_data_from_numpy(np.ones((1, 1 << 18), np.int64))
    with pytest.raises(InferenceServerException, match="413"):
        over_grpc.infer("rekd", [large])


def test_login_and_rate_limit_where_they_are_switched_on(deployment, tmp_path):
    (tmp_path / "htpasswd").write_text("alice:{PLAIN}secret\n")
    switched_on = partial(re.sub, r"# ((?:limit_req|auth_basic).*;)", r"\1")
    with proxy(deployment, tmp_path, switched_on) as (_, port):
        model = (port, "GET", "/v2/models/rekd/config", None, deployment.tls)
        assert send(*model)[0] == 401
        statuses = [send(*model, **ALICE)[0] for _ in range(200)]
        assert statuses[0] == 200 and set(statuses) == {200, 429}
        probes = {send(port, "GET", "/v2/health/ready", tls=AS_KUBELET)[0] for _ in range(100)}
        assert probes == {200}, "probes know no name and no limit"


def test_every_series_that_is_queried_is_there(deployment):
    def series(text: str, line: str):
        return [(name, re.findall(line, labels)) for name, labels in re.findall(r"(\w+)\{([^}]*)\}", text)]

    operators = {"=": str.__eq__, "=~": lambda value, wanted: re.fullmatch(wanted, value) is not None,
                 "!~": lambda value, wanted: re.fullmatch(wanted, value) is None}  # fmt: skip
    metrics = re.sub(r"(?m)^(\w+) ", r"\1{} ", send(deployment.metrics, "GET", "/metrics")[1].decode())
    shown = [(name, dict(labels)) for name, labels in series(metrics, r'(\w+)="([^"]*)"')]
    for query in queries():
        queried = series(query, r'(\w+)(=~|!~|=)"([^"]*)"')
        assert queried, query
        for metric, conditions in queried:
            if metric in ("nv_gpu_utilization", "nv_gpu_memory_used_bytes"):  # only where there is a GPU
                continue
            own = [each for each in conditions if each[0] not in ("instance", "namespace")]  # Prometheus adds these
            assert any(
                name == metric and all(operators[how](labels.get(label, ""), value) for label, how, value in own)
                for name, labels in shown
            ), f"{metric} {own}"
