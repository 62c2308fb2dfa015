"""The documents tell the truth about names: paths, commands, make targets, links."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *(ROOT / name for name in ("CONTRIBUTING.md", "deploy/README.md")),
             *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip


def tree_paths() -> list[str]:
    """Paths of the annotated tree in the README, indentation resolved."""
    block = re.search(r"## Where things are.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        paths += ["".join(folders[:depth]) + name for name in names]
        if names[0].endswith("/"):
            folders[depth:] = [names[0]]
    return paths


@pytest.mark.parametrize("path", tree_paths())
def test_the_tree_in_the_readme_is_there(path):
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


def test_every_top_level_folder_with_code_is_in_the_tree():
    tracked = {path.parent.name for path in ROOT.glob("*/*") if path.suffix in {".py", ".sh"}}
    assert {name for name in tracked if not name.startswith(".")} <= {path.rstrip("/") for path in tree_paths()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_code_paths_resolve(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    packages = ("", "rekd_train/", "rekd_deploy/", "docs/", "tests/")
    written = {"config.json", "metrics.json", "policy.json", "tokenizer.json", "examples.jsonl"}  # by a run
    for name in re.findall(r"`([\w/.]+\.(?:py|sh|toml|md))`", text):
        assert name in written or any((ROOT / package / name).exists() for package in packages), name


def test_commands_and_make_targets_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"`(rekd-\w+)", readme)) == set(project["scripts"]) | {project["name"]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([\w-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, document.name


def test_subcommands_in_the_readme_exist():
    from rekd_train.cli.main import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {info.name or info.callback.__name__ for info in app.registered_commands}
    assert set(re.findall(r"`rekd-train ([\w-]+)", readme)) == names


def test_extras_in_the_readme_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = re.search(r"\| extra \|.*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group()
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == set(extras)


def test_every_setting_of_training_is_documented():
    from rekd_train.config.run import RunConfig

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.\w+)`", text))
    sections = ("selection", "temperature", "distillation", "optimisation", "stages", "acceleration")
    fields = {
        f"{name}.{field}" for name in sections for field in RunConfig.model_fields[name].annotation.model_fields
    }
    assert fields <= named, f"missing: {sorted(fields - named)}"
    unknown = {name for name in named if name.split(".")[0] in sections} - fields
    assert not unknown


def test_the_page_of_settings_is_that_of_the_classes():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "scripts" / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python scripts/settings.py"


def test_the_registration_shown_to_families_is_the_real_one():
    shown = re.search(r'^ *"bilstm": Family.*$', (ROOT / "docs" / "adding_a_family.md").read_text(), re.MULTILINE)
    assert shown.group() in (ROOT / "rekd_train" / "models" / "families.py").read_text()
    assert len((ROOT / "rekd_train" / "models" / "bilstm.py").read_text().splitlines()) <= 80


PAGES = ("README.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
MEASURED = re.compile(
    r"(?<![\w.])0?\.\d{3}\b|\d\d?\.\d+ ?%|\d+\.\d+ (?:ms|points|minutes|times)"
)
"""An accuracy with three digits, a share, a difference, a duration, a speed-up."""
SETTINGS = {"2.5 ms", "0.5 points", "0.5 %", "99.5 %", "0.999"}
"""Limits and the paper's settings, which nobody measured."""


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_those_of_the_committed_results(script, name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert script.with_figures(page) == page, "run: python benchmarks/figures.py"


@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/log.md"])
def test_no_figure_stands_outside_of_a_block(script, name):
    """The log is a notebook of trials; everywhere else what was measured comes from a result file."""
    page = script.without_blocks((ROOT / name).read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    assert set(MEASURED.findall(prose)) <= SETTINGS


@pytest.mark.parametrize("name", PAGES)
def test_blocks_begin_and_end_in_turns(name):
    marks = re.findall(r"<!-- figures: (begin|end)", (ROOT / name).read_text(encoding="utf-8"))
    assert marks == ["begin", "end"] * (len(marks) // 2)


def test_every_block_of_figures_is_shown_somewhere(script):
    shown = {name for page in PAGES for name in script.MARK.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert shown == set(script.BLOCKS)


@pytest.mark.parametrize("name", ["demo", "demo_images"])
def test_results_shown_side_by_side_are_of_one_checkpoint(name):
    files = sorted((ROOT / "benchmarks" / "results" / name).glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found = {result["inputs"]["checkpoint"]["sha256"] for result in results if "checkpoint" in result.get("inputs", {})}
    assert len(found) == 1
