"""The files in deploy/: right by their tools and schemas, closed where they must be, and one story in all of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from rekd_deploy.repository.config import ENDPOINTS, ENSEMBLE, SINGLE
from rekd_deploy.server.flags import server_flags

pytestmark = pytest.mark.debian

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
PROJECT = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OVERLAYS = ("cpu", "gpu", "http", "kserve")
REQUIRED = {name: f"/srv/{name.lower()}" for name in ("REKD_MODELS", "TLS_CERTIFICATE", "TLS_KEY")}
REQUIRED |= {"TRITON_IMAGE": "tritonserver:26.05-py3", "REKD_ADMIN_KEY": "0123456789abcdef"}


def read(*place):
    return (DEPLOY / Path(*place)).read_text(encoding="utf-8")


def run(*command, **options):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; fix: apt-get install kustomize docker-compose")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@cache
def overlay(name):
    done = run("kustomize", "build", str(DEPLOY / "kubernetes" / "overlays" / name))
    assert done.returncode == 0, done.stderr
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


def docker_compose(*files, **variables):
    environment = {"PATH": os.environ["PATH"], "COMPOSE_PROFILES": "monitoring", **variables}
    arguments = [part for file in ("compose.yaml", *files) for part in ("--file", file)]
    done = run("docker-compose", *arguments, "config", cwd=DEPLOY / "compose", env=environment)
    return yaml.safe_load(done.stdout) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def compose():
    return docker_compose(**REQUIRED)


def pod(name):
    if name == "kserve":
        of_kserve = {"labels", "minReplicas", "maxReplicas", "timeout", "autoScaling"}
        predictor = overlay(name)["InferenceService"]["spec"]["predictor"]
        return {key: value for key, value in predictor.items() if key not in of_kserve}
    return overlay(name)["Deployment"]["spec"]["template"]["spec"]


def validate(manifest):
    """Raise unless the manifest is right for every version of Kubernetes."""
    schema = Path(__file__).parent / "schemas" / f"{manifest['kind'].lower()}.json"
    if schema.exists():
        jsonschema.validate(manifest, json.loads(schema.read_text(encoding="utf-8")))
    else:
        for version in ("1.30", kubernetes_validate.latest_version()):  # the oldest that knows everything used
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_build_are_right_and_satisfy_the_restricted_profile(name):
    for kind, manifest in overlay(name).items():
        validate(manifest)
        assert manifest["metadata"].get("namespace", "rekd") == "rekd", kind
        if "spec" in manifest:
            with pytest.raises(jsonschema.ValidationError):
                validate(manifest | {"spec": manifest["spec"] | {"surprise": 1}})
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod(name)})
    release = re.fullmatch(r"tritonserver:(\d\d)\.(\d\d)-py3", pod(name)["containers"][0]["image"])
    assert tuple(map(int, release.groups())) >= (26, 5), "older releases lack security fixes"
    shared = {"Namespace", "NetworkPolicy", "PodMonitor"}
    of_the_base = {"ConfigMap", "Deployment", "Service", "ScaledObject", "PodDisruptionBudget"}  # KServe makes its own
    assert set(overlay(name)) - shared == ({"InferenceService"} if name == "kserve" else of_the_base)
    spec, labels = pod(name), overlay(name)["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert spec["automountServiceAccountToken"] is False and spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    none = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert all(container["securityContext"] == none for container in spec["containers"])
    volumes = {each["name"]: each for each in spec["volumes"]}
    mounts = {each["name"]: each for each in spec["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] and volumes["models"]["persistentVolumeClaim"]["readOnly"]
    memory = mounts["shared-memory"]["mountPath"], volumes["shared-memory"]["emptyDir"]["medium"]
    assert memory == ("/dev/shm", "Memory")


def test_compose_has_its_variables_and_the_servers_flags_are_the_safe_ones(compose):
    text = "".join(path.read_text(encoding="utf-8") for path in (DEPLOY / "compose").glob("*.yaml"))
    defaults = {name: default for name, sign, default in re.findall(r"\$\{(\w+):([-?])([^}]*)\}", text) if sign == "-"}
    named = re.findall(r"^(?:# )?(?!COMPOSE_)([A-Z_]+)=(.*)$", read("compose", ".env.example"), re.MULTILINE)
    assert dict(named) == defaults | dict.fromkeys([*REQUIRED, "REKD_API_KEY"], "")
    for missing in REQUIRED:
        assert f"set {missing} to" in docker_compose(**REQUIRED | {missing: ""})
    def safe(key, host):
        ports = {"grpc": 8001, "http": 8000, "metrics": 8002}
        flags = server_flags(["/models/rekd"], ports, key, host=host, exposed=True, gpu_metrics=True, exit_seconds=10)
        flags = [re.sub("(--metrics-address)=.*", r"\1=0.0.0.0", flag) for flag in flags]  # Prometheus is elsewhere
        return ["tritonserver", *flags, "--metrics-config=summary_latencies=true"]
    assert compose["services"]["triton"]["command"] == safe(REQUIRED["REKD_ADMIN_KEY"], "0.0.0.0")
    for name, host in (("kserve", "0.0.0.0"), ("cpu", "127.0.0.1")):  # the pod's address, or its proxy alone
        server = pod(name)["containers"][0]
        assert server["args"] == safe("$(REKD_ADMIN_KEY)", host)
        reference = {"secretKeyRef": {"name": "rekd-admin", "key": "key"}}
        assert server["env"][0] == {"name": "REKD_ADMIN_KEY", "valueFrom": reference}


def test_queries_parse_and_pods_let_in_clients_and_prometheus_alone():
    for path in filter(Path.is_file, DEPLOY.rglob("*")):
        assert not re.search(r"\b(nvcr|ghcr|quay|docker|gcr)\.io\b", path.read_text(encoding="utf-8")), path
    for text in queries():
        promql_parser.parse(text)
    assert {*re.findall(r'"(rekd\|[^"]*)"', " ".join(queries()))} == {"|".join((ENSEMBLE, SINGLE, *ENDPOINTS.values()))}
    def let_in(namespace, *ports):
        selector = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
        return {"ports": [{"port": port} for port in ports], "from": [selector]}
    found = overlay("cpu")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    gateway = let_in("envoy-gateway-system", 8000, 8001)
    for name, clients in (("cpu", {"ports": [{"port": 8443}]}), ("kserve", gateway)):
        policy = overlay(name)["NetworkPolicy"]["spec"]
        assert policy == {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress", "Egress"], "egress": [],
                          "ingress": [clients, let_in("monitoring", 8002)]}  # fmt: skip
    selectors = [found[kind]["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor")]
    assert [*(each["matchLabels"] for each in selectors), found["Service"]["spec"]["selector"]] == [labels] * 4


def test_containers_have_no_rights_and_gpus_and_measures_are_what_is_meant(compose):
    services = compose["services"]
    ports = {"triton": [], "proxy": [(None, "443")]}
    ports |= {"prometheus": [("127.0.0.1", "9090")], "grafana": [("127.0.0.1", "3000")]}
    assert set(services) == set(ports)
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and not service.get("privileged"), name
        assert [(port.get("host_ip"), port["published"]) for port in service.get("ports", ())] == ports[name]
        for volume in service["volumes"]:
            ours = volume["type"] == "bind" and not volume["source"].startswith("/srv/")
            assert not ours or (Path(volume["source"]).exists() and volume["read_only"]), volume
    server, proxy = services["triton"], services["proxy"]
    assert server["volumes"][0]["read_only"] is True and server["shm_size"]
    assert server["user"] == proxy["user"] == "1000:1000"
    assert list(server["networks"]) == ["inside"] and compose["networks"]["inside"]["internal"] is True
    assert proxy["extra_hosts"] == [f"triton={server['networks']['inside']['ipv4_address']}"]
    assert proxy["stop_signal"] == "SIGQUIT", "nginx finishes what is under way"
    assert "targets: [triton:8002]" in read("prometheus", "prometheus.yml").replace('"', "")
    for name, wanted in (("cpu", None), ("gpu", "1"), ("kserve", None)):
        resources = pod(name)["containers"][0]["resources"]
        assert resources["limits"].get("nvidia.com/gpu") == wanted and resources["limits"] == resources["requests"]
    with_gpus = docker_compose("compose.gpu.yaml", **REQUIRED, REKD_GPUS="2")
    plain, gpus = (each["services"]["triton"]["deploy"]["resources"] for each in (compose, with_gpus))
    assert gpus == plain | {"reservations": {"devices": [{"capabilities": ["gpu"], "driver": "nvidia", "count": 2}]}}
    [trigger] = overlay("cpu")["ScaledObject"]["spec"]["triggers"]
    [metric] = overlay("kserve")["InferenceService"]["spec"]["predictor"]["autoScaling"]["metrics"]
    external, query, limit = metric["external"], trigger["metadata"]["query"], trigger["metadata"]["threshold"]
    assert (external["metric"]["query"], external["target"]["value"]) == (query, limit)
    assert trigger["metricType"] == "AverageValue", "what KServe makes KEDA do, too"
    parsed = promql_parser.parse(query)  # KEDA divides by the replicas, so the query multiplies by them
    assert str(parsed.op) == "*" and str(parsed.rhs.op) == "count"
    panels, alerts = told()
    measure = query.partition(" * count(")[0].replace(', namespace="rekd"', "")
    [drawn] = [panel for panel in panels if "thresholds" in panel["fieldConfig"]["defaults"]]
    assert drawn["targets"][0]["expr"].replace(', instance=~"$instance"', "") == measure
    assert drawn["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == float(limit)
    assert alerts["RekdRequestsWait"] == f"{measure} > {5 * float(limit):g}"


def test_the_http_front_is_closed_takes_a_key_and_starts_as_the_command_does():
    assert "set REKD_API_KEY to" in docker_compose("compose.http.yaml", **REQUIRED)
    key = {"REKD_API_KEY": "0123456789abcdef"}
    front = docker_compose("compose.http.yaml", **REQUIRED, **key)["services"]["http"]
    assert front["environment"] == key and front["user"] == "1000:1000"
    assert front["read_only"] is True and front["cap_drop"] == ["ALL"]
    assert front["security_opt"] == ["no-new-privileges:true"]
    ports = [(port["host_ip"], port["target"], port["published"]) for port in front["ports"]]
    assert ports == [("127.0.0.1", 8080, "8080")]
    [beside] = [each for each in pod("http")["containers"] if each["name"] == "http"]
    secret = {"secretKeyRef": {"name": "rekd-http", "key": "key"}}
    assert beside["env"] == [{"name": "REKD_API_KEY", "valueFrom": secret}]
    assert beside["command"] == [part.replace("triton:", "127.0.0.1:") for part in front["command"]]
    assert beside["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": 8080}
    assert overlay("http")["Service"]["spec"]["ports"][1]["targetPort"] == "http"
    *of_cpu, let_in = overlay("http")["NetworkPolicy"]["spec"]["ingress"]
    assert of_cpu == overlay("cpu")["NetworkPolicy"]["spec"]["ingress"] and let_in["from"]
    assert let_in["ports"] == [{"port": 8080}], "its gateway alone, as it has no TLS"
    program, *arguments = front["command"]
    assert program in PROJECT["scripts"]
    done = subprocess.run([sys.executable, "-m", PROJECT["scripts"][program].split(":")[0], *arguments, "--limit=x"],
                          capture_output=True, text=True, env=os.environ | key)  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: the limit 'x'"), "all but the limit is right"


def test_the_image_of_the_front_copies_what_there_is_and_has_no_root_no_tools_and_a_health_check():
    lines = [line for line in read("Dockerfile").replace("\\\n", "").splitlines() if line and line[0] != "#"]
    steps = [line.split(maxsplit=1) for line in lines]
    words = [word for word, _ in steps]
    build, last = (steps[start:end] for start, end in ((0, words.index("FROM", 1)), (words.index("FROM", 1), None)))
    copied = [part for word, rest in build if word == "COPY" for part in rest.split()[:-1]]
    assert copied and all((DEPLOY.parent / part).exists() for part in copied)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied), "what the wheel is made of"
    let_through = [line[1:] for line in read("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    assert let_through == copied
    text = "".join(rest for _, rest in steps)
    extras = re.findall(r"'\.\[([\w,-]+)\]'", text)
    assert extras and {each for found in extras for each in found.split(",")} <= set(PROJECT["optional-dependencies"])
    final = dict(reversed(last))  # the first of each kind
    assert [rest.split()[0] for word, rest in last if word == "COPY"] == ["--from=build"]
    assert final["FROM"].endswith("-slim") and final["FROM"] == build[0][1].split()[0]
    assert final["USER"] == "1000:1000" and "pip uninstall" in final["RUN"] and "pip uninstall" in dict(build)["RUN"]
    front = docker_compose("compose.http.yaml", **REQUIRED, REKD_API_KEY="0123456789abcdef")["services"]["http"]
    assert json.loads(final["CMD"]) == front["command"]
    assert json.loads(final["HEALTHCHECK"].partition("CMD ")[2]) == front["healthcheck"]["test"][1:]


@pytest.mark.parametrize(("name", "port"), [("cpu", 8443), ("kserve", 8000)])
def test_probes_and_the_end_of_a_pod(name, port):
    server, *proxies = pod(name)["containers"]
    for probe, path in (("readiness", "ready"), ("startup", "ready"), ("liveness", "live")):
        request = server[f"{probe}Probe"]["httpGet"]
        assert (request["path"], request["port"]) == (f"/v2/health/{path}", port)
    waits = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits + 10 < pod(name)["terminationGracePeriodSeconds"], "--exit-timeout-secs"
    for proxy in proxies:
        assert pod(name)["hostAliases"] == [{"ip": "127.0.0.1", "hostnames": ["triton"]}]
        nginx = overlay(name)["ConfigMap"]["data"]["nginx.conf"]
        assert "keepalive_requests 1000;" in nginx, "clients get to new replicas"
        drain = re.search(r"worker_shutdown_timeout (\d+)s", nginx)[1]
        assert waits >= proxy["lifecycle"]["preStop"]["sleep"]["seconds"] + int(drain), "the server ends last"


def told():
    panels = json.loads(read("grafana", "rekd.json"))["panels"]
    groups = yaml.safe_load(read("prometheus", "alerts.yaml"))["groups"]
    alerts = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    return [panel for panel in panels if panel["type"] != "row"], alerts


def queries():
    """Every PromQL in deploy/, Grafana's variables filled in."""
    scaled = yaml.safe_load(read("kubernetes", "base", "scaledobject.yaml"))["spec"]["triggers"][0]["metadata"]["query"]
    panels, alerts = told()
    texts = [*(target["expr"] for panel in panels for target in panel["targets"]), *alerts.values(), scaled]
    return [re.sub(r"\$(model|instance)\b", ".*", text.replace("$__rate_interval", "1m")) for text in texts]
