"""What every command shares: --version and --debug, one line for an error, exit codes.

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rekd_train.errors import RekdError
from rekd_train.files import AGAIN

OK, FAILED, USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

# recent typer carries its own copy of click; this is the root of usage errors in either
_ClickError = typer.BadParameter.__base__.__base__


def _trust(context: typer.Context, value: bool) -> None:
    from rekd_train.config.sections import trusted_code

    context.with_resource(trusted_code(value))


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run code outside of REKD that is named as a family, package.module:Class.",
        callback=_trust, expose_value=False,
    ),
]  # fmt: skip
"""The option of every command that builds or loads networks, which it reaches by ``rekd_train.config.sections``."""


def application(help: str, **typer_kwargs: Any) -> typer.Typer:
    """A typer application in the style of all commands; ``run`` adds ``--version`` and ``--debug``.

    With a single command, ``help`` and ``epilog`` given here are that command's unless it has its own.
    """
    settings: dict[str, Any] = {
        "add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False,
        "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
    }
    return typer.Typer(help=help, **{**settings, **typer_kwargs})


def examples(*lines: str) -> str:
    """Text for ``epilog``: the examples one a line, not re-wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run what ``application`` made, on ``sys.argv`` unless ``arguments`` are given, and exit with a code above."""
    with suppress(AttributeError):  # reviews hold emoji; a terminal that cannot show one gets '?', not a traceback
        sys.stdout.reconfigure(errors="replace")
    debug: list[bool] = []
    command = _click_command(app, debug)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with command.make_context(_program_name(), arguments) as context:
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
    except BrokenPipeError as error:
        code = _broken_pipe(error, debug)
    except Exception as error:
        code = _complain(_explained(error), debug)
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

    def remember(value: bool) -> None:
        if value:
            debug.append(True)

    def flag(name: str, help: str, callback: Callable[[bool], None]):
        return typer.Option(False, name, help=help, callback=callback, is_eager=True, expose_value=False)

    @carrier.command()
    def carry(
        version: bool = flag("--version", "Show the version and exit.", show_version),
        debug: bool = flag("--debug", "Show the traceback of an error.", remember),
    ) -> None: ...

    return typer.main.get_command(carrier).params[:2]


def _complain(message: str, debug: list[bool]) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(message.rstrip() + "\n")
    return FAILED


def _explained(error: Exception) -> str:
    """The line of a failure: what we raise on purpose, and what the user can mend; anything else is ours to mend."""
    if isinstance(error, RekdError):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):  # a library that was not installed, or was removed
        package = (error.name or "").partition(".")[0]
        if package not in ("", "rekd_train", "rekd_deploy"):
            fix = f"fix: pip install {package}, or install REKD again"
            return f"error: the Python package '{package}' is not installed; {fix}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.strerror and (full or error.filename is not None):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"error: {place}{error.strerror}" + (f"; fix: {AGAIN}" if full else "")
    return f"internal error: {type(error).__name__}: {' '.join(str(error).split())} (run again with --debug)"


def _broken_pipe(error: BrokenPipeError, debug: list[bool]) -> int:
    if not _reader_gone():  # some other pipe or socket broke, which is worth a word
        return _complain(_explained(error), debug)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
    return READER_GONE


def _reader_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _program_name() -> str:
    specification = getattr(sys.modules.get("__main__"), "__spec__", None)
    if specification is not None:  # started by python -m
        return f"python -m {specification.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def finite(value: Any) -> Any:
    """The document with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value
