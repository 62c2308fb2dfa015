"""The small files beside a config.pbtxt that it names: labels, and the inputs of warm-ups.

Warm-ups are the first requests of every model, which Triton sends to itself before it calls a model ready.

One for each padded length; on GPUs one for each size of batch, too. Their inputs lie in <model>/warmup/: Triton's own
random data draws ids from all of int64, and a warm-up that fails takes a real server down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.signature import LENGTH, GraphSignature
from rekd_deploy.repository.config import LABEL_FILE, PREDICTOR, SELECTOR, SINGLE
from rekd_train.inputs.preprocessors import Preprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

WARMUP = "warmup"
"""The folder of a model where Triton looks for input files."""
Arrays = dict[str, np.ndarray]
_ROLES = {SELECTOR: "selector", PREDICTOR: "predictor", SINGLE: "single"}


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


def model_files(configs: Mapping[str, ModelConfig], artefacts: Artefacts) -> dict[str, bytes]:
    """Content by name: ``rekd/labels.txt``, ``rekd_selector/warmup/input_ids-32``."""
    files = {}
    for name, config in configs.items():
        if any(tensor.label_filename for tensor in config.output):
            files[f"{name}/{LABEL_FILE}"] = label_text(artefacts.labels).encode()
        if name in _ROLES:
            signature = artefacts.signature.graph(_ROLES[name])
            for place, content in warm_up_files(config, signature, artefacts.preprocessor).items():
                files[f"{name}/{place}"] = content
    return files


def label_text(labels: Sequence[str]) -> str:
    """The content of the file of labels: a line each."""
    return "".join(f"{' '.join(label.split())}\n" for label in labels)
