"""The config.pbtxt files of a served pair, built from its signature through Triton's own protobuf.

    input_ids, attention_mask -> rekd_selector -> scores, mask (answers); positions, kept (handed over)
    input_ids, positions, kept -> rekd_predictor -> logits, probabilities (answers)
    rekd = the ensemble of both, the model that clients call
    rekd_single = both steps in one graph, where it was exported: the same requests, the same responses

Three flavours, by the backend of the component models: ``python`` (ONNX Runtime or a TensorRT-RTX engine in Triton's
python backend), ``onnxruntime`` and ``tensorrt`` (Triton's own). The ensemble is the same in all.

Images come as ``pixels``; a predictor that blanks is handed ``keep`` (see rekd_deploy.contract.signature).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.description import Artefacts, ServedDescription
from rekd_deploy.contract.signature import GraphSignature, TensorSpec
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import (
    ARENA,
    ENGINE,
    ENGINES,
    ENSEMBLE,
    EXECUTION_MODE,
    INTER_THREADS,
    LABEL_FILE,
    MAX_LENGTH,
    MEMORY_PATTERN,
    PAD_ID,
    PREDICTOR,
    RESOURCE,
    SELECTOR,
    SINGLE,
    TARGETS,
    THREADS,
    VOCABULARY_SIZE,
    ServingSettings,
)
from rekd_deploy.repository.warmups import add_warm_ups, lengths_of
from rekd_train.inputs.preprocessors import Preprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_SESSION = {INTER_THREADS: "1", EXECUTION_MODE: "0", ARENA: "1", MEMORY_PATTERN: "0"}
"""How the onnxruntime backend runs a graph: node by node, memory kept, not planned ahead, since shapes differ."""
_PRIORITIES = {"predictor": 1, "single": 1, "selector": 2}
"""What has begun is finished first."""

LABELLED = ("logits", "probabilities")
"""Outputs whose columns are the classes."""
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8"}


def build_configs(artefacts: Artefacts, settings: ServingSettings, target: str = "python") -> dict[str, ModelConfig]:
    """The configuration of each model, by model name.

    Args:
        target: which backend runs the component models; one of ``TARGETS``.

    Raises:
        RepositoryError: unknown target, or one that cannot run these artefacts' engines; or larger batches than they.
    """
    engine = check_target(artefacts, target)
    _check_batches(artefacts, settings)
    signature = artefacts.signature
    preprocessor = artefacts.preprocessor
    description = ServedDescription.of(preprocessor, artefacts.labels).to_parameters()
    on_gpu = engine is not None or settings.gpu
    parameters = {THREADS: str(settings.threads)} if target == "onnxruntime" or not on_gpu else {}
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
    sizes = sorted({1, *settings.preferred, settings.max_batch_size}) if on_gpu else [1]

    def component(role: str, name: str, more: Mapping[str, str]) -> ModelConfig:
        config = _component(name, signature.graph(role), settings, target, {**parameters, **more})
        for group in config.instance_group if settings.rate_limit else ():
            group.rate_limiter.resources.add(name=RESOURCE, count=1)
            group.rate_limiter.priority = _PRIORITIES[role]
        built = artefacts.manifest["artefacts"][role]["engine"] if target == "tensorrt" else None
        if on_gpu:
            place_on_gpu(config, settings.gpus, built)
            if target == "onnxruntime":
                without_tf32(config)
        if settings.warm_up:
            add_warm_ups(config, signature.graph(role), preprocessor, sizes)
        if built is not None:
            capture(config, signature.graph(role), preprocessor, sizes, built)
        return config

    configs = {
        SELECTOR: component("selector", SELECTOR, {}),
        PREDICTOR: component("predictor", PREDICTOR, {}),
        ENSEMBLE: _ensemble(artefacts, settings, description),
    }
    if artefacts.single is not None:
        configs[SINGLE] = component("single", SINGLE, description)
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


def _check_batches(artefacts: Artefacts, settings: ServingSettings) -> None:
    for role, entry in artefacts.manifest.get("artefacts", {}).items():
        profiles = entry["engine"]["profiles"] if "engine" in entry else ()
        most = max((shapes[2][0] for profile in profiles for shapes in profile.values()), default=None)
        if most is not None and settings.max_batch_size > most:
            raise RepositoryError(
                f"max_batch_size is {settings.max_batch_size}, but the engine of the {role} takes at most {most}; fix: "
                "build the engines for it, or serve smaller batches"
            )


def _component(
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


def _set_parameters(config: ModelConfig, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def place_on_gpu(config: ModelConfig, gpus: Sequence[int], engine: Mapping[str, Any] | None) -> None:
    """One instance group on these GPUs; with the names of an engine's profiles, all of which Triton may choose."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    for group in config.instance_group:
        group.kind = ModelInstanceGroup.KIND_GPU
        group.gpus.extend(gpus)
        if engine is not None:
            group.profile.extend(map(str, range(len(engine["profiles"]))))


def without_tf32(config: ModelConfig) -> None:
    """fp32 products as the gate has proved them: the onnxruntime backend hands this to its CUDA provider."""
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    accelerator.parameters["use_tf32"] = "0"


def capture(
    config: ModelConfig,
    signature: GraphSignature,
    preprocessor: Preprocessor,
    batch_sizes: Sequence[int],
    engine: Mapping[str, Any],
) -> None:
    """CUDA graphs of a TensorRT engine, launched as one where a request has their shape.

    With one profile there is a graph for each padded length and batch size. It also serves the batches between the size
    below and its own: the rows that are not there are what the last batch left in the buffers, and are thrown away. The
    length must be exact, since rows that are shorter would be read at the wrong places.

    The backend tries every specification on every profile, and one outside is an error in its log. So with several
    profiles there is none: then the backend captures each profile at the lengths that it is tuned for.
    """
    config.optimization.cuda.graphs = True
    if len(engine["profiles"]) > 1:
        return
    for length in lengths_of(signature, preprocessor):
        for below, size in zip([0, *batch_sizes], batch_sizes, strict=False):
            spec = config.optimization.cuda.graph_spec.add(batch_size=size)
            spec.graph_lower_bound.batch_size = below + 1
            for shapes in (spec.input, spec.graph_lower_bound.input):
                for tensor in signature.inputs:
                    shapes[tensor.name].dim.extend(signature.sizes_at(tensor, length)[1:])
