"""What is chosen about a server in production: one set of settings, from which every file is rendered."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rekd_train.config.files import read_document
from rekd_train.config.run import explain
from rekd_train.config.section import Section
from rekd_train.errors import ConfigError

OLDEST_RELEASE = (26, 5)
"""Of Triton's container images, year and month: older ones lack security fixes."""
DRAIN_SECONDS = 15
"""How long the proxy may take to finish what is under way, before the server is told to end."""
UNPUBLISH_SECONDS = 5
"""How long a cluster may take to send nothing more to a pod that is going away."""

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$")]
"""A name that every kind of object in a cluster may have."""
HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
"""A port that needs no privilege."""


class ProductionSettings(Section):
    """Where the repository lies, what the server may use, where it listens, when it grows."""

    image: str | None = Field(None, description="Triton's image with its tag; compose takes it from TRITON_IMAGE")
    proxy_image: str = Field("nginx:1.28", description="nginx, which ends TLS")
    prometheus_image: str = Field("prom/prometheus:v3.5.0", description="compose, profile monitoring")
    grafana_image: str = Field("grafana/grafana:12.1.0", description="compose, profile monitoring")

    name: Name = Field("rekd", description="of everything that is made")
    namespace: Name = Field("rekd", description="of the cluster")
    flavour: Literal["python", "onnxruntime", "tensorrt"] = Field(
        "onnxruntime", description="rekd-export's --target of the repository"
    )
    repository: str = Field("/models/rekd", description="path of the repository as the server sees it")
    models_claim: Name = Field("rekd-models", description="volume claim with the folder above the repository")

    cpus: float = Field(4, gt=0, description="of each server, in cores")
    memory_gib: float = Field(8, gt=0, description="of each server")
    shared_memory_mib: int = Field(512, ge=64, description="for the tensors of the python backend")
    gpus: int = Field(0, ge=0, description="of each server")
    user: int = Field(1000, ge=1, description="user and group that everything runs as; 1000 is triton-server")

    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    tls_port: Port = Field(8443, description="where the proxy listens, for HTTP and gRPC alike")
    published_port: int = Field(443, ge=1, le=65535, description="port that clients see")
    hostname: HostName = Field("rekd.example.org", description="on the certificate")
    tls_secret: Name = Field("rekd-tls", description="secret of type kubernetes.io/tls")
    key_secret: Name = Field("rekd-admin", description="secret whose entry 'key' opens the restricted interfaces")
    subnet: str = Field("172.31.251.0/28", description="compose: of the network that only the containers see")
    max_request_mib: int = Field(64, ge=1, description="largest request that the proxy takes")
    request_seconds: int = Field(60, ge=1, description="how long an answer may take")

    min_replicas: int = Field(2, ge=1)
    max_replicas: int = Field(10, ge=1)
    queue_target_ms: float = Field(20, gt=0, description="mean wait of a request above which replicas are added")
    prometheus_url: str = Field("http://prometheus-operated.monitoring.svc:9090", pattern=r"^https?://\S+$")
    monitoring_namespace: Name = Field("monitoring", description="where Prometheus runs")
    gateway_namespace: Name = Field("envoy-gateway-system", description="where KServe's gateway runs")

    @field_validator("image")
    @classmethod
    def _recent(cls, image: str | None) -> str | None:
        return image if image is None else check_image(image)

    @field_validator("repository")
    @classmethod
    def _below_a_folder(cls, path: str) -> str:
        if not re.fullmatch(r"/[\w.-]+(/[\w.-]+)+", path) or ".." in path:
            raise ValueError(
                "must be an absolute path with a folder above the repository, like /models/rekd: that folder is "
                "mounted, so that a new export is seen"
            )
        return path

    @field_validator("subnet")
    @classmethod
    def _room_for_four(cls, subnet: str) -> str:
        if ipaddress.IPv4Network(subnet).num_addresses < 8:
            raise ValueError("must have room for four containers: a /29 or larger")
        return subnet

    @model_validator(mode="after")
    def _fits_together(self) -> ProductionSettings:
        mistakes = []
        if self.max_replicas < self.min_replicas:
            mistakes.append(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.flavour == "tensorrt" and not self.gpus:
            mistakes.append("flavour tensorrt runs on GPUs; set gpus to at least 1")
        ports = {name: getattr(self, name) for name in ("http_port", "grpc_port", "metrics_port", "tls_port")}
        if len(set(ports.values())) < len(ports):
            mistakes.append(f"{', '.join(f'{name} {port}' for name, port in ports.items())} must differ")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def models_folder(self) -> str:
        """The folder above the repository, as the server sees it."""
        return self.repository.rpartition("/")[0]

    @property
    def server_address(self) -> str:
        """Of the server in compose's closed network: fixed, as nginx resolves names only when it starts."""
        return str(ipaddress.IPv4Network(self.subnet)[2])

    def required_image(self) -> str:
        """Triton's image.

        Raises:
            ConfigError: none was given.
        """
        if self.image is None:
            raise ConfigError(
                f"a cluster needs to know Triton's image; give --image or TRITON_IMAGE, release {_oldest()} or later"
            )
        return self.image


def check_image(image: str) -> str:
    """The image, if its tag begins with a release of Triton that is new enough.

    Raises:
        ValueError: no such tag, or an old one.
    """
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    release = re.match(r"(\d{2})\.(\d{2})(?!\d)", tag)
    if release is None:
        raise ValueError(
            f"its tag must begin with Triton's release, like {_oldest()}-py3, also for an image built on top of it"
        )
    if tuple(map(int, release.groups())) < OLDEST_RELEASE:
        raise ValueError(f"release {release.group()} lacks security fixes; take {_oldest()} or later")
    return image


def read_settings(path: Path | None, **given: object) -> ProductionSettings:
    """Settings from a TOML file, or the defaults.

    Args:
        path: the file; None: all defaults.
        given: what wins over the file, by name; None: the file's word stands.

    Raises:
        ConfigError: with every mistake in one message.
    """
    document = {} if path is None else read_document(path.with_suffix(path.suffix or ".toml"))
    document |= {name: value for name, value in given.items() if value is not None}
    try:
        return ProductionSettings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path or 'settings'}: " + "; ".join(explain(error, ProductionSettings))) from None


def _oldest() -> str:
    year, month = OLDEST_RELEASE
    return f"{year}.{month:02d}"
