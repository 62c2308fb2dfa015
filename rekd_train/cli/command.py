"""What commands share: --version and --debug, one line for an error, exit codes; progress, tables, JSON.

    0    done
    1    the request could not be done: one line on stderr, with --debug the traceback before it
    2    usage: unknown option, missing argument
    130  interrupted by Ctrl-C
    141  whatever read our output is gone (``| head``): no message

Light on purpose: ``--help`` of every command passes through here, and must not load torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rekd_train.errors import RekdError, missing_extra
from rekd_train.files import AGAIN

OK, FAILED, USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

# recent typer carries its own copy of click; this is the root of usage errors in either
_ClickError = typer.BadParameter.__base__.__base__


def _trust(context: typer.Context, value: bool) -> None:
    from rekd_train.config.sections import trusted_code

    context.with_resource(trusted_code(value))


TrustCode = Annotated[bool, typer.Option(
    "--trust-code", help="Run code outside of REKD that is named as a family, package.module:Class.",
    callback=_trust, expose_value=False,
)]  # fmt: skip
"""The option of every command that builds or loads networks, which it reaches by ``rekd_train.config.sections``."""


def application(help: str, **typer_kwargs: Any) -> typer.Typer:
    """A typer application in the style of all commands; ``run`` adds ``--version`` and ``--debug``.

    With a single command, ``help`` and ``epilog`` given here are that command's unless it has its own.
    """
    context = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    settings = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
    return typer.Typer(help=help, **{**settings, "context_settings": context, **typer_kwargs})


def examples(*lines: str) -> str:
    """Text for ``epilog``: the examples one a line, not re-wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def run(app: typer.Typer, arguments: Sequence[str] | None = None, extra: str = "") -> NoReturn:
    """Run what ``application`` made, on ``sys.argv`` unless ``arguments`` are given, and exit with a code above.

    ``extra``: of the installation, what most of it needs.
    """
    with suppress(AttributeError):  # reviews hold emoji; a terminal that cannot show one gets '?', not a traceback
        sys.stdout.reconfigure(errors="replace")
    debug: list[bool] = []
    command = _click_command(app, debug)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module = getattr(sys.modules.get("__main__"), "__spec__", None)  # where it was started by python -m
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    try:
        with command.make_context(name, arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
        code = OK
    except typer.Exit as request:
        code = request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", debug)
        code = INTERRUPTED
    except _ClickError as error:
        error.show()
        code = error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():  # not some other pipe or socket
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
            code = READER_GONE
        else:
            code = _complain(_explained(error, extra), debug)
    sys.exit(code)


def print_json(document: Any) -> None:
    """Write one JSON document to stdout; NaN and infinity, which JSON lacks, become null."""
    plain_ascii = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(finite(document), indent=2, ensure_ascii=plain_ascii, allow_nan=False)
    sys.stdout.write(text + "\n")


def _click_command(app: typer.Typer, debug: list[bool]):
    """The click command behind ``app``, with the shared options; ``debug`` is filled when --debug is given."""
    command = typer.main.get_command(app)
    version_option, debug_option = _shared_options(debug)
    if not _subcommands(command):  # typer forgets what was said about an application with one command
        command.help = command.help or app.info.help
        command.epilog = command.epilog or (app.info.epilog if isinstance(app.info.epilog, str) else None)
        command.context_settings = {**app.info.context_settings, **command.context_settings}
    pending = [command]
    while pending:
        each = pending.pop()
        each.params += [version_option, debug_option]
        pending += _subcommands(each)
    return command


def _subcommands(command) -> list:
    return list(getattr(command, "commands", {}).values())


def _shared_options(debug: list[bool]) -> list:
    carrier = typer.Typer(add_completion=False)

    def show_version(value: bool) -> None:
        if value:
            from rekd_train import __version__

            sys.stdout.write(f"rekd {__version__}\n")
            raise typer.Exit()

    def flag(name: str, help: str, callback: Callable[[bool], None]):
        return typer.Option(False, name, help=help, callback=callback, is_eager=True, expose_value=False)

    @carrier.command()
    def carry(
        version: bool = flag("--version", "Show the version and exit.", show_version),
        debug: bool = flag("--debug", "Show the traceback of an error.", lambda value: value and debug.append(True)),
    ) -> None: ...

    return typer.main.get_command(carrier).params[:2]


def _complain(message: str, debug: list[bool]) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(message.rstrip() + "\n")
    return FAILED


def _explained(error: Exception, extra: str) -> str:
    """The line of a failure: what we raise on purpose, and what the user can mend; anything else is ours to mend."""
    if isinstance(error, RekdError):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):  # a library that was not installed, or was removed
        package = (error.name or "").partition(".")[0]
        if (missing := missing_extra(package, extra)) is not None:
            return f"error: {missing}"
        if package not in ("", "rekd_train", "rekd_deploy"):
            return (f"error: the Python package '{package}' is not installed; fix: pip install {package}, or install "
                    "REKD again")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.strerror and (full or error.filename is not None):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"error: {place}{error.strerror}" + (f"; fix: {AGAIN}" if full else "")
    return f"internal error: {type(error).__name__}: {' '.join(str(error).split())} (run again with --debug)"


def _reader_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def finite(value: Any) -> Any:
    """The document with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, framed: bool = True,
                console=None) -> None:
    """A table on stdout or another console; all columns but the first ``left`` hold figures, flush right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table() if framed else Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)


@contextmanager
def progress_bars():
    """An observer that shows one bar a stage on stderr; None in processes but the first of several."""
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress) -> None:
        self._progress, self._task, self._shown, self._summary = progress, None, {}, {}

    def data(self, summary: dict[str, Any]) -> None:
        if summary == self._summary:  # several runs on the same data, as the demo's
            return
        self._summary = summary
        from rekd_train.data.examples import summary_notes, summary_rows

        print_table(("data", *summary["splits"]), summary_rows(summary), framed=False, console=self._progress.console)
        for note in summary_notes(summary):
            self._progress.console.print(note, markup=False, highlight=False)

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._shown = {}
        self._task = self._progress.add_task(name, total=steps, completed=start, shown="")

    def step(self, values: dict[str, float]) -> None:
        self._shown |= {key: values[key] for key in ("loss", "selection_rate") if key in values}
        self._progress.update(self._task, advance=1, shown=self._text())

    def evaluated(self, values: dict[str, float]) -> None:
        self._shown["dev"] = values["accuracy"]
        self._progress.update(self._task, shown=self._text())

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)

    def _text(self) -> str:
        return "  ".join(f"{key} {value:.4f}" for key, value in self._shown.items())
