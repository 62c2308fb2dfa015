"""rekd-deploy: settings -> the files that run a repository in production."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rekd_train.cli.command import application, examples, run

app = application(
    help="Write the files that run a repository in production: for docker compose, for Kubernetes with KEDA, for "
    "KServe, and a Grafana dashboard.\n\n"
    "Everything comes from one set of settings. Files of the same names are replaced, others stay.",
    epilog=examples(
        "rekd-deploy deploy/settings.toml",
        "rekd-deploy deploy/settings.toml --image registry.example.org/tritonserver:26.05-py3 --output /srv/rekd",
    ),
)


@app.command()
def deploy(
    settings: Annotated[
        Path, typer.Argument(metavar="SETTINGS", help="TOML file: docs/production.md lists its keys.")
    ],
    image: Annotated[
        str | None,
        typer.Option(envvar="TRITON_IMAGE", help="Triton's image, in place of the one in SETTINGS.", metavar="IMAGE"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write.", show_default="the folder of SETTINGS", metavar="DIR")
    ] = None,
) -> None:
    from rekd_deploy.production.rendering import render, write
    from rekd_deploy.production.settings import read_settings

    for path in write(render(read_settings(settings, image=image)), output or settings.parent):
        print(path)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
