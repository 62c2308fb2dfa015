"""Settings of a deployment: what is refused, and with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekd_deploy.cli.deploy import app
from rekd_deploy.production.rendering import render
from rekd_deploy.production.settings import ProductionSettings, read_settings
from rekd_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "image",
    [
        "tritonserver:26.05-py3",
        "registry.example.org:5000/team/rekd-triton:26.10-2",
        "tritonserver:27.01-py3@sha256:" + "0" * 64,
    ],
)
def test_a_recent_image_is_taken(image):
    assert read_settings(None, image=image).required_image() == image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("tritonserver:26.04-py3", "release 26.04 lacks security fixes; take 26.05 or later"),
        ("tritonserver:24.10-py3", "lacks security fixes"),
        ("tritonserver", "must begin with Triton's release, like 26.05-py3"),
        ("tritonserver:latest", "must begin with Triton's release"),
        ("registry.example.org:2605/tritonserver", "must begin with Triton's release"),
        ("tritonserver:26.051", "must begin with Triton's release"),
        ("tritonserver@sha256:2605", "must begin with Triton's release"),
    ],
)
def test_an_old_or_nameless_image_is_refused(image, reason):
    with pytest.raises(ConfigError, match=reason):
        read_settings(None, image=image)


def test_a_cluster_needs_an_image():
    with pytest.raises(ConfigError, match="give --image or TRITON_IMAGE, release 26.05 or later"):
        render(ProductionSettings())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"flavour": "tensorrt"}, "set gpus to at least 1"),
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas 4 is below min_replicas 5"),
        ({"grpc_port": 8000}, "must differ"),
        ({"tls_port": 443}, "greater than or equal to 1024"),
        ({"repository": "/models"}, "like /models/rekd"),
        ({"repository": "/models/../etc/rekd"}, "like /models/rekd"),
        ({"repository": "/models/a b"}, "like /models/rekd"),
        ({"name": "Rekd"}, "name"),
        ({"hostname": "rekd.example.org; return 200"}, "hostname"),
        ({"subnet": "10.0.0.0/30"}, "a /29 or larger"),
        ({"prometheus_url": "prometheus:9090"}, "prometheus_url"),
        ({"replicas": 3}, "replicas: unknown key"),
    ],
)
def test_mistakes_are_named(given, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        read_settings(None, **given)


def test_all_mistakes_come_in_one_message(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('gpus = -1\nnamespace = "A"\nimage = "tritonserver:25.01"\n')
    with pytest.raises(ConfigError) as refusal:
        read_settings(file)
    assert all(name in str(refusal.value) for name in ("settings.toml", "gpus", "namespace", "25.01"))


def test_command_writes_beside_the_settings_and_leaves_other_files(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_IMAGE", raising=False)
    (tmp_path / "settings.toml").write_text('name = "reviews"\n')
    (tmp_path / "notes.md").write_text("mine")
    arguments = [str(tmp_path / "settings.toml")]
    assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "settings.toml"]

    done = CliRunner().invoke(app, arguments, env={"TRITON_IMAGE": "tritonserver:26.06-py3"})
    assert done.exit_code == 0
    written = [Path(line) for line in done.output.splitlines()]
    assert all(path.is_file() for path in written)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == set(
        render(ProductionSettings(name="reviews", image="tritonserver:26.06-py3"))
    )
    assert (tmp_path / "notes.md").read_text() == "mine"
    again = CliRunner().invoke(app, [*arguments, "--image", "tritonserver:26.07-py3", "--output", str(tmp_path / "b")])
    assert again.exit_code == 0
    assert "tritonserver:26.07-py3" in (tmp_path / "b" / "kubernetes" / "3-deployment.yaml").read_text()


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    table = re.search(r"\| setting \|.*?\n\n", text, re.DOTALL).group()
    cells = [line.split("|")[1] for line in table.strip().splitlines()]
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == set(ProductionSettings.model_fields)
