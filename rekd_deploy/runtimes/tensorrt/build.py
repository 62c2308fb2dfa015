"""ONNX -> TensorRT engine, strongly typed, with profiles. One path for the whole family. torch-free.

A profile says which shapes an engine accepts and which it is tuned for, from the signature alone. Buckets cut each axis
into ranges that touch but do not overlap (lengths 64, 128: 3..64 and 65..128, each tuned for its end), so every shape
has exactly one profile. Triton picks it the same way. Time and size of a build grow with their number.

Variables keep to fixed names (``api`` the module, ``builder``, ``network``, ``config``, ...): a test reads from them
which class a name belongs to and compares it with the API lists of TensorRT and TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import BATCH, LENGTH, SHORTEST, SLOTS, GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.tensorrt.library import Library, Product, first_line
from rekd_deploy.runtimes.tensorrt.types import NOT_AVAILABLE, graph_types
from rekd_train.files import sha256, write_bytes

UNVERIFIED, VERIFIED, UNKNOWN = "unverified", "verified", "precision unknown"
DATA_TYPES = {"int64": "INT64", "float32": "FLOAT", "bool": "BOOL", "uint8": "UINT8"}
"""A signature's types as the library calls them."""
_TUNED_BATCH = 8
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, tuned and largest shape by input."""


@dataclass(frozen=True)
class Range:
    """Sizes of one axis in one profile."""

    smallest: int
    tuned: int
    largest: int


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built."""

    precision: str = "fp32"
    """What the graph was converted to; the engine computes in the graph's types."""
    capabilities: tuple[str, ...] | None = None
    """'sm89', ...: cards to build for, for products that build without them; None: a choice of recent ones."""
    workspace: int | None = None
    """Bytes that a layer may use at run time; None: what the card has."""
    optimisation_level: int | None = None
    """0 (fast build) to 5 (fast engine); None: the library's own."""
    timing_cache: Path | None = None
    """File of kernel timings, read and extended: engines of alike layers build faster. Not for TensorRT-RTX, which
    times nothing at build time."""


def build_engine(
    library: Library,
    graph: Path,
    plan: Path,
    signature: GraphSignature,
    profiles: Sequence[Profile],
    settings: BuildSettings | None = None,
) -> dict[str, Any]:
    """Build an engine file from an ONNX graph.

    Args:
        library: the product that builds.
        graph: ONNX, unfused, in the types that the engine is to compute in.
        plan: file to write.
        signature: what the graph takes and gives; the engine is checked against it.
        profiles: shapes that the engine accepts.

    Returns:
        The engine's manifest entry; its precision is not yet observed (see ``runner.verify_engine``).

    Raises:
        EngineError: the graph cannot be parsed or built, is not of its signature or precision, or a GPU is needed.
    """
    settings = settings or BuildSettings()
    entry = deferred_entry(library.product, graph, profiles, settings.precision)
    capabilities = library.capabilities(settings.capabilities)
    write_bytes(plan, _serialised(library, graph, signature, profiles, settings, capabilities))
    return entry | {
        "version": library.version, "built_for": list(capabilities) or ["the machine of the export"],
        "bytes": plan.stat().st_size, "sha256": sha256(plan),
    }


def deferred_entry(
    product: Product, graph: Path, profiles: Sequence[Profile], precision: str
) -> dict[str, Any]:
    """The manifest entry of an engine that is to be built elsewhere; as ``build_engine``'s, without the file.

    Raises:
        EngineError: the graph is not of that precision, or no engine can be built from it.
    """
    return {
        "format": product.name,
        "version": None,
        "built_for": [],
        "precision": precision,
        "observed": NOT_AVAILABLE,
        "graph_types": graph_types(graph, precision),
        "graph_sha256": sha256(graph),
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in accepted.items()} for accepted in profiles
        ],
        "status": UNVERIFIED,
        "bytes": 0,
        "sha256": None,
    }


def is_built(entry: Mapping[str, Any]) -> bool:
    """Whether the engine of a manifest entry is there; a deferred one is built elsewhere."""
    return entry.get("sha256") is not None


def _serialised(
    library: Library,
    graph: Path,
    signature: GraphSignature,
    profiles: Sequence[Profile],
    settings: BuildSettings,
    capabilities: Sequence[str],
) -> bytes:
    api, logger = library.api, library.new_log()
    try:
        builder = api.Builder(logger)
        # TensorRT 10 needs the flag, 11 builds no other networks and accepts it
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = api.OnnxParser(network, logger)
        config = builder.create_builder_config()
    except (TypeError, RuntimeError) as error:  # how the bindings say that there is no GPU or driver
        reason = first_line([*logger.complaints, str(error)])
        raise EngineError(
            f"{library.product.title} cannot start: {reason}; fix: export on the machine with the NVIDIA GPU that "
            "will serve the engine"
        ) from None
    _parse(library, parser, graph, logger)
    _check_network(api, network, signature, graph)
    # TF32 rounds the factors of fp32 products to 10 bits: scores would leave the limits of the parity gate
    config.clear_flag(api.BuilderFlag.TF32)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # the inspector tells types only then
    if settings.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.optimisation_level is not None:
        config.builder_optimization_level = settings.optimisation_level
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(api.ComputeCapability, name.upper()), index)
    for shapes_by_input in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, tuned, largest) in shapes_by_input.items():
            profile.set_shape(name, smallest, tuned, largest)
        config.add_optimization_profile(profile)
    cache = _timing_cache(config, library, settings)
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise EngineError(f"{library.product.title} cannot build {graph.name}: {logger.reason()}")
    if cache is not None:
        write_bytes(settings.timing_cache, bytes(cache.serialize()))
    return bytes(memory)


def _parse(library: Library, parser, graph: Path, logger) -> None:
    if parser.parse(graph.read_bytes()):
        return
    reason = logger.reason()
    if parser.num_errors:
        error = parser.get_error(0)
        where = f"{error.node_operator()} {error.node_name()}".strip()
        reason = f"{first_line([error.desc()])}{f' (at {where})' if where else ''}"
    raise EngineError(f"{library.product.title} cannot read {graph.name}: {reason}")


def _check_network(api, network, signature: GraphSignature, graph: Path) -> None:
    """Names, order and types of what the network takes and gives."""
    for kind, specs, tensors in (
        ("inputs", signature.inputs, [network.get_input(index) for index in range(network.num_inputs)]),
        ("outputs", signature.outputs, [network.get_output(index) for index in range(network.num_outputs)]),
    ):
        wanted = [(spec.name, getattr(api.DataType, DATA_TYPES[spec.dtype])) for spec in specs]
        found = [(tensor.name, tensor.dtype) for tensor in tensors]
        if found != wanted:
            raise EngineError(f"{graph.name} has the {kind} {found}, not {wanted}; fix: export it again")


def _timing_cache(config, library: Library, settings: BuildSettings):
    """The cache that the build extends, or None."""
    if settings.timing_cache is None or library.product.builds_anywhere:
        return None
    stored = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
    cache = config.create_timing_cache(stored)
    if stored and not config.set_timing_cache(cache, False):  # of another version or card: start anew
        stored, cache = b"", config.create_timing_cache(b"")
    if not stored:
        config.set_timing_cache(cache, False)
    return cache


def batch_ranges(batches: Sequence[int] | None, max_batch_size: int) -> list[Range]:
    """Ranges that cover 1..max_batch_size.

    Args:
        batches: tuned batch sizes in any order; None: one range, tuned for 8.

    Raises:
        EngineError: a batch size is out of range.
    """
    if batches is None:
        return [Range(1, min(_TUNED_BATCH, max_batch_size), max_batch_size)]
    return _ranges(batches, 1, max_batch_size, "batch size", "the largest batch of the server")


def length_ranges(lengths: Sequence[int], max_length: int) -> list[Range]:
    """Ranges that cover the shortest text to max_length; raises as ``batch_ranges``."""
    return _ranges(lengths, SHORTEST, max_length, "length", "the longest input of the model")


def _ranges(sizes: Sequence[int], smallest: int, largest: int, what: str, whose: str) -> list[Range]:
    wrong = [size for size in sizes if not smallest <= size <= largest]
    if wrong:
        raise EngineError(f"{what} {wrong[0]} is outside {smallest}..{largest} ({whose}); fix: choose others")
    ranges, start = [], smallest
    for size in sorted({*sizes, largest}):
        # not a single size: where all sizes are fixed, the steps of an LSTM are unrolled, in minutes and gigabytes
        end = min(size + 1, largest) if start == size else size
        if start <= end:
            ranges.append(Range(start, min(size, end), end))
        start = end + 1
    return ranges


def profiles_of(signature: GraphSignature, batches: Sequence[Range], lengths: Sequence[Range]) -> list[Profile]:
    """One profile for each pair of a batch and a length range; a signature without a length has one a batch range.

    Slots have the range that belongs to the lengths.
    """
    symbols = {axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, str)}
    if unknown := symbols - {BATCH, LENGTH, SLOTS}:
        raise EngineError(f"the axes {', '.join(sorted(unknown))} have no ranges")
    lengths = lengths if LENGTH in symbols else [None]
    axes = [{BATCH: batch, LENGTH: length} for batch in batches for length in lengths]
    if SLOTS in symbols:
        for ranges in axes:
            length, slots = ranges[LENGTH], signature.slots
            ranges[SLOTS] = Range(slots.at(length.smallest), slots.at(length.tuned), slots.at(length.largest))
    return [
        {
            spec.name: tuple(
                tuple(getattr(ranges[axis], end) if isinstance(axis, str) else axis for axis in spec.shape)
                for end in ("smallest", "tuned", "largest")
            )
            for spec in signature.inputs
        }
        for ranges in axes
    ]
