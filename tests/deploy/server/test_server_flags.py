"""The safe flags: closed by default, opened one by one and only in so many words."""

from __future__ import annotations

import pytest

from rekd_deploy.server.flags import ServerSettings, server_flags
from rekd_train.errors import ConfigError

KEY = "0123abcd"


def flags(**settings):
    arguments = server_flags(ServerSettings("/models", **settings), KEY)
    assert all(argument.startswith("--") for argument in arguments)
    names = [argument.partition("=")[0] for argument in arguments]
    assert len(set(names)) == len(names)
    return {name: argument.partition("=")[2] for name, argument in zip(names, arguments, strict=True)}


def test_closed_by_default():
    found = flags()
    assert found["--model-repository"] == "/models"
    assert found["--model-control-mode"] == "none" and "--load-model" not in found
    assert {found[f"--{interface}-address"] for interface in ("grpc", "http", "metrics")} == {"127.0.0.1"}
    assert "--disable-auto-complete-config" in found
    assert found["--strict-readiness"] == found["--exit-on-error"] == "true"
    assert found["--http-restricted-api"] == f"model-repository,shared-memory,trace,logging:rekd-admin={KEY}"
    assert found["--grpc-restricted-protocol"] == found["--http-restricted-api"]
    assert not {"--log-verbose", "--backend-directory", "--cache-directory", "--backend-config"} & set(found)


def test_reload_opens_model_control_to_the_key_alone():
    found = flags(reload=True)
    assert found["--model-control-mode"] == "explicit" and found["--load-model"] == "*"
    assert found["--strict-readiness"] == "false"  # each model's own counts
    for name in ("--http-restricted-api", "--grpc-restricted-protocol"):
        apis, _, header = found[name].partition(":")
        assert "model-repository" in apis.split(",") and header == f"rekd-admin={KEY}"


@pytest.mark.parametrize("field", ["host", "metrics_host"])
@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.4"])
def test_another_address_is_refused_unless_it_is_meant(field, address):
    with pytest.raises(ConfigError, match=rf"{field} {address}.*neither a login nor TLS.*--expose-without-login"):
        ServerSettings("/models", **{field: address})
    found = flags(**{field: address}, exposed=True)
    other = {"host": "metrics", "metrics_host": "http"}[field]
    assert found[f"--{other}-address"] == "127.0.0.1"
    assert "statistics" in found["--http-restricted-api"].partition(":")[0].split(",")


@pytest.mark.parametrize("address", ["", "localhost", "::1", "127.0.0.1:8000", "here"])
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match="is no IPv4 address"):
        ServerSettings("/models", host=address)


def test_every_mistake_in_one_message():
    with pytest.raises(ConfigError) as error:
        ServerSettings("/models", host="here", grpc_port=0, http_port=70000, metrics_port=70000, log_verbose=-1)
    for part in ("'here'", "grpc port 0 is outside", "http port 70000", "must differ", "log_verbose is -1"):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["", "a:b", "a=b", "a,b", "a b", "ä"])
def test_keys_that_triton_would_misread(key):
    with pytest.raises(ConfigError, match="key"):
        server_flags(ServerSettings("/models"), key)


def test_what_is_said_is_passed_on():
    found = flags(
        grpc_port=1, http_port=2, metrics_port=3, gpu_metrics=True, log_verbose=2, exit_seconds=9, backends="/b",
        caches="/c", python_memory_prefix="mine",
    )  # fmt: skip
    assert (found["--grpc-port"], found["--http-port"], found["--metrics-port"]) == ("1", "2", "3")
    assert found["--allow-gpu-metrics"] == "true" and found["--log-verbose"] == "2"
    assert found["--exit-timeout-secs"] == "9" and found["--backend-config"] == "python,shm-region-prefix-name=mine"
    assert found["--backend-directory"] == "/b" and found["--cache-directory"] == "/c"
