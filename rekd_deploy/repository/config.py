"""The config.pbtxt files of a served pair, built from its signature through Triton's own protobuf.

    input_ids, attention_mask -> rekd_selector -> scores, mask (answers); positions, kept (handed over)
    input_ids, positions, kept -> rekd_predictor -> logits, probabilities (answers)
    rekd = the ensemble of both, the model that clients ask
    rekd_single = both steps in one graph, where it was exported: the same questions, the same answers

Three flavours, by the backend of the members: ``python`` (ONNX Runtime or a TensorRT-RTX engine inside Triton's python
backend), ``onnxruntime`` and ``tensorrt`` (Triton's own). The ensemble is the same in all.

Images come as ``pixels``; a predictor that blanks is handed ``keep`` (see rekd_deploy.contract.signature).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.contract.signature import GraphSignature, TensorSpec
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config_gpu import capture, place_on_gpu, without_tf32
from rekd_deploy.repository.warmups import add_warm_ups
from rekd_train.errors import ConfigError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

SELECTOR = "rekd_selector"
PREDICTOR = "rekd_predictor"
SINGLE = "rekd_single"
ENSEMBLE = "rekd"
CONFIG_FILE = "config.pbtxt"
TARGETS = ("python", "onnxruntime", "tensorrt")
ENGINES = {"python": ("tensorrt-rtx",), "onnxruntime": (), "tensorrt": ("tensorrt",)}
"""Engines that each target can run; the plans of one product are not read by the other."""
LABEL_FILE = "labels.txt"
"""The classes, one a line, for clients that ask Triton for a classification."""
RESOURCE = "rekd"
"""What an execution takes one of, where executions are limited."""
THREADS, MAX_LENGTH, VOCABULARY_SIZE, ENGINE = "intra_op_thread_count", "max_length", "vocabulary_size", "engine"
PAD_ID = "pad_id"
"""What the python backend's model fills short texts up with when it joins them with longer ones."""
INTER_THREADS, EXECUTION_MODE, ARENA = "inter_op_thread_count", "execution_mode", "enable_mem_arena"
MEMORY_PATTERN, SHRINKAGE = "enable_mem_pattern", "memory.enable_memory_arena_shrinkage"
_SESSION = {INTER_THREADS: "1", EXECUTION_MODE: "0", ARENA: "1", MEMORY_PATTERN: "0"}
"""How the onnxruntime backend runs a graph: node by node, memory kept, not planned ahead, since shapes differ."""
_PRIORITIES = {"predictor": 1, "single": 1, "selector": 2}
"""What has begun is finished first."""

LABELLED = ("logits", "probabilities")
"""Outputs whose columns are the classes."""
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8"}


@dataclass(frozen=True)
class ServingSettings:
    """How the server runs the members."""

    max_batch_size: int = 64
    """Most items in one request and in one dynamic batch."""
    preferred_batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Batch sizes the scheduler aims at; those above max_batch_size are left out."""
    queue_delay_us: int = 0
    """Microseconds a request may wait for others to form a preferred batch."""
    instances: int = 1
    """Processes of each member."""
    threads: int = 0
    """Threads of each process inside one operation; 0: the instances share the cores."""
    gpu: bool = False
    """Whether the members of the target 'onnxruntime' run on GPUs; engines always do."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to run on, each with all instances; empty: every one that is there."""
    rate_limit: bool = False
    """Whether each execution of a member takes one of the server's resource 'rekd'."""
    warm_up: bool = True
    """Whether the members run every padded length (on GPUs every batch size, too) before they call themselves ready."""

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "queue_delay_us": 0, "instances": 1, "threads": 0}
        mistakes = [
            f"{name} is {getattr(self, name)}; it must be at least {limit}"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        if len(set(self.gpus)) != len(self.gpus) or any(number < 0 for number in self.gpus):
            mistakes.append(f"gpus {self.gpus} must be 0 or more, each once")
        if any(size < 1 for size in self.preferred_batch_sizes):
            mistakes.append(f"preferred_batch_sizes {self.preferred_batch_sizes} must all be at least 1")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def preferred(self) -> list[int]:
        """The batch sizes that the scheduler aims at."""
        return [size for size in self.preferred_batch_sizes if size <= self.max_batch_size]


def build_configs(artefacts: Artefacts, settings: ServingSettings, target: str = "python") -> dict[str, ModelConfig]:
    """The configuration of each model, by model name.

    Args:
        target: which backend runs the members; one of ``TARGETS``.

    Raises:
        RepositoryError: unknown target, or one that cannot run these artefacts' engines.
    """
    engine = check_target(artefacts, target)
    signature = artefacts.signature
    preprocessor = artefacts.preprocessor
    description = ServedDescription.of(preprocessor, artefacts.labels).to_parameters()
    parameters = {} if target == "tensorrt" else {THREADS: str(settings.threads)}
    if target == "python":
        parameters[MAX_LENGTH] = str(preprocessor.positions)
        if preprocessor.settings.kind == "text":
            parameters[VOCABULARY_SIZE] = str(preprocessor.vocabulary_size)
        if artefacts.joins_lengths:
            parameters[PAD_ID] = str(preprocessor.special_ids["pad"])
        if engine is not None:
            parameters[ENGINE] = engine
    elif target == "onnxruntime":
        parameters |= _SESSION
    on_gpu = engine is not None or (settings.gpu and target == "onnxruntime")

    def member(role: str, name: str, more: Mapping[str, str]) -> ModelConfig:
        config = _member(name, signature.graph(role), settings, target, {**parameters, **more})
        for group in config.instance_group if settings.rate_limit else ():
            group.rate_limiter.resources.add(name=RESOURCE, count=1)
            group.rate_limiter.priority = _PRIORITIES[role]
        built = artefacts.manifest["artefacts"][role]["engine"] if target == "tensorrt" else None
        if on_gpu:
            place_on_gpu(config, settings.gpus, built)
            if target == "onnxruntime":
                without_tf32(config)
        if settings.warm_up:
            sizes = sorted({1, *settings.preferred}) if on_gpu else [1]
            add_warm_ups(config, signature.graph(role), preprocessor, sizes)
        if built is not None:
            sizes = sorted({1, *settings.preferred, settings.max_batch_size})
            capture(config, signature.graph(role), preprocessor, sizes, built)
        return config

    configs = {
        SELECTOR: member("selector", SELECTOR, {}),
        PREDICTOR: member("predictor", PREDICTOR, {}),
        ENSEMBLE: _ensemble(artefacts, settings, description),
    }
    if artefacts.single is not None:
        configs[SINGLE] = member("single", SINGLE, description)
    return configs


def check_target(artefacts: Artefacts, target: str) -> str | None:
    """The product of the artefacts' engines, None without engines.

    Raises:
        RepositoryError: the target is unknown, or does not run what there is.
    """
    if target not in TARGETS:
        raise RepositoryError(f"no repository can be written for target '{target}'; choose one of {', '.join(TARGETS)}")
    entries = artefacts.manifest.get("artefacts", {})
    products = {entry["engine"]["format"] for entry in entries.values() if "engine" in entry}
    if not products and target != "tensorrt":
        return None
    if len(products) != 1 or not products <= set(ENGINES[target]):
        raise RepositoryError(
            f"target '{target}' runs {' or '.join(ENGINES[target]) or 'no'} engines; the export has "
            f"{', '.join(sorted(products)) or 'none'}; fix: --target tensorrt for TensorRT, --target python --engine "
            "tensorrt-rtx for TensorRT-RTX"
        )
    return products.pop()


def config_text(config: ModelConfig) -> str:
    """The file content: fields in declaration order, parameters sorted by key."""
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def read_config(path: Path) -> ModelConfig:
    """Parse a config.pbtxt.

    Raises:
        RepositoryError: missing, or not a model configuration.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(Path(path).read_text(encoding="utf-8"), ModelConfig())
    except FileNotFoundError:
        raise RepositoryError(f"{path} is missing; fix: write the repository again with rekd-export") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} is not a Triton model configuration: {error}") from None


def parameters_of(config: ModelConfig) -> dict[str, str]:
    """The parameters as a plain dictionary."""
    return {key: value.string_value for key, value in config.parameters.items()}


def _member(
    name: str, signature: GraphSignature, settings: ServingSettings, backend: str, parameters: Mapping[str, str]
) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelDynamicBatching, ModelInstanceGroup

    config = ModelConfig(name=name, backend=backend, max_batch_size=settings.max_batch_size)
    _declare(config, signature)
    config.dynamic_batching.CopyFrom(
        ModelDynamicBatching(
            preferred_batch_size=settings.preferred,
            max_queue_delay_microseconds=settings.queue_delay_us,
        )
    )
    # without an instance group Triton starts two CPU instances, or one a GPU
    config.instance_group.append(ModelInstanceGroup(count=settings.instances, kind=ModelInstanceGroup.KIND_CPU))
    for tensor in config.input:  # of all lengths; without it Triton joins requests of one shape only
        tensor.allow_ragged_batch = PAD_ID in parameters
    _set_parameters(config, parameters)
    return config


def _ensemble(artefacts: Artefacts, settings: ServingSettings, parameters: Mapping[str, str]) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelEnsembling

    signature = artefacts.signature
    config = ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=settings.max_batch_size)
    _declare(config, signature.ensemble)
    for model, graph in ((SELECTOR, signature.selector), (PREDICTOR, signature.predictor)):
        step = ModelEnsembling.Step(model_name=model, model_version=-1)
        for spec in graph.inputs:
            step.input_map[spec.name] = spec.name
        for spec in graph.outputs:
            step.output_map[spec.name] = spec.name
        config.ensemble_scheduling.step.append(step)
    _set_parameters(config, parameters)
    return config


def _declare(config: ModelConfig, signature: GraphSignature) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    for declared, specs in ((config.input, signature.inputs), (config.output, signature.outputs)):
        for spec in specs:
            declared.add(name=spec.name, data_type=DataType.Value(_TYPES[spec.dtype]), dims=triton_dims(spec))
    for tensor in config.output:
        if tensor.name in LABELLED:
            tensor.label_filename = LABEL_FILE


def triton_dims(spec: TensorSpec) -> list[int]:
    """Dims without the batch axis; -1 where the length is free."""
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape[1:]]


def label_text(labels: Sequence[str]) -> str:
    """The content of the file of labels: a line each."""
    return "".join(f"{' '.join(label.split())}\n" for label in labels)


def _set_parameters(config: ModelConfig, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value
