"""The files for compose, Kubernetes and KServe: right by their schemas, closed where they must be."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from rekd_deploy.production.compose import IMAGE_VARIABLE, SERVER
from rekd_deploy.production.rendering import as_yaml, render
from rekd_deploy.production.settings import ProductionSettings, read_settings

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
OTHERS = {"InferenceService", "ScaledObject", "PodMonitor"}
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest that knows everything used, and the newest that the validator knows."""
IMAGE = "tritonserver:26.05-py3"
SETTINGS = {
    "as committed": read_settings(ROOT / "deploy" / "settings.toml"),
    "all else": ProductionSettings(
        image="registry.example.org:5000/rekd-triton:26.10-1", name="reviews", namespace="text", flavour="tensorrt",
        repository="/srv/models/reviews", models_claim="weights", cpus=1.5, memory_gib=2.5, shared_memory_mib=64,
        gpus=2, user=2000, http_port=9000, grpc_port=9001, metrics_port=9002, tls_port=9443, published_port=8443,
        hostname="reviews.example.net", tls_secret="certificate", key_secret="word", min_replicas=1, max_replicas=3,
        queue_target_ms=7.5, prometheus_url="https://metrics.example.net/prometheus", monitoring_namespace="watch",
        gateway_namespace="gateway", subnet="10.9.8.0/29", request_seconds=5, max_request_mib=2,
    ),
}  # fmt: skip


@pytest.fixture(params=SETTINGS)
def settings(request) -> ProductionSettings:
    return SETTINGS[request.param]


@pytest.fixture
def files(settings) -> dict[str, str]:
    return render(settings)


@pytest.fixture
def compose(files):
    return yaml.safe_load(files["compose/compose.yaml"])


def manifests(files: dict[str, str], folder: str) -> dict[str, dict]:
    loaded = [yaml.safe_load(text) for path, text in files.items() if path.startswith(f"{folder}/")]
    return {each["kind"]: each for each in loaded}


def validate(manifest: dict) -> None:
    """Raise unless the manifest is right for every version of Kubernetes."""
    kind = manifest["kind"]
    if kind in OTHERS:
        jsonschema.validate(manifest, json.loads((SCHEMAS / f"{kind.lower()}.json").read_text(encoding="utf-8")))
    else:
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def pod(manifest: dict) -> dict:
    """The pod that a Deployment or an InferenceService makes."""
    if manifest["kind"] == "Deployment":
        return manifest["spec"]["template"]["spec"]
    of_kserve = {"labels", "minReplicas", "maxReplicas", "timeout", "autoScaling"}
    return {key: value for key, value in manifest["spec"]["predictor"].items() if key not in of_kserve}


def workloads(files) -> list[dict]:
    return [manifests(files, "kubernetes")["Deployment"], manifests(files, "kserve")["InferenceService"]]


def flags(arguments: list[str]) -> dict[str, str]:
    return dict(part.removeprefix("--").partition("=")[::2] for part in arguments[1:])


# the committed files


def test_the_committed_files_are_what_is_rendered():
    rendered = render(SETTINGS["as committed"])
    for path, content in rendered.items():
        assert (ROOT / "deploy" / path).read_text(encoding="utf-8") == content, (
            f"{path}: run rekd-deploy deploy/settings.toml"
        )
    there = {path.relative_to(ROOT / "deploy").as_posix() for path in (ROOT / "deploy").rglob("*") if path.is_file()}
    assert there == {*rendered, "settings.toml"}


def test_no_registry_is_written_down():
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file():
            assert not re.search(r"\b(nvcr|ghcr|quay|docker|gcr)\.io\b", path.read_text(encoding="utf-8")), path


def test_rendering_twice_gives_the_same(settings, files):
    assert render(settings) == files


def test_yaml_is_read_back_as_it_was():
    words = ["yes", "no", "1e3", "0o17", "${A:?b c}", "$(A)"]
    document = {"text": "a: b\n  c\n", "words": words, "again": words, "empty": {}, "no": []}
    assert yaml.safe_load(as_yaml(document)) == document


# right by the schemas


@pytest.mark.parametrize("folder", ["kubernetes", "kserve"])
def test_manifests_are_right(files, folder):
    found = manifests(files, folder)
    assert found
    for manifest in found.values():
        validate(manifest)


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "ScaledObject", "PodMonitor", "InferenceService"])
def test_the_validators_see_an_unknown_field(kind):
    files = render(SETTINGS["as committed"])
    manifest = copy.deepcopy((manifests(files, "kubernetes") | manifests(files, "kserve"))[kind])
    manifest["spec"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


def test_what_kserve_makes_is_a_right_pod(files):
    for workload in workloads(files):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod(workload)})


def test_compose_file_is_right(compose):
    schema = get_builtin_schema("vendor.compose-spec")
    validator = jsonschema.validators.validator_for(schema)
    validator(schema).validate(compose)
    compose["services"][SERVER]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validator(schema).validate(compose)


# the server's flags


def test_the_server_is_closed_wherever_it_runs(settings, files, compose):
    commands = {
        "compose": compose["services"][SERVER]["command"],
        **{each["kind"]: pod(each)["containers"][0]["args"] for each in workloads(files)},
    }
    for place, arguments in commands.items():
        assert arguments[0] == "tritonserver"
        given = flags(arguments)
        assert given["model-control-mode"] == "none"
        assert given["strict-readiness"] == given["exit-on-error"] == "true"
        assert "disable-auto-complete-config" in given
        assert given["model-repository"] == settings.repository
        assert given["allow-gpu-metrics"] == ("true" if settings.gpus else "false")
        for interface in ("http-restricted-api", "grpc-restricted-protocol"):
            shut, _, key = given[interface].partition(":")
            assert {"model-repository", "shared-memory", "trace", "logging", "statistics"} <= set(shut.split(","))
            assert key == f"rekd-admin={'$' + ('{%s}' if place == 'compose' else '(%s)') % 'REKD_ADMIN_KEY'}"
        inside = "127.0.0.1" if place == "Deployment" else "0.0.0.0"
        assert given["http-address"] == given["grpc-address"] == inside


def test_key_and_image_must_be_given(compose, files):
    server = compose["services"][SERVER]
    assert server["image"].startswith(f"${{{IMAGE_VARIABLE}:?")
    assert server["environment"]["REKD_ADMIN_KEY"].startswith("${REKD_ADMIN_KEY:?")
    for workload in workloads(files):
        [key] = [each for each in pod(workload)["containers"][0]["env"] if each["name"] == "REKD_ADMIN_KEY"]
        assert set(key["valueFrom"]) == {"secretKeyRef"}


# rights


def test_pods_satisfy_the_restricted_profile(files):
    for workload in workloads(files):
        spec = pod(workload)
        assert spec["automountServiceAccountToken"] is False
        rights = spec["securityContext"]
        assert rights["runAsNonRoot"] and rights["runAsUser"] > 0
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
        kinds = {next(key for key in volume if key != "name") for volume in spec["volumes"]}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    [label] = {*manifests(files, "kubernetes")["Namespace"]["metadata"]["labels"].values()}
    assert label == "restricted"


def test_the_repository_is_read_only_and_memory_is_shared(settings, files, compose):
    for workload in workloads(files):
        mounts = {each["name"]: each for each in pod(workload)["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in pod(workload)["volumes"]}
        assert mounts["models"]["readOnly"] and volumes["models"]["persistentVolumeClaim"]["readOnly"]
        assert settings.repository.startswith(mounts["models"]["mountPath"] + "/")
        assert mounts["shared-memory"]["mountPath"] == "/dev/shm"
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        assert set(mounts) <= set(volumes)
    server = compose["services"][SERVER]
    assert server["volumes"][0]["read_only"] is True
    assert server["shm_size"] == f"{settings.shared_memory_mib}m"


def test_containers_of_compose_have_no_rights(compose):
    for name, service in compose["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged")
    for name in (SERVER, "proxy"):
        assert not compose["services"][name]["user"].startswith(("0", "root"))


# what can be reached


def test_compose_publishes_the_proxy_and_on_loopback_the_monitoring(settings, compose):
    services = compose["services"]
    assert list(services[SERVER]["networks"]) == ["inside"] and "ports" not in services[SERVER]
    assert compose["networks"]["inside"]["internal"] is True
    address = services[SERVER]["networks"]["inside"]["ipv4_address"]
    assert f"server {address}:{settings.grpc_port};" in render(settings)["compose/nginx.conf"]
    assert services["proxy"]["ports"] == [f"${{REKD_PORT:-{settings.published_port}}}:{settings.tls_port}"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    scrape = yaml.safe_load(render(settings)["compose/prometheus.yml"])["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": [f"{SERVER}:{settings.metrics_port}"]}]


def test_the_pod_lets_in_tls_and_prometheus_alone(settings, files):
    found = manifests(files, "kubernetes")
    policy = found["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == []
    tls, metrics = policy["ingress"]
    assert tls == {"ports": [{"port": settings.tls_port}]}
    assert metrics["ports"] == [{"port": settings.metrics_port}] and metrics["from"]
    server, proxy = pod(found["Deployment"])["containers"]
    assert [port["containerPort"] for port in server["ports"]] == [settings.metrics_port]
    assert f"server 127.0.0.1:{settings.http_port};" in found["ConfigMap"]["data"]["nginx.conf"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == proxy["ports"][0]["name"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found[kind]["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor")]
    for selector in [*(each["matchLabels"] for each in selectors), found["Service"]["spec"]["selector"]]:
        assert selector.items() <= labels.items()


def test_kserves_pod_lets_in_the_gateway_and_prometheus_alone(settings, files):
    policy = manifests(files, "kserve")["NetworkPolicy"]["spec"]
    sources = {
        entry["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]: entry["ports"]
        for entry in policy["ingress"]
    }
    assert sources == {
        settings.gateway_namespace: [{"port": settings.http_port}, {"port": settings.grpc_port}],
        settings.monitoring_namespace: [{"port": settings.metrics_port}],
    }
    predictor = manifests(files, "kserve")["InferenceService"]["spec"]["predictor"]
    assert policy["podSelector"]["matchLabels"].items() <= predictor["labels"].items()


# life of a pod


def test_probes_and_the_end_of_a_pod(settings, files):
    for workload in workloads(files):
        server = pod(workload)["containers"][0]
        port = settings.tls_port if workload["kind"] == "Deployment" else settings.http_port
        for probe, path in (("readiness", "ready"), ("startup", "ready"), ("liveness", "live")):
            asked = server[f"{probe}Probe"]["httpGet"]
            assert (asked["path"], asked["port"]) == (f"/v2/health/{path}", port)
        grace = pod(workload)["terminationGracePeriodSeconds"]
        waits = server["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert waits + int(flags(server["args"])["exit-timeout-secs"]) < grace


def test_the_server_outlives_what_the_proxy_must_finish(files):
    server, proxy = pod(manifests(files, "kubernetes")["Deployment"])["containers"]
    drain = int(re.search(r"worker_shutdown_timeout (\d+)s", render(SETTINGS["as committed"])["compose/nginx.conf"])[1])
    ends = proxy["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert server["lifecycle"]["preStop"]["sleep"]["seconds"] >= ends + drain


def test_new_proxy_settings_make_new_pods():
    def mark(settings):
        deployment = manifests(render(settings), "kubernetes")["Deployment"]
        return deployment["spec"]["template"]["metadata"]["annotations"]["rekd/proxy-config"]

    base = ProductionSettings(image=IMAGE)
    assert mark(base) == mark(ProductionSettings(image=IMAGE, cpus=8))
    assert mark(base) != mark(ProductionSettings(image=IMAGE, max_request_mib=1))


def test_both_clusters_grow_by_the_same_measure(settings, files):
    scaled = manifests(files, "kubernetes")["ScaledObject"]["spec"]
    [trigger] = scaled["triggers"]
    [metric] = manifests(files, "kserve")["InferenceService"]["spec"]["predictor"]["autoScaling"]["metrics"]
    external = metric["external"]
    assert trigger["metadata"]["query"] == external["metric"]["query"]
    assert trigger["metadata"]["threshold"] == external["target"]["value"] == f"{settings.queue_target_ms:g}"
    assert f'namespace="{settings.namespace}"' in external["metric"]["query"]
    assert trigger["metricType"] == "AverageValue", "what KServe makes KEDA do, too"
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (settings.min_replicas, settings.max_replicas)
    assert "replicas" not in manifests(files, "kubernetes")["Deployment"]["spec"]


def test_gpus_are_asked_for_everywhere_or_nowhere(settings, files, compose):
    asked = [pod(each)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for each in workloads(files)]
    reserved = compose["services"][SERVER]["deploy"]["resources"].get("reservations")
    assert asked == ([str(settings.gpus)] * 2 if settings.gpus else [None] * 2)
    assert (reserved is not None) == bool(settings.gpus)
