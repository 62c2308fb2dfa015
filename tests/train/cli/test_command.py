"""Exit codes, one-line errors and the shared options."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rekd_train import InputError, __version__
from rekd_train.cli.command import application, examples, print_json, run

ROOT = Path(__file__).resolve().parents[3]


def single() -> typer.Typer:
    app = application(help="Ask something.", epilog=examples("ask good", "ask --count 2 bad"))

    @app.command()
    def ask(text: str, count: int = 1) -> None:
        if text == "bad":
            raise InputError("text 0 is bad; give a good one")
        if text == "bug":
            raise ZeroDivisionError("two\nlines")
        if text == "interrupt":
            raise KeyboardInterrupt
        if text == "missing":
            Path("/nonexistent/file").read_text()
        if text == "socket":
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        if text == "module":
            import a_library_that_is_not_there.part  # noqa: F401
        if text == "three":
            raise typer.Exit(3)
        sys.stdout.write(text * count + "\n")

    return app


def group() -> typer.Typer:
    app = application(help="Several commands.")

    @app.command(epilog=examples("many first"))
    def first() -> None:
        raise InputError("first failed")

    @app.command()
    def second() -> None:
        """The second."""

    return app


def outcome(capsys, app: typer.Typer, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_request:
        run(app, arguments)
    return exit_request.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("good", 0, "good\n", ""),
        ("bad", 1, "", "error: text 0 is bad; give a good one\n"),
        ("bug", 1, "", "internal error: ZeroDivisionError: two lines (run again with --debug)\n"),
        ("missing", 1, "", "error: /nonexistent/file: No such file or directory\n"),
        ("module", 1, "", "error: the Python package 'a_library_that_is_not_there' is not installed; fix: pip install "
                          "a_library_that_is_not_there, or install REKD again\n"),
        ("socket", 1, "", "internal error: BrokenPipeError: [Errno 32] Broken pipe (run again with --debug)\n"),
        ("interrupt", 130, "", "interrupted\n"),
        ("three", 3, "", ""),
        ("--version", 0, f"rekd {__version__}\n", ""),
    ],
)  # fmt: skip
def test_an_end_is_a_code_and_one_line(capsys, argument, code, out, err):
    assert outcome(capsys, single(), argument) == (code, out, err)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(single, ["bug", "--debug"]), (single, ["--debug", "bug"]), (group, ["first", "--debug"]),
     (group, ["--debug", "first"])],
)  # fmt: skip
def test_debug_shows_the_traceback_wherever_it_stands(capsys, make, arguments):
    code, _, err = outcome(capsys, make(), *arguments)
    assert code == 1 and err.startswith("Traceback")
    assert err.endswith("(run again with --debug)\n" if make is single else "error: first failed\n")


def test_debug_after_double_dash_is_an_argument(capsys):
    assert outcome(capsys, single(), "--", "--debug") == (0, "--debug\n", "")


@pytest.mark.parametrize("arguments", [[], ["--nope", "good"], ["good", "--count", "x"], ["a", "b"]])
def test_usage_errors_are_2(capsys, arguments):
    code, out, err = outcome(capsys, single(), *arguments)
    assert (code, out) == (2, "") and "Usage:" in err and "Traceback" not in err
    code, _, err = outcome(capsys, group(), "frist")
    assert code == 2 and "'first'" in err


def test_every_subcommand_has_the_version(capsys):
    assert outcome(capsys, group(), "second", "--version") == (0, f"rekd {__version__}\n", "")


@pytest.mark.parametrize(
    ("make", "arguments", "shown"),
    [(single, ["--help"], ["Ask something.", "    ask good\n    ask --count 2 bad", "--version", "--debug"]),
     (group, ["first", "-h"], ["  many first", "--debug"])],
)  # fmt: skip
def test_help_shows_text_examples_and_shared_options(capsys, make, arguments, shown):
    code, out, _ = outcome(capsys, make(), *arguments)
    assert code == 0 and all(part in out for part in shown), "examples must not be re-wrapped"


_SCRIPT = """
import sys
from rekd_train.cli.command import application, run
app = application(help="x")
@app.command()
def talk() -> None:
    for _ in range(100_000):
        sys.stdout.write({text!r} + "\\n")
run(app)
"""


def test_a_reader_that_leaves_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(text="line")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141


def test_a_narrow_terminal_gets_question_marks_not_a_crash():
    script = _SCRIPT.format(text="\U0001f3ac film").replace("100_000", "1")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"? film\n", b"")


def test_json_has_no_nan_and_keeps_characters(capsys):
    print_json({"accuracy": float("nan"), "rates": (0.5, float("inf")), "word": "café"})
    out = capsys.readouterr().out
    assert "café" in out
    assert json.loads(out) == {"accuracy": None, "rates": [0.5, None], "word": "café"}
