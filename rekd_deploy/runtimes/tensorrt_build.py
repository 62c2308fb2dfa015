"""ONNX -> TensorRT engine, strongly typed, with profiles. One path for the whole family. torch-free.

A profile says which shapes an engine accepts and which it is tuned for, from the signature alone. Buckets cut each axis
into ranges that touch but do not overlap (lengths 64, 128: 3..64 and 65..128, each tuned for its end), so every shape
has exactly one profile. Triton picks it the same way. Time and size of a build grow with their number.

Variables keep to fixed names (``api`` the module, ``builder``, ``network``, ``config``, ...): a test reads from them
which class a name belongs to and compares it with the API lists of TensorRT and TensorRT-RTX.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import BATCH, LENGTH, SHORTEST, SLOTS, GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.tensorrt import Library, Profile, deferred_entry, first_line
from rekd_train.files import sha256, write_bytes

DATA_TYPES = {"int64": "INT64", "float32": "FLOAT", "bool": "BOOL", "uint8": "UINT8"}
"""A signature's types as the library calls them."""
_TUNED_BATCH = 8


@dataclass(frozen=True)
class Range:
    """Sizes of one axis in one profile."""

    smallest: int
    tuned: int
    largest: int


def build_engine(
    library: Library, graph: Path, plan: Path, signature: GraphSignature, profiles: Sequence[Profile],
    precision: str = "fp32",
) -> dict[str, Any]:
    """Build an engine file from an ONNX graph.

    Args:
        graph: ONNX, unfused, in the types that the engine is to compute in.
        plan: file to write.
        signature: what the graph must take and give.
        profiles: shapes that the engine accepts.
        precision: what the graph was converted to; a strongly typed engine computes in the types of its graph.

    Returns:
        The engine's manifest entry.

    Raises:
        EngineError: the graph cannot be parsed or built, is not of its signature, or a GPU is needed.
    """
    entry = deferred_entry(library.product, graph, profiles, precision)
    with _nothing_collected():
        content = _serialised(library, graph, signature, profiles)
    write_bytes(plan, content)
    return entry | {
        "version": library.version, "built_for": list(library.product.capabilities) or ["the machine of the export"],
        "bytes": plan.stat().st_size, "sha256": sha256(plan),
    }


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """The library holds a lock while it logs, which runs Python: a builder left by an earlier build, found there by
    the garbage collector, would wait for that lock for ever."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _serialised(library: Library, graph: Path, signature: GraphSignature, profiles: Sequence[Profile]) -> bytes:
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
    if not parser.parse(graph.read_bytes()):
        reason = logger.reason()
        if parser.num_errors:
            error = parser.get_error(0)
            where = f"{error.node_operator()} {error.node_name()}".strip()
            reason = f"{first_line([error.desc()])}{f' (at {where})' if where else ''}"
        raise EngineError(f"{library.product.title} cannot read {graph.name}: {reason}")
    _check_network(api, network, signature, graph)
    # TF32 rounds the factors of fp32 products to 10 bits: scores would leave the limits of the parity gate
    config.clear_flag(api.BuilderFlag.TF32)
    if capabilities := library.product.capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(api.ComputeCapability, name.upper()), index)
    for shapes_by_input in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, tuned, largest) in shapes_by_input.items():
            profile.set_shape(name, smallest, tuned, largest)
        config.add_optimization_profile(profile)
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise EngineError(f"{library.product.title} cannot build {graph.name}: {logger.reason()}")
    return bytes(memory)


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


def batch_ranges(batches: Sequence[int] | None, max_batch_size: int) -> list[Range]:
    """Ranges that cover 1..max_batch_size; ``batches``: the tuned sizes in any order, None: one range, tuned for 8.

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
    if wrong := [size for size in sizes if not smallest <= size <= largest]:
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
