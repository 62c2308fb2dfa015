"""Real engines without a GPU: TensorRT-RTX builds every kind of graph for every card that it is asked for."""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper
from precisions import conversion_of, model_of, traced

from rekd_deploy.contract.signature import BATCH, LENGTH, GraphSignature, Slots, TensorSpec, text_pair_signature
from rekd_deploy.errors import EngineError
from rekd_deploy.graphs.guard import guarded
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import joined, write
from rekd_deploy.runtimes.tensorrt import build as tensorrt_build
from rekd_deploy.runtimes.tensorrt.build import (
    BuildSettings,
    Range,
    batch_ranges,
    build_engine,
    length_ranges,
    profiles_of,
)
from rekd_deploy.runtimes.tensorrt.library import DEFAULT_CAPABILITIES, PRODUCTS, Library, first_line, load_library
from rekd_train.errors import MissingExtraError
from rekd_train.files import sha256

ROLES = ("selector", "predictor", "single")
BATCHES, LENGTHS = [Range(1, 8, 64)], [Range(3, 16, 16), Range(17, 48, 48)]
_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16}


def cards_in(plan) -> set[str]:
    """The cards that an engine of TensorRT-RTX 1.7 names in its header."""
    header = plan.read_bytes()[:36]
    assert header[:4] == header[28:32] == b"vtrt"
    return {name for name, bit in _BITS.items() if int.from_bytes(header[32:], "little") & bit}


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
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [(kind, (capability,)) for kind in ("bert", "vit") for capability in DEFAULT_CAPABILITIES]
    + [(kind, DEFAULT_CAPABILITIES) for kind in ("bert-zero", "vit-paper")],
)
def test_every_graph_builds_for_every_card(library, graphs_of, tmp_path, kind, wanted, role):
    pair, graphs = graphs_of(kind)
    signature = pair.graph(role)
    # one profile in most: each more takes as long again
    lengths = LENGTHS if wanted == DEFAULT_CAPABILITIES[:1] else [Range(3, 48, 48)]
    profiles = profiles_of(signature, BATCHES, lengths)
    plan = tmp_path / f"{role}.plan"
    entry = build_engine(library, graphs[role], plan, signature, profiles, BuildSettings(capabilities=wanted))
    assert (entry["bytes"], entry["sha256"]) == (plan.stat().st_size, sha256(plan)) and entry["bytes"] > 100_000
    assert entry["built_for"] == list(wanted) and cards_in(plan) == set(wanted)
    assert (entry["format"], entry["version"]) == ("tensorrt-rtx", library.version)
    assert (entry["precision"], entry["observed"], entry["status"]) == ("fp32", "not available", "unverified")
    assert entry["graph_types"]["fp32"] > 20 and not {"fp16", "bf16", "int8"} & set(entry["graph_types"])
    assert entry["graph_sha256"] == sha256(graphs[role])
    assert len(entry["profiles"]) == len(profiles) == (1 if "vit" in kind else len(lengths))
    assert set(entry["profiles"][0]) == {spec.name for spec in signature.inputs}


@pytest.mark.tensorrt
@pytest.mark.parametrize(("kind", "vocabulary"), [("bert", 94), ("vit", 0)])
def test_guarded_graphs_build(library, graphs_of, tmp_path, kind, vocabulary):
    pair, graphs = graphs_of(kind)
    for role in ("selector", "predictor"):
        signature, graph = pair.graph(role), tmp_path / f"{role}.onnx"
        write(guarded(onnx.load(graphs[role]), signature, vocabulary, 48), graph)
        profiles = profiles_of(signature, BATCHES, [Range(3, 48, 48)])
        entry = build_engine(library, graph, tmp_path / f"{role}.plan", signature, profiles, BuildSettings())
        assert entry["bytes"] > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_both_steps_build_in_every_precision(library, graphs_of, tmp_path, kind, precision):
    pair, graphs = graphs_of(kind, precision)
    signature, plan = pair.graph("single"), tmp_path / "plan"
    settings = BuildSettings(precision, ("sm89",))
    profiles = profiles_of(signature, BATCHES, [Range(3, 48, 48)])
    entry = build_engine(library, graphs["single"], plan, signature, profiles, settings)
    assert (entry["precision"], entry["observed"]) == (precision, "not available")
    assert entry["graph_types"][precision] > 20 and entry["graph_types"]["fp32"] > 20


def simple_graph(tmp_path, operator: str = "Relu", kind: int = TensorProto.FLOAT, version: int = 20, **attributes):
    """x (batch, 4) float32 -> cast to ``kind`` -> operator -> cast -> y, and its signature."""
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=kind),
        helper.make_node(operator, ["low"], ["high"], **attributes),
        helper.make_node("Cast", ["high"], ["y"], to=TensorProto.FLOAT),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "simple", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", version)]
    )
    path = tmp_path / "simple.onnx"
    onnx.save(model, path)
    tensors = [(TensorSpec(name, "float32", (BATCH, 4)),) for name in ("x", "y")]
    return path, GraphSignature(*tensors)


def build_simple(library, graph, signature, **settings):
    profiles = profiles_of(signature, [Range(1, 8, 8)], [])
    return build_engine(library, graph, graph.with_suffix(".plan"), signature, profiles, BuildSettings(**settings))


@pytest.mark.tensorrt
def test_a_typed_graph_builds_in_its_type_and_an_untyped_one_is_refused(library, tmp_path):
    graph, signature = simple_graph(tmp_path, kind=TensorProto.FLOAT16)
    entry = build_simple(library, graph, signature, precision="fp16", workspace=1 << 28, optimisation_level=0)
    assert entry["precision"] == "fp16" and entry["graph_types"]["fp16"] == 2
    with pytest.raises(EngineError, match=r"simple.onnx was to compute in fp32; its tensors: 2 of fp16, 1 of fp32"):
        build_simple(library, graph, signature, precision="fp32")
    plain, signature = simple_graph(tmp_path)
    with pytest.raises(EngineError, match=r"was to compute in fp16.*fix: .*--precision fp16"):
        build_simple(library, plain, signature, precision="fp16")


@pytest.mark.tensorrt
def test_the_builder_is_told_what_was_asked(library, tmp_path):
    made = {}

    class Builder:
        """The library's own; remembers what it made."""

        def __init__(self, log) -> None:
            self.builder = library.api.Builder(log)

        def __getattr__(self, name):
            return getattr(self.builder, name)

        def create_network(self, flags):
            made["network"] = self.builder.create_network(flags)
            return made["network"]

        def create_builder_config(self):
            made["config"] = self.builder.create_builder_config()
            return made["config"]

        def build_serialized_network(self, network, config):
            read = {
                "TF32": config.get_flag(api.BuilderFlag.TF32), "level": config.builder_optimization_level,
                "workspace": config.get_memory_pool_limit(api.MemoryPoolType.WORKSPACE),
                "details": config.profiling_verbosity == api.ProfilingVerbosity.DETAILED,
                "profiles": config.num_optimization_profiles, "cards": config.num_compute_capabilities,
                "typed": network.get_flag(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            }  # fmt: skip
            made.update(read)
            return self.builder.build_serialized_network(network, config)

    api = SimpleNamespace(**{name: getattr(library.api, name) for name in dir(library.api)} | {"Builder": Builder})
    graph, signature = simple_graph(tmp_path)
    profiles = profiles_of(signature, [Range(1, 1, 2), Range(3, 8, 8)], [])
    settings = BuildSettings(capabilities=("sm86", "sm120"), workspace=1 << 28, optimisation_level=1)
    watched = Library(library.product, api, library.version)
    build_engine(watched, graph, tmp_path / "plan", signature, profiles, settings)
    del made["network"], made["config"]
    assert made == {
        "TF32": False, "level": 1, "workspace": 1 << 28, "details": True, "profiles": 2, "cards": 2, "typed": True
    }  # fmt: skip


@pytest.mark.tensorrt
def test_what_the_parser_refuses_is_one_useful_line(library, tmp_path):
    graph, signature = simple_graph(tmp_path, "NonZero")
    with pytest.raises(EngineError, match=r"TensorRT-RTX cannot read simple.onnx: .*NonZero") as refusal:
        build_simple(library, graph, signature)
    assert "\n" not in str(refusal.value) and "cudaError" not in str(refusal.value)
    assert not graph.with_suffix(".plan").exists()


@pytest.mark.tensorrt
def test_a_network_of_another_signature_is_refused(library, tmp_path):
    graph, signature = simple_graph(tmp_path)
    other = GraphSignature(signature.inputs, (TensorSpec("z", "float32", (BATCH, 4)),))
    with pytest.raises(EngineError, match=r"has the outputs \[\('y'.*not \[\('z'"):
        build_simple(library, graph, other)


@pytest.mark.tensorrt
def test_what_cannot_be_built_is_one_line(library, tmp_path):
    graph, signature = simple_graph(tmp_path)
    upside_down = [{"x": ((8, 4), (4, 4), (1, 4))}]
    with pytest.raises((EngineError), match="TensorRT-RTX cannot") as refusal:
        build_engine(library, graph, tmp_path / "plan", signature, upside_down)
    assert "\n" not in str(refusal.value) and not (tmp_path / "plan").exists()
    for capability in ("sm90", "current"):
        with pytest.raises(EngineError, match=f"cannot build for '{capability}'; it knows .*sm120.*sm89"):
            build_simple(library, graph, signature, capabilities=(capability,))


def test_fused_graphs_and_files_that_are_no_graphs_are_refused_first(artefacts, tmp_path):
    library = Library(PRODUCTS["tensorrt-rtx"], SimpleNamespace(), "1")
    with pytest.raises(EngineError, match=r"com.microsoft.*fix: export it unfused \(--no-fuse\)"):
        build_engine(library, artefacts.selector, tmp_path / "plan", artefacts.signature.selector, [])
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x01nonsense")
    with pytest.raises(EngineError, match="cut.onnx is not an ONNX graph"):
        build_engine(library, tmp_path / "cut.onnx", tmp_path / "plan", artefacts.signature.selector, [])


# the seam


def test_a_missing_library_is_one_line_with_the_fix(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(EngineError, match=r"TensorRT 10 or 11 \(the Python package 'tensorrt'\) is not installed; fix"):
        load_library("tensorrt")
    with pytest.raises(MissingExtraError, match=r"'tensorrt_rtx' is not installed; fix: pip .* '.*\[tensorrt-rtx\]'"):
        load_library("tensorrt-rtx")


def test_an_unknown_version_or_product_and_a_broken_installation_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(EngineError, match="TensorRT is installed in version 8.6.1; fix: install version 10 or 11"):
        load_library("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    assert load_library("tensorrt").version == "10.9.0.34"
    with pytest.raises(EngineError, match="no engine 'abacus'; engines: tensorrt, tensorrt-rtx"):
        load_library("abacus")

    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(EngineError, match="TensorRT cannot be loaded: libnvinfer.so.11.*fix: pip install"):
        load_library("tensorrt")


def test_tensorrt_builds_for_the_gpu_that_is_there(tmp_path):
    """Without one its bindings refuse to make a builder."""

    def no_builder(logger):
        logger.log("error", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal"

    graph, signature = simple_graph(tmp_path)
    library = Library(PRODUCTS["tensorrt"], SimpleNamespace(ILogger=Logger, Builder=no_builder), "11.4")
    with pytest.raises(EngineError, match=r"TensorRT cannot start: CUDA initialization failure.*fix: .*NVIDIA GPU"):
        build_simple(library, graph, signature)
    with pytest.raises(EngineError, match="builds for the GPU of this machine, not for sm89"):
        build_simple(library, graph, signature, capabilities=("sm89",))


def test_complaints_about_a_missing_driver_come_last():
    driver = "Error Code 1: Cuda Runtime (cudaError 35)"
    assert first_line([driver, "\n", "Invalid node\nmore"]) == "Invalid node"
    assert first_line([driver]) == driver and first_line([]) == ""


@pytest.mark.parametrize(("fits", "starts"), [(True, [b"old"]), (False, [b"old", b""])])
def test_a_timing_cache_is_used_unless_it_is_of_another_machine(tmp_path, fits, starts):
    made, used = [], []

    class Config:
        def create_timing_cache(self, stored):
            made.append(stored)
            return stored

        def set_timing_cache(self, cache, ignore_mismatch):
            assert not ignore_mismatch
            used.append(cache)
            return fits or not cache

    settings = BuildSettings(timing_cache=tmp_path / "cache")
    settings.timing_cache.write_bytes(b"old")
    library = Library(PRODUCTS["tensorrt"], None, "11")
    assert tensorrt_build._timing_cache(Config(), library, settings) == starts[-1]
    assert made == used == starts
    rtx = Library(PRODUCTS["tensorrt-rtx"], None, "1")
    assert tensorrt_build._timing_cache(Config(), rtx, settings) is None


# profiles


@pytest.mark.parametrize(
    ("batches", "largest", "expected"),
    [
        (None, 64, [(1, 8, 64)]),
        (None, 4, [(1, 4, 4)]),
        ((64, 1, 8), 64, [(1, 1, 2), (3, 8, 8), (9, 64, 64)]),
        ((8,), 64, [(1, 8, 8), (9, 64, 64)]),
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
    for ranges, sizes in ((batch_ranges, (0, 8)), (batch_ranges, (65,)), (length_ranges, (2,)), (length_ranges, (65,))):
        with pytest.raises(EngineError, match=r"outside .*64.*fix"):
            ranges(sizes, 64)


def test_profiles_follow_the_signature():
    batches = [Range(1, 1, 2), Range(3, 8, 8)]
    for rule, slots in (
        (5, ((3, 5), (8, 5), (8, 5))), (Slots(200_000, 1, 9), ((3, 3), (8, 9), (8, 9))),
        (Slots(200_000, 4, 4), ((3, 4), (8, 4), (8, 4))),
    ):
        pair = text_pair_signature(rule, classes=2)
        profiles = profiles_of(pair.predictor, batches, LENGTHS)
        assert len(profiles) == 4
        assert profiles[3] == {"input_ids": ((3, 17), (8, 48), (8, 48)), "positions": slots, "kept": slots}
    images = GraphSignature((TensorSpec("pixels", "uint8", (BATCH, 8, 8, 3)),), ())
    assert profiles_of(images, BATCHES, []) == [{"pixels": ((1, 8, 8, 3), (8, 8, 8, 3), (64, 8, 8, 3))}]
    strange = GraphSignature((TensorSpec("x", "int64", (BATCH, LENGTH, "beams")),), ())
    with pytest.raises(EngineError, match="axes beams"):
        profiles_of(strange, BATCHES, LENGTHS)
