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


def test_success_is_zero(capsys):
    assert outcome(capsys, single(), "good", "--count", "2") == (0, "goodgood\n", "")


def test_rekd_error_is_one_line_and_code_1(capsys):
    assert outcome(capsys, single(), "bad") == (1, "", "error: text 0 is bad; give a good one\n")


def test_unexpected_error_is_one_line_that_names_debug(capsys):
    expected = "internal error: ZeroDivisionError: two lines (run again with --debug)\n"
    assert outcome(capsys, single(), "bug") == (1, "", expected)


@pytest.mark.parametrize("arguments", [["bug", "--debug"], ["--debug", "bug"]])
def test_debug_shows_the_traceback(capsys, arguments):
    code, _, err = outcome(capsys, single(), *arguments)
    assert code == 1
    assert err.startswith("Traceback") and "ZeroDivisionError" in err


@pytest.mark.parametrize("arguments", [["first", "--debug"], ["--debug", "first"]])
def test_debug_is_understood_before_and_after_a_subcommand(capsys, arguments):
    code, _, err = outcome(capsys, group(), *arguments)
    assert code == 1
    assert err.startswith("Traceback") and err.endswith("error: first failed\n")


def test_debug_after_double_dash_is_an_argument(capsys):
    assert outcome(capsys, single(), "--", "--debug") == (0, "--debug\n", "")


def test_a_file_that_cannot_be_read_is_named(capsys):
    code, _, err = outcome(capsys, single(), "missing")
    assert (code, err) == (1, "error: /nonexistent/file: No such file or directory\n")


def test_a_library_that_is_not_installed_is_named(capsys):
    code, out, err = outcome(capsys, single(), "module")
    assert (code, out) == (1, "")
    assert err.startswith("error: the Python package 'a_library_that_is_not_there' is not installed; fix: pip install")


def test_interrupt_is_130_with_a_short_line(capsys):
    assert outcome(capsys, single(), "interrupt") == (130, "", "interrupted\n")


def test_exit_code_of_a_command_is_kept(capsys):
    assert outcome(capsys, single(), "three")[0] == 3


@pytest.mark.parametrize("arguments", [[], ["--nope", "good"], ["good", "--count", "x"], ["a", "b"]])
def test_usage_errors_are_2(capsys, arguments):
    code, out, err = outcome(capsys, single(), *arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err and "Traceback" not in err


def test_an_unknown_subcommand_is_2(capsys):
    code, _, err = outcome(capsys, group(), "frist")
    assert code == 2
    assert "'first'" in err


@pytest.mark.parametrize("make", [single, group])
def test_version(capsys, make):
    assert outcome(capsys, make(), "--version") == (0, f"rekd {__version__}\n", "")


def test_every_subcommand_has_the_version(capsys):
    assert outcome(capsys, group(), "second", "--version") == (0, f"rekd {__version__}\n", "")


def test_help_shows_text_examples_and_shared_options(capsys):
    code, out, _ = outcome(capsys, single(), "--help")
    assert code == 0
    assert "Ask something." in out
    assert "    ask good\n    ask --count 2 bad" in out, "examples must not be re-wrapped"
    assert "--version" in out and "--debug" in out


def test_help_of_a_subcommand_shows_its_examples(capsys):
    code, out, _ = outcome(capsys, group(), "first", "-h")
    assert code == 0
    assert "  many first" in out and "--debug" in out


def test_a_broken_socket_is_not_mistaken_for_a_closed_reader(capsys):
    code, _, err = outcome(capsys, single(), "socket")
    assert code == 1
    assert "BrokenPipeError" in err


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
