"""Exit codes, one-line errors and the shared options."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rekd_train import InputError, __version__, errors
from rekd_train.cli import main
from rekd_train.cli.command import application, examples, print_json, run
from rekd_train.errors import DISTRIBUTION, MissingExtraError

ROOT = Path(__file__).resolve().parents[3]
VERSION = f"rekd {__version__}\n"
LIBRARY = "a_library_that_is_not_there"
ENDS = {
    "bad": (InputError("text 0 is bad; give a good one"), 1, "error: text 0 is bad; give a good one\n"),
    "bug": (ZeroDivisionError("a\nb"), 1, "internal error: ZeroDivisionError: a b (run again with --debug)\n"),
    "missing": (FileNotFoundError(errno.ENOENT, "No such file", "/no/file"), 1, "error: /no/file: No such file\n"),
    "full": (OSError(errno.ENOSPC, "No space"), 1,
             "error: No space; fix: make room, then run the same command again\n"),
    "module": (ModuleNotFoundError(name=f"{LIBRARY}.part"), 1,
               f"error: the Python package '{LIBRARY}' is not installed; fix: pip install {LIBRARY}, or install REKD "
               "again\n"),
    "socket": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1,
               "internal error: BrokenPipeError: [Errno 32] Broken pipe (run again with --debug)\n"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted\n"), "three": (typer.Exit(3), 3, "")}  # fmt: skip
single = application(help="Ask something.", epilog=examples("ask good", "ask --count 2 bad"))


@single.command()
def ask(text: str, count: int = 1) -> None:
    if text in ENDS:
        raise ENDS[text][0]
    sys.stdout.write(text * count + "\n")


def outcome(capsys, app: typer.Typer, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_request:
        run(app, arguments)
    return exit_request.value.code, *capsys.readouterr()


@pytest.mark.parametrize(("app", "arguments", "expected"), [
    *((single, [word], (code, "", error)) for word, (_, code, error) in ENDS.items()),
    (single, ["good"], (0, "good\n", "")), (single, ["--", "--debug"], (0, "--debug\n", "")),
    (single, ["--version"], (0, VERSION, "")), (main.app, ["presets", "--version"], (0, VERSION, ""))])  # fmt: skip
def test_an_end_is_a_code_and_one_line(capsys, app, arguments, expected):
    assert outcome(capsys, app, *arguments) == expected


def test_usage_errors_are_2_help_shows_examples_and_debug_the_traceback(capsys):
    wrong = ([], ["--nope", "good"], ["good", "--count", "x"], ["a", "b"])
    for app, arguments, part in (*((single, each, "Usage:") for each in wrong), (main.app, ["evalate"], "'evaluate'")):
        code, out, err = outcome(capsys, app, *arguments)
        assert (code, out) == (2, "") and part in err and "Traceback" not in err
    shown = ("Ask something.", "    ask good\n    ask --count 2 bad", "--version", "--debug")
    for option in ("-h", "--help"):
        code, out, _ = outcome(capsys, single, option)
        assert code == 0 and all(part in out for part in shown)
    for app, failing in ((single, ["bug"]), (main.app, ["run", "nonesuch", "-o", "x"])):
        plain = outcome(capsys, app, *failing)
        for arguments in ([*failing, "--debug"], ["--debug", *failing]):
            code, _, err = outcome(capsys, app, *arguments)
            assert code == 1 and err.startswith("Traceback") and err.endswith(plain[2]) and plain[2].count("\n") == 1


TALK = """
import sys
from rekd_train.cli.command import application, run
app = application(help="x")
@app.command()
def talk() -> None:
    for _ in range({}):
        sys.stdout.write("\U0001f3ac film\\n")
run(app)
"""


def talking(lines: int, encoding: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.Popen([sys.executable, "-c", TALK.format(lines)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_a_reader_that_leaves_json_without_nan_long_lists_and_nobody_elses_package(capsys):
    with talking(100_000, "utf-8") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    process = talking(1, "ascii")
    assert (*process.communicate(), process.returncode) == (b"? film\n", b"", 0)
    print_json({"accuracy": float("nan"), "rates": (0.5, float("inf")), "word": "café"})
    out = capsys.readouterr().out
    assert "café" in out
    assert json.loads(out) == {"accuracy": None, "rates": [0.5, None], "word": "café"}
    foreign = "rekd" + "["  # on PyPI a ransomware scanner
    found = subprocess.run(["git", "grep", "-nF", foreign], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""
    assert f'name = "{DISTRIBUTION}"' in (ROOT / "pyproject.toml").read_text()
    assert errors.listed(f"row {n} is empty" for n in (1, 2)) == "row 1 is empty; row 2 is empty"
    assert errors.listed(map(str, range(20))).endswith("18; 19")
    assert errors.listed(map(str, range(1_021))).endswith("18; 19; and 1,001 more")
    assert errors.listed("abc", limit=2) == "a; b; and 1 more"


@pytest.mark.parametrize(("folder", "here", "command"), [
    (ROOT, ROOT, "pip install -e '.[bench]'"),  # in the checkout
    (ROOT, ROOT.parent, f"pip install -e '{ROOT}[bench]'"),
    (ROOT / "docs", ROOT, f"pip install '{DISTRIBUTION}[bench]'"),  # without one
])  # fmt: skip
def test_the_fix_for_a_missing_package_works_where_the_user_stands(folder, here, command, monkeypatch):
    monkeypatch.setattr(errors, "_FOLDER", folder)
    monkeypatch.chdir(here)
    assert str(MissingExtraError("sklearn", "bench")).endswith(f"'sklearn' is not installed; fix: {command}")
