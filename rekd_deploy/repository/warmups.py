"""Warm-up: the first requests of every model, which Triton sends to itself before it calls a model ready.

One for each padded length; on GPUs one for each size of batch, too. Their inputs lie in <model>/warmup/: Triton's own
random data draws ids from all of int64, and a warm-up that fails takes a real server down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rekd_deploy.contract.signature import LENGTH, GraphSignature
from rekd_train.inputs.preprocessors import Preprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

WARMUP = "warmup"
"""The folder of a model where Triton looks for input files."""
Arrays = dict[str, np.ndarray]
_WIDTHS = {"TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_BOOL": 1, "TYPE_UINT8": 1}
"""Bytes of an element."""


def lengths_of(signature: GraphSignature, preprocessor: Preprocessor) -> tuple[int, ...]:
    """The padded lengths that requests have; (0,) where no axis is free."""
    has_length = any(LENGTH in spec.shape for spec in signature.inputs)
    return tuple(preprocessor.settings.buckets) if has_length else (0,)


def example(signature: GraphSignature, preprocessor: Preprocessor, length: int) -> Arrays:
    """One row of valid inputs by name, without the batch axis.

    Args:
        length: tokens of a text; of no meaning for images.
    """
    shapes = {spec.name: signature.sizes_at(spec, length)[1:] for spec in signature.inputs}
    types = {spec.name: np.dtype(spec.dtype) for spec in signature.inputs}
    arrays = {name: np.zeros(shape, types[name]) for name, shape in shapes.items()}
    if "input_ids" in arrays:
        special = preprocessor.special_ids
        word = next(number for number in range(len(special) + 1) if number not in special.values())
        arrays["input_ids"][:] = word
        arrays["input_ids"][0], arrays["input_ids"][-1] = special["cls"], special["sep"]
    for name in ("attention_mask", "keep"):
        if name in arrays:
            arrays[name][:] = 1
    if "positions" in arrays:
        features = length or preprocessor.positions
        arrays["positions"][:] = np.minimum(np.arange(len(arrays["positions"])), features - 1)
        arrays["kept"][:] = np.arange(len(arrays["kept"])) < features
    return arrays


def add_warm_ups(
    config: ModelConfig, signature: GraphSignature, preprocessor: Preprocessor, batch_sizes: Sequence[int]
) -> None:
    """Write the warm-ups of a model into its configuration; their files are ``warm_up_files``."""
    for length in lengths_of(signature, preprocessor):
        row = example(signature, preprocessor, length)
        for size in batch_sizes:
            warm_up = config.model_warmup.add(name="-".join(["warm", *map(str, filter(None, (length, size)))]))
            warm_up.batch_size = size  # Triton repeats the row
            for tensor in config.input:
                given = warm_up.inputs[tensor.name]
                given.data_type = tensor.data_type
                given.dims.extend(row[tensor.name].shape)
                given.input_data_file = _file(tensor.name, length)


def warm_up_files(config: ModelConfig, signature: GraphSignature, preprocessor: Preprocessor) -> dict[str, bytes]:
    """The content of the input files of a model by their names in its folder."""
    files = {}
    if config.model_warmup:
        for length in lengths_of(signature, preprocessor):
            for name, array in example(signature, preprocessor, length).items():
                files[f"{WARMUP}/{_file(name, length)}"] = np.ascontiguousarray(array).tobytes()
    return files


def _file(name: str, length: int) -> str:
    return f"{name}-{length}" if length else name


def warm_up_file_mistakes(config: ModelConfig, files: Mapping[str, int]) -> list[str]:
    """Mistakes in the input files that a configuration names.

    Args:
        files: bytes of each file by its name in the model's folder.
    """
    mistakes = []
    for warm_up, tensor, name, wanted in _named_files(config):
        size = files.get(f"{WARMUP}/{name}")
        if size is None:
            mistakes.append(f"{config.name}: warm-up {warm_up} names the file {WARMUP}/{name}, which is not there")
        elif size != wanted:
            mistakes.append(
                f"{config.name}: warm-up {warm_up}: {WARMUP}/{name} has {size} bytes, {tensor} takes {wanted}"
            )
    return mistakes


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the warm-up files in a model's folder, as ``warm_up_file_mistakes`` takes them."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted((folder / WARMUP).rglob("*"))
        if path.is_file()
    }


def _named_files(config: ModelConfig) -> Iterator[tuple[str, str, str, int]]:
    """Warm-up, tensor, file and the bytes it must have."""
    from tritonclient.grpc.model_config_pb2 import DataType

    for warm_up in config.model_warmup:
        for tensor, given in warm_up.inputs.items():
            if given.WhichOneof("input_data_type") == "input_data_file":
                width = _WIDTHS.get(DataType.Name(given.data_type), 0)
                yield warm_up.name, tensor, given.input_data_file, width * int(np.prod(given.dims))
