"""Real engines without a GPU: TensorRT-RTX builds every kind of graph; and every name exists in both products."""

import ast
import gc
import json
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import onnx
import onnx.parser
import pytest
from precisions import conversion_of, model_of, traced

from rekd_deploy.contract.signature import BATCH, GraphSignature, Slots, TensorSpec, text_pair_signature
from rekd_deploy.errors import EngineError
from rekd_deploy.graphs.guard import guarded
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import joined, write
from rekd_deploy.runtimes import tensorrt_build
from rekd_deploy.runtimes.tensorrt import PRODUCTS, Library, first_line, load_library
from rekd_deploy.runtimes.tensorrt_build import Range, batch_ranges, build_engine, length_ranges, profiles_of
from rekd_deploy.runtimes.tensorrt_execution import _TYPES
from rekd_train.errors import MissingExtraError
from rekd_train.files import sha256

CARDS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16}
"""Bits in the header of an engine of TensorRT-RTX 1.7."""
BATCHES, LENGTHS = [Range(1, 8, 64)], [Range(3, 16, 16), Range(17, 48, 48)]
WHOLE = [Range(3, 48, 48)]
"""One profile: each more takes as long again."""


@pytest.fixture(scope="session")
def library():
    pytest.importorskip("tensorrt_rtx")
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def graphs_of(tmp_path_factory):
    @cache
    def written(kind: str, precision: str):
        pair, work = pair_signature(model_of(kind)), tmp_path_factory.mktemp(kind)
        plain = precision == "fp32"
        models = dict(traced(kind, False) if plain else conversion_of(kind, precision, False, True).models)
        models["single"] = joined(models["selector"], models["predictor"], pair)
        for role, model in models.items():
            write(model, work / f"{role}.onnx")
        return pair, {role: work / f"{role}.onnx" for role in models}
    return written


@pytest.mark.tensorrt
@pytest.mark.parametrize(("kind", "role", "precision"), [
    *((kind, role, "fp32") for kind in ("bert", "bert-zero", "vit", "vit-paper")
      for role in ("selector", "predictor", "single")),
    *((kind, "single", precision) for kind in ("bert", "vit") for precision in ("fp16", "bf16", "int8"))])
def test_every_graph_builds_for_every_card_in_every_precision(library, graphs_of, tmp_path, kind, role, precision):
    pair, graphs = graphs_of(kind, precision)
    signature, plan = pair.graph(role), tmp_path / f"{role}.plan"
    several = (kind, precision) == ("bert", "fp32")
    profiles = profiles_of(signature, BATCHES, LENGTHS if several else WHOLE)
    entry = build_engine(library, graphs[role], plan, signature, profiles, precision)
    assert len(entry["profiles"]) == 1 + several and plan.stat().st_size > 100_000
    assert entry["profiles"][0].keys() == {spec.name for spec in signature.inputs}
    assert entry == {"format": "tensorrt-rtx", "version": library.version, "precision": precision,
                     "status": "unverified", "built_for": ["sm86", "sm89", "sm120"], "profiles": entry["profiles"],
                     "bytes": plan.stat().st_size, "sha256": sha256(plan), "graph_sha256": sha256(graphs[role])}
    header = plan.read_bytes()[:36]
    assert header[:4] == header[28:32] == b"vtrt"
    assert int.from_bytes(header[32:], "little") == sum(CARDS[card] for card in entry["built_for"])


@pytest.mark.tensorrt
@pytest.mark.parametrize(("kind", "vocabulary"), [("bert", 94), ("vit", 0)])
def test_guarded_graphs_build(library, graphs_of, tmp_path, kind, vocabulary):
    pair, graphs = graphs_of(kind, "fp32")
    for role in ("selector", "predictor"):
        signature, graph = pair.graph(role), tmp_path / f"{role}.onnx"
        write(guarded(onnx.load(graphs[role]), signature, vocabulary, 48), graph)
        build_engine(library, graph, tmp_path / "plan", signature, profiles_of(signature, BATCHES, WHOLE))


def build_simple(library, folder, operator: str = "Relu", output: str = "y", profiles=None):
    onnx.save(onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
        simple (float[batch, 4] x) => (float[batch, 4] y)
        {{ high = {operator}(x)
          y = Cast<to = 1>(high) }}"""), folder / "simple.onnx")
    signature = GraphSignature(*((TensorSpec(name, "float32", (BATCH, 4)),) for name in ("x", output)))
    profiles = profiles or profiles_of(signature, [Range(1, 1, 2), Range(3, 8, 8)], [])
    return build_engine(library, folder / "simple.onnx", folder / "plan", signature, profiles)


@pytest.mark.tensorrt
def test_what_the_builder_is_told(library, tmp_path, monkeypatch):
    told, api, builder_of = [], library.api, library.api.Builder
    class Left: ...
    left = Left()
    left.itself, left = left, weakref.ref(left)  # what an earlier build that was refused may leave
    def builder(log):
        told.append((left(), gc.isenabled()))
        own = builder_of(log)
        def build(network, config):
            told.append((config.get_flag(api.BuilderFlag.TF32), config.num_optimization_profiles))
            told.append((network.get_flag(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                         config.num_compute_capabilities))
            return own.build_serialized_network(network, config)
        methods = ("create_network", "create_builder_config", "create_optimization_profile")
        return SimpleNamespace(build_serialized_network=build, **{name: getattr(own, name) for name in methods})
    monkeypatch.setattr(api, "Builder", builder)
    build_simple(library, tmp_path)
    assert told == [(None, False), (False, 2), (True, 3)] and gc.isenabled()


@pytest.mark.tensorrt
@pytest.mark.parametrize(("operator", "output", "profiles", "complaint"), [
    ("NonZero", "y", None, "TensorRT-RTX cannot read simple.onnx: .*NonZero"),
    ("BiasGelu", "y", None, "TensorRT-RTX cannot read simple.onnx: .*BiasGelu"),
    ("Relu", "z", None, r"has the outputs \[\('y'.*not \[\('z'"),
    ("Relu", "y", [{"x": ((8, 4), (4, 4), (1, 4))}], "TensorRT-RTX cannot"),
], ids=["an operator it cannot read", "one of ONNX Runtime's own", "another signature", "a profile upside down"])
def test_what_is_refused_is_one_useful_line(library, tmp_path, operator, output, profiles, complaint):
    with pytest.raises(EngineError, match=complaint) as refusal:
        build_simple(library, tmp_path, operator, output, profiles)
    assert "\n" not in str(refusal.value) and "cudaError" not in str(refusal.value)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(("name", "found", "complaint"), [
    ("tensorrt", ModuleNotFoundError(name="tensorrt"), r"TensorRT 10 or 11 .*'tensorrt'\) is not installed; fix"),
    ("tensorrt-rtx", ModuleNotFoundError(name="tensorrt_rtx"), r"'tensorrt_rtx' is not .*pip .*\[tensorrt-rtx\]"),
    ("tensorrt", ImportError("libnvinfer.so.11: cannot open"), "cannot be loaded: libnvinfer.so.11.*fix: pip"),
    ("tensorrt", SimpleNamespace(__version__="8.6.1"), "TensorRT is .* version 8.6.1; fix: install version 10 or 11"),
    ("abacus", None, "no engine 'abacus'; engines: tensorrt, tensorrt-rtx")])
def test_a_library_that_cannot_be_used_is_one_line_with_the_fix(monkeypatch, name, found, complaint):
    monkeypatch.setattr("importlib.import_module", Mock(side_effect=[found]))
    with pytest.raises((EngineError, MissingExtraError), match=complaint):
        load_library(name)


def test_tensorrt_needs_its_gpu_and_ranges_cover_every_size_once(tmp_path):
    """Without one its bindings refuse to make a builder."""
    def no_builder(logger):
        logger.log("error", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal"
    library = Library(PRODUCTS["tensorrt"], SimpleNamespace(ILogger=Logger, Builder=no_builder), "11.4")
    with pytest.raises(EngineError, match=r"TensorRT cannot start: CUDA initialization failure.*fix: .*NVIDIA GPU"):
        build_simple(library, tmp_path)
    driver = "Error Code 1: Cuda Runtime (cudaError 35)"
    assert first_line([driver, "\n", "Invalid node\nmore"]) == "Invalid node"
    assert first_line([driver]) == driver and first_line([]) == ""
    for ranges, sizes, largest, expected in (
        (batch_ranges, None, 64, [(1, 8, 64)]), (batch_ranges, None, 4, [(1, 4, 4)]),
        (batch_ranges, (64, 1, 8), 64, [(1, 1, 2), (3, 8, 8), (9, 64, 64)]),
        (batch_ranges, (1, 2), 3, [(1, 1, 2), (3, 3, 3)]), (batch_ranges, (1,), 1, [(1, 1, 1)]),
        (length_ranges, (32, 16), 48, [(3, 16, 16), (17, 32, 32), (33, 48, 48)])):  # fmt: skip
        assert ranges(sizes, largest) == [Range(*each) for each in expected]
    for ranges, size in ((batch_ranges, 0), (batch_ranges, 65), (length_ranges, 2), (length_ranges, 65)):
        with pytest.raises(EngineError, match=r"outside .*64.*fix"):
            ranges((size,), 64)


@pytest.mark.parametrize(("rule", "slots"), [
    (5, ((3, 5), (8, 5), (8, 5))), (Slots(200_000, 1, 9), ((3, 3), (8, 9), (8, 9))),
    (Slots(200_000, 4, 4), ((3, 4), (8, 4), (8, 4)))])
def test_profiles_follow_the_signature(rule, slots):
    profiles = profiles_of(text_pair_signature(rule, classes=2).predictor, [Range(1, 1, 2), Range(3, 8, 8)], LENGTHS)
    assert len(profiles) == 4
    assert profiles[3] == {"input_ids": ((3, 17), (8, 48), (8, 48)), "positions": slots, "kept": slots}
    images = GraphSignature((TensorSpec("pixels", "uint8", (BATCH, 8, 8, 3)),), ())
    assert profiles_of(images, BATCHES, []) == [{"pixels": ((1, 8, 8, 3), (8, 8, 8, 3), (64, 8, 8, 3))}]


ROOT = Path(__file__).resolve().parents[3]
LISTS = json.loads((ROOT / "tests" / "golden" / "tensorrt_api.json").read_text(encoding="utf-8"))
TENSORRT, RTX = (LISTS[key] for key in LISTS if key.startswith("tensorrt"))
DEPLOY = ROOT / "rekd_deploy"
MODULES = [*sorted((DEPLOY / "runtimes").glob("tensorrt*.py")), DEPLOY / "repository" / "backend" / "model.py"]

VARIABLES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "engine": "ICudaEngine", "_engine": "ICudaEngine",
    "context": "IExecutionContext", "_runtime": "Runtime", "tensor": "ITensor", "memory": "IHostMemory"}  # fmt: skip
"""What the modules call their objects of the library's classes."""
ERRORS = {"desc", "node_operator", "node_name"}
"""Of ``ParserError``, which shares its variable with Python's exceptions."""
RTX_ALONE = {("IBuilderConfig", "num_compute_capabilities"),
             ("IBuilderConfig", "set_compute_capability"),
             ("", "ComputeCapability")}  # fmt: skip
"""Used only where the product builds anywhere."""
ELSEWHERE = {"name", "value", "log", "dtype", "shape", "nbytes", "desc", "infer_shapes", "node"}
"""Names of the library that are common words; on other variables they are Python's."""


def base_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_every_name_exists_in_both_products():
    everything = {name for api in (TENSORRT, RTX) for names in api.values() for name in names} - ELSEWHERE
    used = set()
    # (class, name), class '' for a name of the module itself
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            base, before = base_name(node.value), base_name(getattr(node.value, "value", node.value))
            if base in ("api", "_api"):
                used.add(("", node.attr))
            elif before in ("api", "_api"):
                used.add((base, node.attr))
            elif base in VARIABLES:
                used.add((VARIABLES[base], node.attr))
            elif base == "error" and node.attr in ERRORS:
                used.add(("ParserError", node.attr))
            else:  # it would be compared with no list
                where = f"{module.name}:{node.lineno}: {ast.unparse(node)}: unknown variable"
                assert base == "self" or node.attr not in everything, where
    assert len(used) > 40, "the names are no longer found in the code"
    for api, alone in ((TENSORRT, RTX_ALONE), (RTX, set())):
        known = {("", name) for name in api} | {(owner, name) for owner in api for name in api[owner]}
        assert {pair for pair in used - known if not pair[1].startswith("__")} == alone
        assert {*tensorrt_build.DATA_TYPES.values(), *_TYPES} <= set(api["DataType"])
    cards = {name.upper() for name in PRODUCTS["tensorrt-rtx"].capabilities}
    assert cards and cards <= set(RTX["ComputeCapability"])
