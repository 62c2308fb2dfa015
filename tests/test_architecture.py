"""The house's laws: imports run one way, light things stay light, facades tell the truth."""

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rekd_train", "rekd_deploy")

HOUSE = {
    # artefacts flow down this list, imports flow up: a module imports from its own room and from rooms above
    "ground": "rekd_train.errors rekd_train.files rekd_train.inputs.prediction",
    "config": """
        rekd_train.config.section rekd_train.config.backbone rekd_train.config.data rekd_train.config.files
        rekd_train.config.training rekd_train.config.run rekd_train.inputs.policy
    """,
    "data": """
        rekd_train.inputs.spans rekd_train.inputs.text_checks rekd_train.inputs.image_reading rekd_train.inputs.text
        rekd_train.inputs.image rekd_train.inputs.token_ids rekd_train.inputs.preprocessors
        rekd_train.models.pretrained rekd_train.models.weight_files
        rekd_train.data rekd_train.data.augmentation rekd_train.data.batches rekd_train.data.checks
        rekd_train.data.cifar rekd_train.data.classes rekd_train.data.digits rekd_train.data.examples
        rekd_train.data.fashion rekd_train.data.folders rekd_train.data.imdb rekd_train.data.mosaic
        rekd_train.data.duplicates rekd_train.data.partition rekd_train.data.sources rekd_train.data.splits
        rekd_train.data.summary rekd_train.data.table_files rekd_train.data.table_lines rekd_train.data.tables
    """,
    "models": """
        rekd_train.models rekd_train.models.base rekd_train.models.text
        rekd_train.models.bert_pooling rekd_train.models.bert rekd_train.models.bilstm
        rekd_train.models.families rekd_train.models.gates rekd_train.models.rationalizer rekd_train.models.vit
        rekd_train.models.official_weights rekd_train.models.weights
    """,
    "training": """
        rekd_train.evaluation.metrics rekd_train.evaluation.calibration_metrics rekd_train.evaluation.mask_metrics rekd_train.evaluation.plausibility
        rekd_train.evaluation.faithfulness rekd_train.evaluation.significance rekd_train.inputs.vocabulary
        rekd_train.evaluation.decisions rekd_train.evaluation.forward rekd_train.evaluation.agreement rekd_train.evaluation.report
        rekd_train.models.building rekd_train.training.calibration rekd_train.training.losses rekd_train.training.optimisation
        rekd_train.training.schedules rekd_train.training.noise rekd_train.training.runtime rekd_train.training.observers rekd_train.training.batches
        rekd_train.training.teacher rekd_train.training.checks rekd_train.training.objectives rekd_train.training.validation rekd_train.training.watch rekd_train.training.state
        rekd_train.training.loop rekd_train.training.stages
    """,
    "checkpoint": "rekd_train.checkpoints.model_card rekd_train.checkpoints.checkpoint rekd_train.checkpoints.examples rekd_train.checkpoints.official",
    "runs": "rekd_train.checkpoints.recorded rekd_train.runs rekd_train.judge",
    "training commands": "rekd_train rekd_train.cli.command rekd_train.cli.library rekd_train.cli.progress rekd_train.cli.main",
    "signature": "rekd_deploy.errors rekd_deploy.contract.signature rekd_deploy.contract.artefacts rekd_deploy.contract.text_source",
    "engines": """
        rekd_deploy.runtimes rekd_deploy.runtimes.base rekd_deploy.runtimes.onnxruntime
        rekd_deploy.runtimes.tensorrt.library rekd_deploy.runtimes.tensorrt.profiles rekd_deploy.runtimes.tensorrt.types
        rekd_deploy.runtimes.tensorrt.build rekd_deploy.runtimes.tensorrt.execution rekd_deploy.runtimes.tensorrt.runner
        rekd_deploy.runtimes.tensorrt.readback rekd_deploy.runtimes.onnxruntime_cuda rekd_deploy.runtimes.onnxruntime_device
    """,
    "export": """
        rekd_deploy.parity.examples rekd_deploy.graphs.modules rekd_deploy.graphs.onnx_model rekd_deploy.graphs.lstm rekd_deploy.graphs.slots
        rekd_deploy.graphs.fusion
        rekd_deploy.graphs.fusion_cpu rekd_deploy.graphs.fusion_masks rekd_deploy.graphs.guard
        rekd_deploy.contract.parity_report rekd_deploy.parity.cases rekd_deploy.parity.gate
        rekd_deploy.graphs.precision rekd_deploy.graphs.precision.attention rekd_deploy.graphs.precision.calibration
        rekd_deploy.graphs.precision.convert rekd_deploy.graphs.precision.half rekd_deploy.graphs.precision.integers
        rekd_deploy.graphs.precision.observed rekd_deploy.graphs.precision.structure rekd_deploy.graphs.fusion_embedding
        rekd_deploy.parity.reference rekd_deploy.repository.manifest rekd_deploy.export.graphs
        rekd_deploy.export.engines rekd_deploy.parity.engines
    """,
    "repository": """
        rekd_deploy.contract.description rekd_deploy.repository.warmups rekd_deploy.repository.config_gpu rekd_deploy.repository.config
        rekd_deploy.repository.config_members rekd_deploy.repository.config_rules rekd_deploy.repository.model_files rekd_deploy.repository.backend.batches
        rekd_deploy.repository.backend.model
        rekd_deploy.export.checkpoint rekd_deploy.repository.workspaces rekd_deploy.repository.versions
        rekd_deploy.repository.backend.text rekd_deploy.repository.text_endpoint rekd_deploy.repository.reader rekd_deploy.repository.writer
        rekd_deploy.repository.runners rekd_deploy.export.options rekd_deploy.export.plan rekd_deploy.export.run
        rekd_deploy.export.verify_engines rekd_deploy.export.verify
    """,
    "server": """
        rekd_deploy.server.processes rekd_deploy.server.flags rekd_deploy.server.ports rekd_deploy.server.process
        rekd_deploy.server.state rekd_deploy.server.program rekd_deploy.server.wheel rekd_deploy.server.live_repository
        rekd_deploy.server.exchange_rules rekd_deploy.server.model_control rekd_deploy.server.server rekd_deploy.server.hot_reload
        rekd_deploy.server.restart rekd_deploy.server.service rekd_deploy.server.step_totals
    """,
    "production": """
        rekd_deploy.production rekd_deploy.production.settings rekd_deploy.production.container
        rekd_deploy.production.queue_time rekd_deploy.production.proxy rekd_deploy.production.monitoring
        rekd_deploy.production.compose rekd_deploy.production.kubernetes rekd_deploy.production.kserve
        rekd_deploy.production.dashboard rekd_deploy.production.rendering
    """,
    "client": """
        rekd_deploy.client.windows rekd_deploy.client.batching rekd_deploy.client.address rekd_deploy.client.transport
        rekd_deploy.client.transport_grpc rekd_deploy.client.transport_http rekd_deploy.server.status
        rekd_deploy.client.retry rekd_deploy.client.served_model rekd_deploy.client.calls rekd_deploy.client.client
        rekd_deploy.client.pipeline rekd_deploy.client.render rekd_deploy.parity.agreement
        rekd_deploy
    """,
    "bench": """
        rekd_deploy.bench rekd_deploy.bench.interleaved rekd_deploy.bench.ways rekd_deploy.bench.progress
        rekd_deploy.bench.results rekd_deploy.bench.tables rekd_deploy.bench.labelled rekd_deploy.bench.features
        rekd_deploy.bench.subject rekd_deploy.bench.curve rekd_deploy.bench.accuracy rekd_deploy.bench.verdicts
        rekd_deploy.bench.structure rekd_deploy.bench.judges rekd_deploy.bench.mask_probe rekd_deploy.bench.probes
        rekd_deploy.bench.known_reasons rekd_deploy.bench.faithfulness rekd_deploy.bench.result_inputs
        rekd_deploy.bench.forms rekd_deploy.bench.lines rekd_deploy.bench.latency_inputs
        rekd_deploy.bench.latency_figures rekd_deploy.bench.machine_state rekd_deploy.bench.traced
        rekd_deploy.bench.ways_graphs rekd_deploy.bench.ways_pytorch rekd_deploy.bench.latency
        rekd_deploy.bench.load rekd_deploy.bench.perf_analyzer rekd_deploy.bench.server_steps rekd_deploy.bench.serving
        rekd_deploy.bench.request_mix rekd_deploy.bench.closed_turns rekd_deploy.bench.serving_checks
        rekd_deploy.bench.compare rekd_deploy.bench.charts rekd_deploy.bench.gallery rekd_deploy.bench.report
        rekd_deploy.bench.report_sections rekd_deploy.bench.report_costs rekd_deploy.bench.report_quality
    """,
    "demo": "rekd_deploy.cli.stages rekd_deploy.cli.demo_chain",
    "commands": """
        rekd_deploy.cli rekd_deploy.cli.demo rekd_deploy.cli.deploy rekd_deploy.cli.export
        rekd_deploy.cli.export_summary rekd_deploy.cli.serve
        rekd_deploy.cli.query
        rekd_deploy.cli.bench_common rekd_deploy.cli.bench_accuracy rekd_deploy.cli.bench_faithfulness
        rekd_deploy.cli.bench_latency rekd_deploy.cli.bench_serving rekd_deploy.cli.bench_compare
        rekd_deploy.cli.bench_report
        rekd_deploy.cli.bench
    """,
}
ROOMS = list(HOUSE)
ROOM_OF = {module: room for room, modules in HOUSE.items() for module in modules.split()}

COMMANDS = ("rekd_train.cli.main", "rekd_train.cli.command", "rekd_deploy.cli")
"""The only modules that may print or end the process."""

HEAVY = {
    "torch", "transformers", "timm", "PIL", "onnx", "onnxscript", "onnxruntime", "tritonclient", "pytriton",
    "pandas", "scipy", "accelerate", "tensorboard", "tensorrt", "tensorrt_rtx", "matplotlib",
}  # fmt: skip


@cache
def sources() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(module: str, *, at_import_time: bool = False) -> set[str]:
    """Names that a module imports, ours as dotted module names."""
    names = set()
    pending: list[ast.AST] = [tree(module)]
    while pending:
        node = pending.pop()
        if for_type_checkers(node):
            continue
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in sources() else node.module)
        pending += ast.iter_child_nodes(node)
    return names


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def in_a_fresh_process(code: str) -> list[str]:
    """Top-level names of the modules loaded once ``code`` has run."""
    script = (
        "import sys, json, os\n"
        "sys.stdout = open(os.devnull, 'w')\n"
        f"{code}\n"
        "json.dump(sorted({name.split('.')[0] for name in sys.modules}), sys.__stdout__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def entry_points() -> dict[str, str]:
    return project()["scripts"]


# imports run one way


def test_every_module_has_its_room():
    homeless = sorted(set(sources()) - set(ROOM_OF))
    assert not homeless, f"say in HOUSE where these belong: {homeless}"
    listed = " ".join(HOUSE.values()).split()
    assert len(listed) == len(set(listed)), "a module has one room"


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_flow_one_way(module):
    here = ROOMS.index(ROOM_OF[module])
    for name in ours(imported(module)):
        if name == "rekd_train":  # the facade: errors, predictions, the version
            continue
        assert ROOMS.index(ROOM_OF[name]) <= here, (
            f"{module} ({ROOM_OF[module]}) imports {name} ({ROOM_OF[name]}), which comes later"
        )


def test_no_module_waits_for_itself():
    graph = {module: ours(imported(module, at_import_time=True)) - {module} for module in sources()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(name for name in sources() if name.startswith("rekd_train")))
def test_training_knows_nothing_of_deployment(module):
    assert not [name for name in imported(module) if name.startswith("rekd_deploy")]


def test_the_model_inside_triton_needs_nothing_of_ours():
    """model.py is copied into the repository, where rekd is not installed; so is what it imports."""
    assert not ours(imported("rekd_deploy.repository.backend.model"))
    assert not ours(imported("rekd_deploy.repository.backend.batches"))
    assert not ours(imported("rekd_deploy.runtimes.tensorrt.execution"))


# light things stay light


@pytest.mark.parametrize(
    "code",
    [
        "import rekd_train",
        "import rekd_deploy",
        "from rekd_train import RekdError, Prediction, Span, __version__",
        "from rekd_train import command, config, preprocess",
        "from rekd_deploy import signature, errors, artefacts",
    ],
)
def test_imports_load_nothing_heavy(code):
    assert not HEAVY & set(in_a_fresh_process(code))


def test_client_and_pipeline_load_no_torch():
    loaded = in_a_fresh_process("from rekd_deploy import Client, Pipeline, TritonServer")
    assert not {"torch", "transformers"} & set(loaded)


@pytest.mark.parametrize("command", sorted(entry_points()))
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(command, option):
    module, function = entry_points()[command].split(":")
    code = (
        f"sys.argv = [{command!r}, {option!r}]\n"
        f"from {module} import {function}\n"
        f"try:\n    {function}()\nexcept SystemExit as request:\n    assert request.code == 0, request.code\n"
    )
    assert not HEAVY & set(in_a_fresh_process(code))


@pytest.mark.parametrize("command", sorted(entry_points()))
def test_help_shows_examples_that_start_with_the_command(command, capsys, monkeypatch):
    import typer

    from rekd_train.cli.command import run

    module, _ = entry_points()[command].split(":")
    app = importlib.import_module(module).app
    names = [info.name or info.callback.__name__ for info in app.registered_commands]
    for arguments in [[]] if len(names) == 1 else [[], *([name] for name in names)]:
        monkeypatch.setattr(sys, "argv", [command])
        with pytest.raises(SystemExit) as request:
            run(app, [*arguments, "--help"])
        text = capsys.readouterr().out
        assert request.value.code == 0
        assert "Examples:" in text and f"  {' '.join([command, *arguments])}" in text, text
        assert "--debug" in text
    assert isinstance(app, typer.Typer)


# extras


def test_extras_keep_to_their_own():
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}

    extras = project()["optional-dependencies"]
    assert not {"onnxruntime", "onnxruntime-gpu"} & names(project()["dependencies"]), "a flavour is the user's choice"
    assert names(extras["cpu"]) == {"onnxruntime"}
    assert names(extras["gpu"]) == {"onnxruntime-gpu"}
    assert {"nvidia-pytriton==0.7.0", "numpy<2"} <= set(extras["serve"])
    assert not [name for name in names(extras["dev"]) if name.startswith("tensorrt")], "it does not install everywhere"


@pytest.mark.parametrize("path", sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
def test_an_extra_that_is_asked_for_exists(path):
    named = re.findall(r"MissingExtraError\([^()]*\"([a-z-]+)\"\)", path.read_text(encoding="utf-8"))
    assert set(named) <= set(project()["optional-dependencies"])


# facades tell the truth


@pytest.mark.parametrize("facade", ["rekd_train", "rekd_deploy", "rekd_train.models"])
def test_facade_and_namespace_agree(facade):
    module = importlib.import_module(facade)
    assert list(module.__all__) == sorted(set(module.__all__)), "sorted, without repeats"
    for name in module.__all__:
        assert getattr(module, name) is not None
    submodules = {name.rpartition(".")[2] for name in sources() if name.rpartition(".")[0] == facade}
    helpers = {"import_module", "annotations", "Any", "TYPE_CHECKING"}
    public = {name for name in vars(module) if not name.startswith("_")} - submodules - helpers
    assert public <= set(module.__all__), f"not in __all__: {sorted(public - set(module.__all__))}"
    assert set(getattr(module, "_LAZY", {})) <= set(module.__all__)


@pytest.mark.parametrize("facade", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(facade):
    module = importlib.import_module(facade)
    with pytest.raises(AttributeError, match="nonesuch"):
        module.nonesuch  # noqa: B018


def test_every_error_has_one_root_and_is_drawn():
    from rekd_train.errors import RekdError

    for name in ("rekd_train.errors", "rekd_deploy.errors"):
        module = importlib.import_module(name)
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
        for error in (v for v in own if issubclass(v, BaseException)):
            assert issubclass(error, RekdError)
            assert error.__name__ in module.__doc__, f"{error.__name__} is missing from the tree in {name}"


# habits


@pytest.mark.parametrize("module", sorted(sources()))
def test_modules_are_short(module):
    lines = len(sources()[module].read_text(encoding="utf-8").splitlines())
    assert lines < 300, f"{module} has {lines} lines; split it by concept"


@pytest.mark.parametrize("module", sorted(sources()))
def test_modules_say_what_they_are(module):
    path = sources()[module]
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(tree(module)), f"{path} has no docstring"


@pytest.mark.parametrize("module", sorted(name for name in sources() if not name.startswith(COMMANDS)))
def test_only_commands_print_or_exit(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "exit", "quit", "sys.exit", "os._exit", "typer.echo"}, (
                f"{module}:{node.lineno} calls {called}; raise an error or return, and let the command speak"
            )


@pytest.mark.parametrize("module", sorted(sources()))
def test_contracts_are_not_probed_for(module):
    """``hasattr`` on our own objects and a bare ``except`` hide a missing contract; a platform may be probed."""
    for node in ast.walk(tree(module)):
        probes = isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"
        assert not probes or ast.unparse(node.args[0]) in {"os", "sys"}, f"{module}:{node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{module}:{node.lineno}"


def test_typed_packages_say_so():
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()
