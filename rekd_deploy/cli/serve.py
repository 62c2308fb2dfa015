"""rekd-serve: a model repository -> a running Triton server, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from rekd_train.command import application, examples, run

_REPOSITORY = Path("model_repository/python")

app = application(
    help="Serve a model repository with the Triton server of the wheel nvidia-pytriton, on this machine only.\n\n"
    "Stops on Ctrl-C. For production, give the repository to a current Triton container instead.",
    epilog=examples(
        "rekd-serve",
        "rekd-serve /srv/models --grpc-port 9001",
        "rekd-serve --grpc-port 0 --http-port 0 --metrics-port 0    # any free ports",
    ),
)


@app.command()
def serve(
    repository: Annotated[
        Path, typer.Argument(metavar="REPO", help="Model repository written by rekd-export.")
    ] = _REPOSITORY,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus port; 0: a free one.")] = 8002,
    log: Annotated[
        Path | None,
        typer.Option(help="Log file of the server.", show_default="in the user's cache folder", metavar="FILE"),
    ] = None,
) -> None:
    from rekd_deploy.server import TritonServer

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _interrupt)
    server = TritonServer(repository, grpc_port, http_port, metrics_port, log_file=log)
    try:
        with server:
            for line in _urls(server):
                print(line, flush=True)
            while True:
                server.check_alive()
                time.sleep(0.2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopped", file=sys.stderr)


def _urls(server) -> list[str]:
    return [
        f"serving  {server.repository}",
        f"gRPC     {server.grpc_url}",
        f"HTTP     {server.http_url}",
        f"metrics  {server.metrics_url}",
        f"log      {server.log_file}",
        f'ask      rekd-query --url {server.grpc_url} "..."',
        "stop     Ctrl-C",
    ]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
