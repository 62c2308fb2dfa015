"""The files in deploy/ at work: Triton started by compose's arguments, nginx by its configuration, TLS between."""

import contextlib
import os
import re
import shutil
import ssl
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc as library
import trustme
import yaml
from families import assert_same_answers
from servers import send, wait_until
from test_deploy_files import DEPLOY, queries
from tritonclient.utils import InferenceServerException

from rekd_deploy import Client, RejectedError, TlsSettings
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK, settled_ports
from rekd_deploy.server.status import ServerState, read_status

pytestmark = [pytest.mark.triton, pytest.mark.debian]

KEY = "0123456789abcdef"
ALICE = {"Authorization": "Basic YWxpY2U6c2VjcmV0"}
AS_KUBELET = ssl._create_unverified_context()  # a probe takes whatever certificate it sees


@contextlib.contextmanager
def running(arguments, log, **options):
    with open(log, "wb") as file:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(20) == 0, log.read_text(errors="replace")


@contextlib.contextmanager
def proxy(deployment, folder, change=lambda text: text):
    """nginx by its file, at this machine's ports and folders; yields its port."""
    port = settled_ports({"http": 0})["http"]
    text = change((DEPLOY / "nginx" / "nginx.conf").read_text(encoding="utf-8"))
    for there, here in {" /tmp/": f" {folder}/", "/etc/rekd/": f"{folder}/", "/etc/rekd-tls/": f"{deployment.folder}/",
                        "/dev/stdout": f"{folder}/access.log", "triton:8000": f"{LOOPBACK}:{deployment.http}",
                        "triton:8001": f"{LOOPBACK}:{deployment.grpc}", "listen 8443": f"listen {port}",
                        "size 64m": "size 1m"}.items():  # fmt: skip
        assert there in text, there
        text = text.replace(there, here)
    (folder / "nginx.conf").write_text(text)
    command = [deployment.nginx, "-e", "stderr", "-c", str(folder / "nginx.conf")]
    command += ["-g", "user root;"] if os.getuid() == 0 else []  # as in a container: one user for all of it
    tested = subprocess.run([*command, "-t", "-q"], capture_output=True, text=True)
    assert tested.returncode == 0 and not tested.stderr, tested.stderr
    with running(command, folder / "nginx.log"):
        wait_until(lambda: send(port, "GET", "/v2/health/ready", tls=AS_KUBELET)[0] == 200, 180)
        yield port


@pytest.fixture(scope="module")
def deployment(wheel, repository, tmp_path_factory):
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:  # before anything is started
        pytest.skip("nginx is not installed; fix: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("production")
    found = SimpleNamespace(folder=folder, nginx=nginx, **settled_ports({"grpc": 0, "http": 0, "metrics": 0}))
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
        running(command, folder / "triton.log", env=wheel.environment(folder), cwd=folder),
        proxy(found, folder) as found.port,
        library.InferenceServerClient(f"{LOOPBACK}:{found.grpc}") as found.direct,
        library.InferenceServerClient(f"localhost:{found.port}", ssl=True,
                                      root_certificates=str(found.authority)) as found.proxied,  # fmt: skip
    ):
        yield found


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_our_client_over_tls(deployment, rationalizer, texts, scheme):
    tls = TlsSettings(root_certificates=deployment.authority)
    with Client(f"{scheme}://localhost:{deployment.port}", tls=tls) as client:
        assert_same_answers(client.predict(texts), rationalizer.predict(texts))


def test_management_and_status_take_the_key_and_are_not_passed_on_even_with_it(deployment):
    for line in ("POST /v2/repository/index", "POST /v2/repository/models/rekd/unload",
                 "GET /v2/systemsharedmemory/status", "GET /v2/logging", "GET /v2/trace/setting",
                 "GET /v2/models/rekd/stats"):  # fmt: skip
        assert send(deployment.http, *line.split())[0] == 403, line
        assert send(deployment.http, *line.split(), **{KEY_HEADER: KEY})[0] != 403, line
        status, body = send(deployment.port, *line.split(), tls=deployment.tls, **{KEY_HEADER: KEY})
        assert status == 404 and b"nginx" in body, line
    assert deployment.direct.get_model_repository_index({GRPC_KEY_HEADER: KEY}).models
    with pytest.raises(InferenceServerException, match="restricted|expecting header"):
        deployment.direct.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        deployment.proxied.get_model_repository_index({GRPC_KEY_HEADER: KEY})
    for path in ("/", "/metrics", "/v2x", "/v2/models/stats", "/v2/models/rekd/../../repository/index"):
        assert send(deployment.port, "GET", path, tls=deployment.tls)[0] == 404, path
    urls = {"grpc_url": f"{LOOPBACK}:{deployment.grpc}", "http_url": f"http://{LOOPBACK}:{deployment.http}"}
    state = ServerState(process_id=1, repository="", metrics_url="", log_file="", key=KEY, version=1, **urls)
    for url in urls.values():
        with pytest.raises(RejectedError, match="the statistics of .* take a key"):
            read_status(url)
        assert read_status(url.replace(LOOPBACK, "localhost"), [state]).ready


def test_large_requests_logins_and_rates_are_limited(deployment, tmp_path):
    assert send(deployment.port, "POST", "/v2/models/rekd/infer", bytes(2 << 20), deployment.tls)[0] == 413
    large = library.InferInput("input_ids", [1, 1 << 18], "INT64")
    large.set_data_from_numpy(np.ones((1, 1 << 18), np.int64))
    with pytest.raises(InferenceServerException, match="413"):
        deployment.proxied.infer("rekd", [large])
    (tmp_path / "htpasswd").write_text("alice:{PLAIN}secret\n")
    with proxy(deployment, tmp_path, partial(re.sub, r"# ((?:limit_req|auth_basic).*;)", r"\1")) as port:
        model = (port, "GET", "/v2/models/rekd/config", None, deployment.tls)
        assert send(*model)[0] == 401
        statuses = [send(*model, **ALICE)[0] for _ in range(200)]
        assert statuses[0] == 200 and set(statuses) == {200, 429}
        probes = {send(port, "GET", "/v2/health/ready", tls=AS_KUBELET)[0] for _ in range(100)}
        assert probes == {200}, "probes know no name and no limit"


def test_every_series_that_is_queried_is_there(deployment):
    def series(text, line):
        return [(name, re.findall(line, labels)) for name, labels in re.findall(r"(\w+)\{([^}]*)\}", text)]
    def holds(labels, label, how, wanted):
        pattern = wanted if "~" in how else re.escape(wanted)
        return (re.fullmatch(pattern, labels.get(label, "")) is None) == ("!" in how)
    metrics = re.sub(r"(?m)^(\w+) ", r"\1{} ", send(deployment.metrics, "GET", "/metrics")[1].decode())
    shown = [(name, dict(labels)) for name, labels in series(metrics, r'(\w+)="([^"]*)"')]
    for query in queries():
        queried = series(query, r'(\w+)(=~|!~|=)"([^"]*)"')
        assert queried, query
        for metric, conditions in queried:
            if metric in ("nv_gpu_utilization", "nv_gpu_memory_used_bytes"):  # only where there is a GPU
                continue
            own = [each for each in conditions if each[0] not in ("instance", "namespace")]  # Prometheus adds these
            alike = (labels for name, labels in shown if name == metric)
            assert any(all(holds(labels, *each) for each in own) for labels in alike), f"{metric} {own}"
