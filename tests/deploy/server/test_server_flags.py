"""The safe flags: closed by default, opened one by one and only in so many words; and the ports."""

import socket

import pytest

from rekd_deploy.errors import ServerError
from rekd_deploy.server.flags import check_host, server_flags, settled_ports
from rekd_train.errors import ConfigError


def flags(**settings):
    arguments = server_flags("/models", {"grpc": 1, "http": 2, "metrics": 3}, "0123abcd", **settings)
    found = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    assert len(found) == len(arguments) and all(argument.startswith("--") for argument in arguments)
    return found


ADMIN = "model-repository,shared-memory,trace,logging:rekd-admin=0123abcd"
EXPOSED = ADMIN.replace("logging", "logging,statistics")  # where others reach the server


def test_closed_by_default():
    assert flags() == {
        "disable-auto-complete-config": "", "model-repository": "/models", "model-control-mode": "none",
        "strict-readiness": "true", "exit-on-error": "true", "exit-timeout-secs": "5", "allow-gpu-metrics": "false",
        "http-restricted-api": ADMIN, "grpc-restricted-protocol": ADMIN, "grpc-address": "127.0.0.1", "grpc-port": "1",
        "http-address": "127.0.0.1", "http-port": "2", "metrics-address": "127.0.0.1", "metrics-port": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "opened"),
    [
        ({"reload": True}, {"model-control-mode": "explicit", "load-model": "*", "strict-readiness": "false"}),
        ({"host": "0.0.0.0"}, {"grpc-address": "0.0.0.0", "http-address": "0.0.0.0"}),
        ({"exposed": True}, {"http-restricted-api": EXPOSED, "grpc-restricted-protocol": EXPOSED}),
        ({"gpu_metrics": True}, {"allow-gpu-metrics": "true"}),
        ({"log_verbose": 2, "exit_seconds": 9}, {"log-verbose": "2", "exit-timeout-secs": "9"}),
        ({"backends": "/b"}, {"backend-directory": "/b"}),
        ({"memory_prefix": "mine"}, {"backend-config": "python,shm-region-prefix-name=mine"}),
    ],
)
def test_each_setting_opens_what_it_names_alone(settings, opened):
    assert flags(**settings) == flags() | opened


def test_another_address_is_refused_unless_it_is_meant():
    check_host("127.0.0.1", exposed=False)
    for address in ("0.0.0.0", "192.168.1.4"):
        check_host(address, exposed=True)
        with pytest.raises(ConfigError, match=rf"host {address} .*neither a login nor TLS.*--expose-without-login"):
            check_host(address, exposed=False)
    for address in ("", "localhost", "::1", "127.0.0.1:8000", "here"):
        with pytest.raises(ConfigError, match="is no IPv4 address"):
            check_host(address, exposed=True)


def test_ports_that_cannot_be_used_are_named_with_their_flags():
    free = settled_ports({"grpc": 0, "http": 0, "metrics": 0})
    assert settled_ports(free) == free and len(set(free.values())) == 3
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        said = rf"port {taken} cannot be used \(Address already in use\); choose another with --grpc-port"
        with pytest.raises(ServerError, match=rf"{said}.*port 70000 cannot be used"):
            settled_ports({"grpc": taken, "http": 70000, "metrics": 0})
    with pytest.raises(ServerError, match="choose another with --http-port"):
        settled_ports({"grpc": free["grpc"], "http": free["grpc"], "metrics": 0})
