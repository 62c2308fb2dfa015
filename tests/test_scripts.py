"""Preflight and environment, with faked interpreters and system tools on a PATH of their own."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partialmethod
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "sh dirname mktemp rm mv tail uname getconf df grep tr sort sed cksum mkdir cat echo touch printf id cp".split()
SCRIPTS = [*(f"scripts/{name}.sh" for name in ("preflight", "environment", "standin", "smallest", "floors")),
           "tests/standin/requirements.txt"]  # fmt: skip
GOOD, GOOD_311, GOOD_313 = (f"cpython|{version}|shared|venv|" for version in ("3.12", "3.11", "3.13"))
SERVER = "nvidia-pytriton==0.7.0"


def done(command: list[str], **options) -> tuple[int, str, list[str]]:
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    return process.returncode, process.stdout.strip(), process.stderr.splitlines()


class Machine:
    """A project folder and a PATH that holds nothing but ordinary tools and what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.project, self.bin, self.log = root / "a project", root / "bin", root / "calls"
        self.offline, self.cut = (Path(f"{self.log}.{name}") for name in ("offline", "cut"))
        self.bin.mkdir(parents=True)
        for name in SCRIPTS:
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.project / name)
        (self.project / "pyproject.toml").write_text(f"[project]\nserve = [\"{SERVER}; python_version < '3.13'\"]\n")
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.tool("uname", 'case "$1" in -s) echo Linux ;; -m) echo x86_64 ;; esac')
        self.tool("getconf", "echo glibc 2.36")
        self.tool("df", 'echo "Filesystem blocks Used Available Capacity Mounted"; echo "/dev/x 1 1 99999999 1% /"')
        self.tool("apt-cache", "exit 1")

    def tool(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def python(self, name: str, facts: str = GOOD) -> str:
        """A fake interpreter: answers the probes, makes environments, notes what it is asked."""
        version = facts.split("|")[1]
        told = f"{facts}{self.bin / name if facts.endswith('|') else ''}"
        without_network = f'[ ! -e "{self.offline}" ] || {{ echo "no route" >&2; exit 1; }}'
        return str(self.tool(name, f"""
            echo "{name} $* [$PYTHONPATH$PYTHONHOME$VIRTUAL_ENV$PYTHONOPTIMIZE]" >>"{self.log}"
            case "$*" in
                *ensurepip*) echo "{told}" ;;
                *base_prefix*) echo "{version in ("3.11", "3.12", "3.13")} /opt/{version}" ;;
                *"sys.exit(sys.version_info < (3, 13))"*) [ {version} = 3.13 ] ;;
                *"print(sys.version_info[:2])"*) echo "{version}" ;;
                *"-m venv"*) for made; do :; done; mkdir -p $made/bin; cp "$0" $made/bin/python 2>/dev/null ;;
                *"-m pip"*--requirement* | *"-m pip"*download*) {without_network} ;;
                *"-m pip"*install*)
                    [ ! -e "{self.cut}" ] || exit 1; echo "$*" >>"$(dirname "$(dirname "$0")")/packages" ;;
            esac
            """))  # fmt: skip

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        environment = {"PATH": str(self.bin), "HOME": str(self.project), **variables}
        return done(["sh", f"scripts/{script}", *arguments], cwd=self.project, env=environment, timeout=120)

    preflight = partialmethod(run, "preflight.sh")

    def environment(self, extras: str = "cpu,serve", **variables: str):
        return self.run("environment.sh", extras, **variables)

    def packages(self) -> str:
        return (self.project / ".venv" / "packages").read_text()

    def calls(self, what: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if what in line]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def ready(machine) -> Machine:
    machine.python("python3.12")
    return machine


def only_line(result, out: str | None = "") -> str:
    code, printed, errors = result
    assert code == 1 and out in (printed, None) and len(errors) == 1, result
    assert errors[0].startswith("error: ") and "; fix: " in errors[0]
    return errors[0]


@pytest.mark.parametrize(("others", "wins"), [
    ({"python3.11": GOOD_311}, ("python3.12", GOOD)),  # the newest
    ({"python3.12": "cpython|3.12||venv|"}, ("python3.11", GOOD_311)),  # not an incomplete one
    ({"python3.12": None}, ("python3.11", GOOD_311)),  # not a shim that cannot run
    ({"python3.13": GOOD_313}, ("python3.11", GOOD_311)),  # for 3.13 the server's wheel takes a step of its own
    ({"python3.12": None}, ("python3.13", GOOD_313)), ({}, ("python3", GOOD_313)),
    ({}, ("python3", GOOD))])  # fmt: skip
def test_the_best_python_wins_and_nothing_is_left_behind(machine, others, wins):
    for name, facts in others.items():
        if facts is None:
            machine.tool(name, 'echo "pyenv: command not found" >&2; exit 127')
        else:
            machine.python(name, facts)
    best, before = machine.python(*wins), sorted(machine.project.rglob("*"))
    for version in ("2.36", "2.41", "3.0"):
        machine.tool("getconf", f"echo glibc {version}")
        assert machine.preflight() == (0, best, [])
    assert sorted(machine.project.rglob("*")) == before
    mine = machine.python("my python", GOOD_311)
    machine.log.unlink(missing_ok=True)
    assert machine.preflight(PYTHON=mine) == (0, mine, []), "the only one considered"
    assert machine.calls("my python -") and not machine.calls(f"{wins[0]} -")


def test_this_very_python_passes():
    """The real probe on the real interpreter, whose facts are known otherwise."""
    code, found, errors = done(["sh", "scripts/preflight.sh"], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable})
    if code:
        assert "GB are free" in errors[0], errors
    else:
        assert done([found, "-V"])[1].split()[1] == sys.version.split()[0]


SYSTEM = 'case "$1" in -s) echo {} ;; -m) echo {} ;; esac'
FULL = 'echo Filesystem; echo "/dev/x 9999999 9999999 3145728 99% /"'


@pytest.mark.parametrize(("tool", "script", "said"), [
    ("python3", "cpython|3.14|shared|venv|", "python3 is Python 3.14"),
    ("python3.13", "cpython|3.13||venv|", "no shared library libpython3.13.so.1.0;install libpython3.13"),
    ("python3", "pypy|3.11|shared|venv|", "python3 is pypy"),
    ("python3.11", "cpython|3.11||venv|", "no shared library libpython3.11.so.1.0;install libpython3.11"),
    ("python3.11", "cpython|3.11|shared||", "cannot make virtual environments;apt-get install python3.11-venv"),
    ("old", "cpython|3.9|shared|venv|", "old is Python 3.9"),
    ("apt-cache", "exit 1", "no Python 3.11, 3.12 or 3.13;python3.12 does not run, python3.11 does not run, python3.13 "
     "does not run, python3 does not run;apt-get install python3.13 libpython3.13 python3.13-venv;PYTHON="),
    ("apt-cache", 'case "$2" in python3.13) ;; python3.11) ;; *) exit 1 ;; esac',  # Debian 12, a newer one beside
     "apt-get install python3.11 libpython3.11 python3.11-venv"),
    ("apt-cache", '[ "$2" = python3.13 ]', "apt-get install python3.13 libpython3.13 python3.13-venv"),
    ("apt-cache", '[ "$2" = python3.12 ]', "apt-get install python3.12 libpython3.12 python3.12-venv"),
    ("uname", SYSTEM.format("Darwin", "arm64"), "Darwin arm64"),
    ("uname", SYSTEM.format("Linux", "aarch64"), "Linux aarch64"),
    ("uname", SYSTEM.format("FreeBSD", "x86_64"), "FreeBSD x86_64"),
    ("getconf", "echo glibc 2.31", "glibc is 2.31"), ("getconf", "echo glibc 1.99", "glibc is 1.99"),
    ("getconf", "exit 1", "glibc is not there (musl?)"), ("mktemp", "exit 1", "a project cannot be written to"),
    ("df", FULL, "3 GB are free;6 GB")])  # fmt: skip
def test_a_python_or_a_machine_that_will_not_do_is_named(machine, tool, script, said):
    if "|" in script and tool != "df":
        machine.python(tool, script)
    else:
        machine.tool(tool, script)
    if "|" not in script and tool != "apt-cache" or tool == "df":
        machine.python("python3.12")
    line = only_line(machine.preflight(**({"PYTHON": tool} if tool == "old" else {})))
    assert all(part in line for part in said.split(";"))
    if tool == "df":  # it matters only while the environment is not there
        (machine.project / ".venv").mkdir()
        (machine.project / ".venv" / "installed").touch()
        assert machine.preflight()[0] == 0


def test_everything_missing_is_named_at_once_and_floors_wants_a_new_folder(machine):
    machine.tool("getconf", "echo glibc 2.31")
    machine.tool("mktemp", "exit 1")
    machine.python("python3.11", "cpython|3.11|||")
    code, out, errors = machine.preflight()
    assert (code, out, len(errors)) == (1, "", 4), errors
    assert all(line.startswith("error: ") and "; fix: " in line for line in errors)
    code, _, errors = machine.run("floors.sh")
    assert code == 2 and errors == ["error: name a folder for the environment; fix: scripts/floors.sh /tmp/floors"]
    (machine.project / "taken").mkdir()
    code, _, errors = machine.run("floors.sh", "taken")
    assert code == 1 and errors == ["error: taken is there already; fix: name another, or rm -r it"]
    assert machine.calls(" -m ") == [], "nothing was made"


def test_it_is_made_once_and_changed_for_more_extras_another_pyproject_folder_or_python(ready):
    code, out, errors = ready.environment("cpu,serve")
    assert (code, errors) == (0, []) and "Making" in out and "extras cpu,serve;" in out
    assert ".[cpu,serve]" in ready.packages()
    ready.log.unlink()
    assert ready.environment("cpu,serve") == (0, "", [])
    assert ready.environment("serve") == (0, "", []), "fewer extras are there already"
    assert ready.calls("-m ") == [], "no pip, no venv"
    code, out, _ = ready.environment("dev,cpu")
    assert code == 0 and "Making" not in out and ".[cpu,dev,serve]" in ready.packages()
    (ready.project / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert "Installing" in ready.environment()[1] and ready.environment()[1] == ""
    ready.project = ready.project.rename(ready.project.with_name("moved"))
    assert "Installing" in ready.environment()[1]
    (ready.project / ".venv" / "bin" / "python").unlink()
    assert "Making" in ready.environment()[1], "one that does not run"
    assert ready.environment(PYTHON="python3.12")[1] == ""
    other = ready.python("python3.11", GOOD_311)
    assert f"with {other}" in ready.environment(PYTHON="python3.11")[1]


@pytest.mark.parametrize(("facts", "extras", "apart"), [
    (GOOD_313, "cpu,serve", True), (GOOD_313, "cpu", False), (GOOD, "cpu,serve", False)])  # fmt: skip
def test_for_the_newest_python_the_server_comes_without_the_numpy_that_it_asks_for(machine, facts, extras, apart):
    machine.python("python3", facts)
    assert machine.environment(extras)[0] == 0
    packages = machine.packages().splitlines()
    assert packages[0].endswith(f".[{extras}]") and len(packages) == 1 + apart
    assert not apart or packages[1].endswith(f"install --quiet --no-deps {SERVER}")
    assert machine.environment(extras) == (0, "", [])


@pytest.mark.parametrize("made", [False, True])
def test_an_interrupted_installation_or_update_starts_again(ready, made):
    if made:
        ready.environment("cpu")
    ready.cut.touch()
    assert ready.environment("cpu,dev")[0] != 0
    assert ready.environment("cpu")[0] != 0, "what was there is not trusted any more"
    (ready.project / ".venv" / "half").touch()
    ready.cut.unlink()
    code, out, _ = ready.environment("cpu")
    assert code == 0 and "Making" in out and not (ready.project / ".venv" / "half").exists()


def test_environments_of_others_stay_and_what_is_missing_is_told_first(machine):
    only_line(machine.environment())
    made = machine.project / ".venv" / "bin" / "python"
    assert not (machine.project / ".venv").exists()
    made.parent.mkdir(parents=True)
    shutil.copy(machine.python("old", "cpython|3.9|shared|venv|"), made)
    assert "rm -r .venv" in only_line(machine.environment(), out=None) and made.exists()
    made.unlink()
    machine.python("python3.12")
    machine.offline.touch()
    assert "pip cannot reach the Python package index (no route); fix: " in only_line(machine.environment(), out=None)
    assert not machine.calls(" install ")
    machine.offline.unlink()
    assert machine.environment()[0] == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "call"), [
    ("test", "-m pytest -n auto --dist loadfile -k policy"), ("demo", "-m rekd_deploy.cli.demo --output runs/demo"),
])  # fmt: skip
def test_make_runs_in_the_environment_whatever_surrounds_it(ready, target, call):
    shutil.copy(ROOT / "Makefile", ready.project)
    make = [shutil.which("make"), "SHELL=" + shutil.which("sh"), target, "ARGS=-k policy"]
    inherited = {"PYTHONPATH": "/evil", "PYTHONHOME": "/evil", "VIRTUAL_ENV": "/evil", "PYTHONOPTIMIZE": "1"}
    code, _, errors = done(make, cwd=ready.project, env={"PATH": str(ready.bin), **inherited})
    assert code == 0, errors
    assert len(ready.calls(call)) == 1
    made = ready.calls("-m venv") + ready.calls("-m pip") + ready.calls(call)
    assert len(made) >= 4 and all(line.endswith("[]") for line in made), "the caller's settings stay outside"
    installed = ready.calls("-m pip")[-1].partition(".[")[2].partition("]")[0].split(",")
    assert {"cpu", "demo", "serve"} <= set(installed)


@pytest.fixture
def beside(ready) -> Machine:
    assert ready.environment()[0] == 0
    ready.tool("gcc", "exit 0")
    ready.log.unlink()
    return ready


def test_the_environment_of_the_gpu_path_is_made_once_and_again_for_other_packages(beside):
    assert beside.run("standin.sh")[0] == 0
    assert beside.calls("-m venv") and beside.calls("--requirement tests/standin/requirements.txt")
    beside.log.unlink()
    assert beside.run("standin.sh") == (0, "", []) and not beside.calls("-m venv") and not beside.calls("-m pip")
    (beside.project / "tests/standin/requirements.txt").write_text("another\n")
    assert beside.run("standin.sh")[0] == 0 and beside.calls("-m venv")


def test_the_smallest_environment_is_of_debians_newest_python_if_it_is_complete(beside):
    newest, made = beside.python("newest", GOOD_313), beside.project / ".venv-base"
    assert beside.run("smallest.sh", REKD_NEWEST=newest)[0] == 0
    assert beside.calls("newest -I -m venv .venv-base")
    packages = (made / "packages").read_text().splitlines()
    assert packages[0].endswith(".[cpu] numpy>=2") and packages[-1].endswith(f"--no-deps {SERVER}")
    assert any("uninstall --yes rekd-rationales" in line for line in packages), "a test brings the wheel"
    beside.log.unlink()
    assert beside.run("smallest.sh", REKD_NEWEST=newest) == (0, "", [])
    assert not beside.calls("-m venv") and not beside.calls("-m pip")
    beside.python("newest", "cpython|3.13||venv|")
    assert beside.run("smallest.sh", REKD_NEWEST=newest)[0] == 0
    assert beside.calls("-I -m venv .venv-base") and not beside.calls("newest -I -m venv"), "that of .venv"
    (made / "installed").unlink()
    beside.cut.touch()
    code, out, errors = beside.run("smallest.sh")
    assert code == 0 and not errors and "are skipped: pip failed" in out and not made.exists()
    only_line(beside.run("smallest.sh", REKD_REQUIRE_ALL="1"), out=None)


@pytest.mark.parametrize("missing", ["gcc", "no route"])
def test_without_compiler_or_network_those_tests_are_skipped_but_not_in_ci(beside, missing):
    (beside.bin / "gcc").unlink() if missing == "gcc" else beside.offline.touch()
    code, out, errors = beside.run("standin.sh")
    assert code == 0 and not errors and "; fix: " in out.splitlines()[-1]
    assert "are skipped: " in out and missing in out
    assert not (beside.project / ".venv-gpu" / "installed").exists()
    only_line(beside.run("standin.sh", REKD_REQUIRE_ALL="1"), out=None)


def test_ci_installs_what_tests_need_and_missing_images_are_told_first(tmp_path):
    script = (ROOT / "scripts" / "preflight_images.sh").read_text(encoding="utf-8")
    assert script.count("/usr/share/datasets/fashion-mnist") == 1
    command = ["sh", "-c", script.replace("/usr/share/datasets/fashion-mnist", str(tmp_path)), "sh"]
    line = only_line(done(command))
    assert "apt-get install dataset-fashion-mnist" in line and "data.path=DIR" in line
    assert done([*command, "--set", "data.path=elsewhere"])[0] == 0
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert done(command)[0] == 1
        (tmp_path / f"{name}-ubyte.gz").touch()
    assert done(command)[::2] == (0, [])
    said = re.compile(r"pytest\.skip\(.*(?:apt-get install|Debian package) ([a-z0-9][a-z0-9 .+-]*)")
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = {name for source in sources for found in said.findall(source) for name in found.split(" is ")[0].split()}
    assert {"nginx-light", "gcc", "libc6-dev", "qemu-user", "dataset-fashion-mnist"} <= names
    installed = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split()
    assert names <= set(installed), "a skip for want of one fails there"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    untested = {"serve", "http", "fuzz", "gpu", "tensorrt", "tensorrt-rtx"}  # they need a server or a driver
    lines = [*project["dependencies"]]
    for extra, wanted in project["optional-dependencies"].items():
        lines += wanted if extra not in untested else []
    floors = [(each.name, part.version) for each in map(Requirement, lines) for part in each.specifier
              if part.operator in (">=", "==")]  # fmt: skip
    recorded = (ROOT / "benchmarks" / "results" / "floors.txt").read_text(encoding="utf-8")
    tested = dict(line.split("==") for line in recorded.splitlines() if not line.startswith("#"))
    for name, floor in floors:
        assert Version(Version(tested[name]).public) == Version(floor), f"{name}; run scripts/floors.sh /tmp/floors"


@pytest.mark.parametrize("required", ["1", "0"])
def test_a_skip_that_hides_a_missing_part_fails_in_ci(tmp_path, required):
    """One that GPU tests make does not: CI has no GPU."""
    cases = [
        f"@pytest.mark.{marker}\n@pytest.mark.skipif(True, reason='not here')\ndef test_mark_{marker}():\n    pass\n"
        f"@pytest.mark.{marker}\ndef test_call_{marker}():\n    pytest.skip('not here')\n"
        for marker in ("triton", "debian", "gpu")]
    (tmp_path / "test_it.py").write_text("import pytest\n" + "".join(cases))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    triton\n    debian\n    gpu\n")
    variables = {"PYTHONPATH": str(ROOT / "tests"), "REKD_REQUIRE_ALL": required, "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider", str(tmp_path)]
    # a skip before the call is an error in pytest's words
    outcome = "2 failed, 2 skipped, 2 errors" if required == "1" else "6 skipped"
    assert outcome in done(command, cwd=tmp_path, env={**os.environ, **variables})[1]
