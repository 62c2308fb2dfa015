"""Real engines without a GPU: TensorRT-RTX builds every kind of graph."""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper
from precisions import conversion_of, model_of, traced

from rekd_deploy.contract.signature import BATCH, GraphSignature, Slots, TensorSpec, text_pair_signature
from rekd_deploy.errors import EngineError
from rekd_deploy.graphs.guard import guarded
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import joined, write
from rekd_deploy.runtimes.tensorrt import PRODUCTS, Library, first_line, load_library
from rekd_deploy.runtimes.tensorrt_build import Range, batch_ranges, build_engine, length_ranges, profiles_of
from rekd_train.errors import MissingExtraError
from rekd_train.files import sha256

CARDS = ["sm86", "sm89", "sm120"]
BATCHES, LENGTHS = [Range(1, 8, 64)], [Range(3, 16, 16), Range(17, 48, 48)]


def cards_in(plan) -> set[str]:
    """The cards that an engine of TensorRT-RTX 1.7 names in its header."""
    header = plan.read_bytes()[:36]
    assert header[:4] == header[28:32] == b"vtrt"
    bits = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16}
    return {name for name, bit in bits.items() if int.from_bytes(header[32:], "little") & bit}


@pytest.fixture(scope="session")
def library():
    pytest.importorskip("tensorrt_rtx")
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def graphs_of(tmp_path_factory):
    """The signature and unfused graphs of a kind, in a precision."""

    @cache
    def written(kind: str, precision: str = "fp32"):
        pair = pair_signature(model_of(kind))
        plain = precision == "fp32"
        models = dict(traced(kind, False) if plain else conversion_of(kind, precision, False, True).models)
        models["single"] = joined(models["selector"], models["predictor"], pair)
        work = tmp_path_factory.mktemp(kind)
        for role, model in models.items():
            write(model, work / f"{role}.onnx")
        return pair, {role: work / f"{role}.onnx" for role in models}

    return written


@pytest.mark.tensorrt
@pytest.mark.parametrize("role", ["selector", "predictor", "single"])
@pytest.mark.parametrize("kind", ["bert", "bert-zero", "vit", "vit-paper"])
def test_every_graph_builds_for_every_card(library, graphs_of, tmp_path, kind, role):
    pair, graphs = graphs_of(kind)
    signature = pair.graph(role)
    # one profile in most: each more takes as long again
    profiles = profiles_of(signature, BATCHES, LENGTHS if kind == "bert" else [Range(3, 48, 48)])
    plan = tmp_path / f"{role}.plan"
    entry = build_engine(library, graphs[role], plan, signature, profiles)
    assert (entry["bytes"], entry["sha256"]) == (plan.stat().st_size, sha256(plan)) and entry["bytes"] > 100_000
    assert entry["built_for"] == CARDS and cards_in(plan) == set(CARDS)
    assert (entry["format"], entry["version"]) == ("tensorrt-rtx", library.version)
    assert (entry["precision"], entry["status"]) == ("fp32", "unverified")
    assert entry["graph_sha256"] == sha256(graphs[role])
    assert len(entry["profiles"]) == (2 if kind == "bert" else 1)
    assert set(entry["profiles"][0]) == {spec.name for spec in signature.inputs}


@pytest.mark.tensorrt
@pytest.mark.parametrize(("kind", "vocabulary"), [("bert", 94), ("vit", 0)])
def test_guarded_graphs_build(library, graphs_of, tmp_path, kind, vocabulary):
    pair, graphs = graphs_of(kind)
    for role in ("selector", "predictor"):
        signature, graph = pair.graph(role), tmp_path / f"{role}.onnx"
        write(guarded(onnx.load(graphs[role]), signature, vocabulary, 48), graph)
        profiles = profiles_of(signature, BATCHES, [Range(3, 48, 48)])
        assert build_engine(library, graph, tmp_path / f"{role}.plan", signature, profiles)["bytes"] > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_both_steps_build_in_every_precision(library, graphs_of, tmp_path, kind, precision):
    pair, graphs = graphs_of(kind, precision)
    signature = pair.graph("single")
    profiles = profiles_of(signature, BATCHES, [Range(3, 48, 48)])
    entry = build_engine(library, graphs["single"], tmp_path / "plan", signature, profiles, precision)
    assert entry["precision"] == precision and entry["bytes"] > 0


def simple_graph(tmp_path, operator: str = "Relu"):
    """x (batch, 4) float32 -> operator -> cast -> y, and its signature."""
    nodes = [
        helper.make_node(operator, ["x"], ["high"]), helper.make_node("Cast", ["high"], ["y"], to=TensorProto.FLOAT)
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "simple", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.save(model, tmp_path / "simple.onnx")
    tensors = [(TensorSpec(name, "float32", (BATCH, 4)),) for name in ("x", "y")]
    return tmp_path / "simple.onnx", GraphSignature(*tensors)


def build_simple(library, graph, signature, profiles=None):
    profiles = profiles or profiles_of(signature, [Range(1, 8, 8)], [])
    return build_engine(library, graph, graph.with_suffix(".plan"), signature, profiles)


@pytest.mark.tensorrt
def test_what_the_builder_is_told(library, tmp_path):
    told = {}

    class Builder:
        """The library's own; remembers what it was told."""

        def __init__(self, log) -> None:
            self.builder = library.api.Builder(log)

        def __getattr__(self, name):
            return getattr(self.builder, name)

        def build_serialized_network(self, network, config):
            told.update(
                TF32=config.get_flag(api.BuilderFlag.TF32), profiles=config.num_optimization_profiles,
                typed=network.get_flag(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                cards=config.num_compute_capabilities,
            )  # fmt: skip
            return self.builder.build_serialized_network(network, config)

    api = SimpleNamespace(**{name: getattr(library.api, name) for name in dir(library.api)} | {"Builder": Builder})
    graph, signature = simple_graph(tmp_path)
    profiles = profiles_of(signature, [Range(1, 1, 2), Range(3, 8, 8)], [])
    build_simple(Library(library.product, api, library.version), graph, signature, profiles=profiles)
    assert told == {"TF32": False, "profiles": 2, "cards": 3, "typed": True}


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("operator", "output", "profiles", "complaint"),
    [
        ("NonZero", "y", None, "TensorRT-RTX cannot read simple.onnx: .*NonZero"),
        ("BiasGelu", "y", None, "TensorRT-RTX cannot read simple.onnx: .*BiasGelu"),
        ("Relu", "z", None, r"has the outputs \[\('y'.*not \[\('z'"),
        ("Relu", "y", [{"x": ((8, 4), (4, 4), (1, 4))}], "TensorRT-RTX cannot"),
    ],
    ids=["an operator it cannot read", "one of ONNX Runtime's own", "another signature", "a profile upside down"],
)
def test_what_is_refused_is_one_useful_line(library, tmp_path, operator, output, profiles, complaint):
    graph, signature = simple_graph(tmp_path, operator)
    other = GraphSignature(signature.inputs, (TensorSpec(output, "float32", (BATCH, 4)),))
    with pytest.raises(EngineError, match=complaint) as refusal:
        build_simple(library, graph, other, profiles=profiles)
    assert "\n" not in str(refusal.value) and "cudaError" not in str(refusal.value)
    assert not graph.with_suffix(".plan").exists()


# the library


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        ("tensorrt", ModuleNotFoundError(name="tensorrt"), r"TensorRT 10 or 11 .*'tensorrt'\) is not installed; fix"),
        ("tensorrt-rtx", ModuleNotFoundError(name="tensorrt_rtx"), r"'tensorrt_rtx' is not .*pip .*\[tensorrt-rtx\]"),
        ("tensorrt", ImportError("libnvinfer.so.11: cannot open"), "cannot be loaded: libnvinfer.so.11.*fix: pip"),
        ("abacus", None, "no engine 'abacus'; engines: tensorrt, tensorrt-rtx"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_one_line_with_the_fix(monkeypatch, name, error, complaint):
    def fails(module):
        raise error

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises((EngineError, MissingExtraError), match=complaint):
        load_library(name)


def test_an_unknown_version_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(EngineError, match="TensorRT is installed in version 8.6.1; fix: install version 10 or 11"):
        load_library("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    assert load_library("tensorrt").version == "10.9.0.34"


def test_tensorrt_needs_the_gpu_that_it_builds_for(tmp_path):
    """Without one its bindings refuse to make a builder."""

    def no_builder(logger):
        logger.log("error", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal"

    library = Library(PRODUCTS["tensorrt"], SimpleNamespace(ILogger=Logger, Builder=no_builder), "11.4")
    with pytest.raises(EngineError, match=r"TensorRT cannot start: CUDA initialization failure.*fix: .*NVIDIA GPU"):
        build_simple(library, *simple_graph(tmp_path))


def test_complaints_about_a_missing_driver_come_last():
    driver = "Error Code 1: Cuda Runtime (cudaError 35)"
    assert first_line([driver, "\n", "Invalid node\nmore"]) == "Invalid node"
    assert first_line([driver]) == driver and first_line([]) == ""


# profiles


@pytest.mark.parametrize(
    ("batches", "largest", "expected"),
    [
        (None, 64, [(1, 8, 64)]),
        (None, 4, [(1, 4, 4)]),
        ((64, 1, 8), 64, [(1, 1, 2), (3, 8, 8), (9, 64, 64)]),
        ((1, 2), 3, [(1, 1, 2), (3, 3, 3)]),
        ((1,), 1, [(1, 1, 1)]),
    ],
)
def test_batch_ranges_cover_every_batch_once(batches, largest, expected):
    ranges = batch_ranges(batches, largest)
    assert ranges == [Range(*sizes) for sizes in expected]
    assert [size for r in ranges for size in range(r.smallest, r.largest + 1)] == list(range(1, largest + 1))


def test_lengths_cover_every_length_once():
    assert length_ranges((32, 16), 48) == [Range(3, 16, 16), Range(17, 32, 32), Range(33, 48, 48)]


@pytest.mark.parametrize(
    ("ranges", "sizes"), [(batch_ranges, (0, 8)), (batch_ranges, (65,)), (length_ranges, (2,)), (length_ranges, (65,))]
)
def test_sizes_out_of_range_are_named(ranges, sizes):
    with pytest.raises(EngineError, match=r"outside .*64.*fix"):
        ranges(sizes, 64)


@pytest.mark.parametrize(
    ("rule", "slots"),
    [
        (5, ((3, 5), (8, 5), (8, 5))), (Slots(200_000, 1, 9), ((3, 3), (8, 9), (8, 9))),
        (Slots(200_000, 4, 4), ((3, 4), (8, 4), (8, 4))),
    ],
)
def test_profiles_follow_the_signature(rule, slots):
    profiles = profiles_of(text_pair_signature(rule, classes=2).predictor, [Range(1, 1, 2), Range(3, 8, 8)], LENGTHS)
    assert len(profiles) == 4
    assert profiles[3] == {"input_ids": ((3, 17), (8, 48), (8, 48)), "positions": slots, "kept": slots}


def test_images_have_one_profile_a_batch_range():
    images = GraphSignature((TensorSpec("pixels", "uint8", (BATCH, 8, 8, 3)),), ())
    assert profiles_of(images, BATCHES, []) == [{"pixels": ((1, 8, 8, 3), (8, 8, 8, 3), (64, 8, 8, 3))}]
