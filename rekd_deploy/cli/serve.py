"""rekd-serve: a model repository -> a running Triton server, until Ctrl-C; and what a running one says of itself."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rekd_train.cli.command import application, examples, print_json, run

_REPOSITORY = Path("model_repository/python")
_EXPOSE = "--expose-without-login-or-tls"

app = application(
    help="Serve a model repository with Triton, on this machine only, until Ctrl-C.\n\n"
    "The server is that of the wheel nvidia-pytriton, an old one for your own machine, or an installed one. With "
    "--status, show the state of a running server.",
    epilog=examples(
        "rekd-serve",
        "rekd-serve /srv/models --grpc-port 9001 --restart on-failure",
        "rekd-serve /srv/models --reload                            # and rekd-export CKPT --output /srv/models",
        "rekd-serve --beside five=models-5 --http 8080              # two budgets to choose from on the page",
        "rekd-serve /srv/models --tritonserver /opt/tritonserver",
        "rekd-serve --grpc-port 0 --http-port 0 --metrics-port 0    # any free ports",
        "rekd-serve --http 8080                                     # plain JSON and a page before it",
        "rekd-serve --http 8080 --url localhost:8001                # the same before a Triton that runs already",
        "rekd-serve --status                                        # of the running server",
        "rekd-serve --status http://localhost:8000 --json",
    ),
)


@app.command()
def serve(
    repository: Annotated[str | None, typer.Argument(
        metavar="REPO|URL",
        help="Model repository written by rekd-export; with --status, the address of a server.",
        show_default=str(_REPOSITORY)
    )] = None,
    status: Annotated[bool, typer.Option("--status", help="Show a running server's state; exit 1: not ready.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The status as one JSON document.")] = False,
    ca: Annotated[Path | None, typer.Option(
        "--ca", metavar="FILE", help="Root certificates (PEM) for the status of grpcs:// or https://."
    )] = None,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus port; 0: a free one.")] = 8002,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="IPv4 address for gRPC and HTTP.")] = "127.0.0.1",
    exposed: Annotated[bool, typer.Option(
        _EXPOSE,
        help="Allow an address that other machines reach: whoever reaches it may use the model and overload it, "
        "and read what others send over HTTP."
    )] = False,
    http: Annotated[int | None, typer.Option(
        min=0, max=65535, metavar="PORT", show_default=False,
        help="Answer plain JSON there, with a page to try it; 0: a free port. Requests must carry the key in "
        "REKD_API_KEY, if it is set."
    )] = None,
    http_host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="IPv4 address for --http; another one takes REKD_API_KEY.")
    ] = "127.0.0.1",
    url: Annotated[str | None, typer.Option(
        metavar="URL", help="With --http: a Triton server that runs already; none is started.", show_default=False
    )] = None,
    limit: Annotated[list[str] | None, typer.Option(
        metavar="NAME=VALUE", show_default=False,
        help="With --http, repeated: most bytes, texts, characters, images, pixels and seconds of a request, and "
        "requests at once."
    )] = None,
    beside: Annotated[list[str] | None, typer.Option(
        metavar="[NAME=]REPO", show_default=False,
        help="Another export, repeated, such as one with another budget: its single graph answers as rekd_NAME. With "
        "--url: only the NAME, of one that is served there."
    )] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Serve a new export as soon as it is published, without a failed request.")
    ] = False,
    restart: Annotated[Literal["no", "on-failure"], typer.Option(
        help="Whether a server that died is started again, on the same ports."
    )] = "no",
    restart_limit: Annotated[int, typer.Option(min=1, help="Deaths in a row after which it stays down.")] = 5,
    tritonserver: Annotated[Path | None, typer.Option(
        metavar="PATH", help="An installed server: tritonserver, or the folder with bin/tritonserver."
    )] = None,
    verbose: Annotated[
        int, typer.Option(min=0, metavar="LEVEL", help="Triton's verbosity; 1: every request, with its id.")
    ] = 0,
    log: Annotated[Path | None, typer.Option(
        help="Log file of the server.", show_default="in the user's cache folder", metavar="FILE"
    )] = None,
) -> None:
    if status:
        raise typer.Exit(_show_status(repository, ca, json))
    if ca is not None or json:
        raise typer.BadParameter("--ca and --json are for a server's status; add --status")
    if http is None and (url is not None or limit):
        raise typer.BadParameter("--url and --limit are for the plain HTTP front; add --http PORT")
    if url is not None and repository is not None:
        raise typer.BadParameter("--url names a server that runs, REPO one to start; give one of them")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    front = None
    if http is not None:
        from rekd_deploy.http.front import Front
        from rekd_deploy.http.limits import Limits

        limits = Limits.of_environment(os.environ).with_values(limit or [])
        front = Front(http, http_host, exposed=exposed, limits=limits, environment=os.environ)
    from rekd_deploy.server.beside import all_beside, models_beside

    with front or nullcontext():
        try:
            if front is not None and url is not None:
                standing = models_beside(beside or [])
                front.start(url, standing)
                lines = "".join(f"beside   {model}\n" for model in standing)
                print(f"before   {url}\n{lines}{_front_address(front)}stop     Ctrl-C", flush=True)
                front.wait()
            else:
                from rekd_deploy.server.program import find_installed
                from rekd_deploy.server.server import TritonServer
                from rekd_deploy.server.service import Service

                server = TritonServer(
                    repository or _REPOSITORY, grpc_port, http_port, metrics_port, host, log,
                    program=None if tritonserver is None else find_installed(tritonserver),
                    exposed=exposed, reload=reload, log_verbose=verbose, beside=all_beside(beside or []),
                )  # fmt: skip
                service = Service(server, restart_limit if restart == "on-failure" else 0, _report)
                service.run(ready=lambda: _announce(server, front))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("stopped", file=sys.stderr)


def _announce(server: Any, front: Any) -> None:
    if front is not None:
        front.start(server.grpc_url, [each.model for each in server.beside])
    beside = "".join(f"beside   {each.repository} as {each.model}\n" for each in server.beside)
    print(
        f"serving  {server.repository}\n{beside}gRPC     {server.grpc_url}\nHTTP     {server.http_url}\n"
        f"metrics  {server.metrics_url}\nlog      {server.log_file}\n{_front_address(front)}"
        f'query    rekd-query --url {server.grpc_url} "..."\n'
        "stop     Ctrl-C",
        flush=True,
    )


def _front_address(front: Any) -> str:
    return "" if front is None else f"page     {front.url}/\nJSON     {front.url}/v1/predict\n"


def _show_status(url: str | None, ca: Path | None, json: bool) -> int:
    """Print the status; returns the exit code."""
    from rich.console import Console

    from rekd_deploy.client.connection import TlsSettings
    from rekd_deploy.server.status import read_status, running_states, status_table

    found = read_status(url, running_states(), tls=TlsSettings(ca) if ca else None)
    if json:
        print_json(found.to_dict())
    else:
        console = Console(highlight=False)
        console.print(*found.lines(), "", sep="\n", soft_wrap=True)  # addresses and paths stay whole
        console.print(status_table(found))
    return 0 if found.ready else 1


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
