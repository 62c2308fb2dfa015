"""The config.pbtxt files of a served pair, built from its signature, and the small files beside them that they name.

    input_ids, attention_mask -> rekd_selector -> scores, mask (answers); positions, kept (handed over)
    input_ids, positions, kept -> rekd_predictor -> logits, probabilities (answers)
    rekd = the ensemble of both, the model that clients call
    rekd_single = both steps in one graph, where it was exported: the same requests, the same responses

The target is the backend of the component models: ``python`` (ONNX Runtime or a TensorRT-RTX engine in Triton's python
backend), ``onnxruntime`` or ``tensorrt`` (Triton's own). The ensemble is the same for all.

Triton sends the warm-ups to itself before it calls a model ready: one for each padded length, on GPUs for each size of
batch, too. Their inputs are files: Triton's own random data draws ids from all of int64, and a warm-up that fails takes
a real server down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.signature import LENGTH, SHORTEST, GraphSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository import config
from rekd_deploy.repository.config import ServingSettings
from rekd_train.inputs.preprocessors import Preprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_SESSION = {"inter_op_thread_count": "1", "execution_mode": "0", "enable_mem_arena": "1", "enable_mem_pattern": "0"}
"""How the onnxruntime backend runs a graph: node by node, memory kept, not planned ahead, since shapes differ."""
_PRIORITIES = {"predictor": 1, "single": 1, "selector": 2}
"""What has begun is finished first."""


def build_configs(artefacts: Artefacts, settings: ServingSettings, target: str = "python") -> dict[str, ModelConfig]:
    """The configuration of each model, by model name; ``target``: one of ``TARGETS``.

    Raises:
        RepositoryError: unknown target, or one that cannot run these artefacts' engines; or larger batches than they.
    """
    _check_engines(artefacts, settings, target)
    pair = artefacts.signature
    description = artefacts.description.to_parameters()
    configs = {
        config.SELECTOR: _component(artefacts, settings, target, "selector", {}),
        config.PREDICTOR: _component(artefacts, settings, target, "predictor", {}),
    }
    configs[config.ENSEMBLE] = config.parsed({
        "name": config.ENSEMBLE, "platform": "ensemble", "max_batch_size": settings.max_batch_size,
        "input": config.tensors(pair.ensemble.inputs), "output": _outputs(pair.ensemble),
        "parameters": config.strings(description),
        "ensemble_scheduling": {"step": [
            config.step(name, config.tensors(graph.inputs), config.tensors(graph.outputs))
            for name, graph in zip(config.COMPONENTS, (pair.selector, pair.predictor), strict=True)
        ]},
    })
    if artefacts.single is not None:
        configs[config.SINGLE] = _component(artefacts, settings, target, "single", description)
    return configs


def _check_engines(artefacts: Artefacts, settings: ServingSettings, target: str) -> None:
    """Raise RepositoryError where the target is unknown, or it or the settings do not fit the engines."""
    if target not in config.TARGETS:
        targets = ", ".join(config.TARGETS)
        raise RepositoryError(f"no repository can be written for target '{target}'; choose one of {targets}")
    engines = {role: entry for role in config.GRAPH_MODELS if (entry := _engine(artefacts, role)) is not None}
    products = {entry["format"] for entry in engines.values()}
    if (products or target == "tensorrt") and (len(products) != 1 or not products <= set(config.ENGINES[target])):
        raise RepositoryError(
            f"target '{target}' runs {' or '.join(config.ENGINES[target]) or 'no'} engines; the export has "
            f"{', '.join(sorted(products)) or 'none'}; fix: --target tensorrt for TensorRT, --target python --engine "
            "tensorrt-rtx for TensorRT-RTX"
        )
    for role, entry in engines.items():
        if settings.max_batch_size > (most := largest_batch(entry)):
            raise RepositoryError(
                f"max_batch_size is {settings.max_batch_size}, but the engine of the {role} takes at most {most}; fix: "
                "build the engines for it, or serve smaller batches"
            )


def largest_batch(engine: Mapping[str, Any]) -> int:
    """The largest batch that an engine with this manifest entry accepts."""
    return max(shapes[2][0] for profile in engine["profiles"] for shapes in profile.values())


def _engine(artefacts: Artefacts, role: str) -> dict[str, Any] | None:
    return artefacts.manifest.get("artefacts", {}).get(role, {}).get("engine")


def _component(
    artefacts: Artefacts, settings: ServingSettings, target: str, role: str, description: Mapping[str, str]
) -> ModelConfig:
    signature, preprocessor, engine = artefacts.signature.graph(role), artefacts.preprocessor, _engine(artefacts, role)
    on_gpu = settings.gpu or engine is not None
    parameters = {config.THREADS: str(settings.threads)} if target == "onnxruntime" or not on_gpu else {}
    optimization: dict[str, Any] = {}
    # without an instance group Triton starts two CPU instances, or one a GPU
    group: dict[str, Any] = {"count": settings.instances, "kind": "KIND_GPU" if on_gpu else "KIND_CPU"}
    if on_gpu:
        group["gpus"] = list(settings.gpus)
    if settings.rate_limit:
        resources = [{"name": "rekd", "count": 1}]  # each execution takes one of the server's
        group["rate_limiter"] = {"resources": resources, "priority": _PRIORITIES[role]}
    if target == "python":
        parameters["max_length"] = str(preprocessor.positions)
        if preprocessor.settings.kind == "text":
            parameters["vocabulary_size"] = str(preprocessor.vocabulary_size)
        if artefacts.joins_lengths:
            parameters["pad_id"] = str(preprocessor.special_ids["pad"])
            parameters |= {} if on_gpu else shortest_length(artefacts)
        if engine is not None:
            parameters[config.ENGINE] = engine["format"]
    elif target == "onnxruntime":
        parameters |= _SESSION
        if on_gpu:  # fp32 products as the gate has proved them: the backend hands this to its CUDA provider
            cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
            optimization = {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}
    sizes = sorted({1, *settings.preferred, settings.max_batch_size}) if on_gpu else [1]
    if target == "tensorrt" and engine is not None:
        group["profile"] = [str(number) for number in range(len(engine["profiles"]))]  # Triton may choose all of them
        optimization = {"cuda": {"graphs": True, "graph_spec": _graph_specs(signature, preprocessor, sizes, engine)}}
    ragged = "pad_id" in parameters  # of all lengths; without it Triton joins requests of one shape only
    return config.parsed({
        "name": config.GRAPH_MODELS[role], "backend": target, "max_batch_size": settings.max_batch_size,
        "input": [{**tensor, "allow_ragged_batch": ragged} for tensor in config.tensors(signature.inputs)],
        "output": _outputs(signature),
        "dynamic_batching": {
            "preferred_batch_size": settings.preferred, "max_queue_delay_microseconds": settings.queue_delay_us
        },
        "instance_group": [group],
        **({"optimization": optimization} if optimization else {}),
        "parameters": config.strings({**parameters, **description}),
        "model_warmup": [
            _warm_up(example(signature, preprocessor, length), length, size)  # Triton repeats the row
            for length in lengths_of(signature, preprocessor) for size in sizes
        ],
    })


def shortest_length(artefacts: Artefacts) -> dict[str, str]:
    """The parameter that says down to how many tokens padding may be cut off: with no fewer than a fixed K."""
    handed = {spec.name: spec.shape[1] for spec in artefacts.signature.predictor.inputs}
    slots = handed.get("positions", 0)  # or they follow the length
    least = max(SHORTEST, artefacts.manifest["policy"]["minimum"] + 2, slots if isinstance(slots, int) else 0)
    return {config.SHORTEST_LENGTH: str(least)}


def _graph_specs(
    signature: GraphSignature, preprocessor: Preprocessor, batch_sizes: list[int], engine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """CUDA graphs of a TensorRT engine with one profile: one for each padded length and batch size.

    A graph also serves the batches between the size below and its own: the rows that are not there are what the last
    batch left in the buffers, and are thrown away. The length must be exact: shorter rows would be read at the wrong
    places. With several profiles none is specified, since the backend tries each on every profile, and one outside is
    an error in its log; it then captures each profile at the lengths that it is tuned for.
    """
    specs = []
    for length in lengths_of(signature, preprocessor) if len(engine["profiles"]) == 1 else ():
        shapes = {spec.name: {"dim": list(signature.sizes_at(spec, length)[1:])} for spec in signature.inputs}
        for below, size in zip([0, *batch_sizes], batch_sizes, strict=False):
            bound = {"batch_size": below + 1, "input": shapes}
            specs.append({"batch_size": size, "input": shapes, "graph_lower_bound": bound})
    return specs


def _outputs(signature: GraphSignature) -> list[dict[str, Any]]:
    labels = {"label_filename": config.LABEL_FILE}  # a column for each class
    labelled = dict.fromkeys(("logits", "probabilities"), labels)
    return [{**each, **labelled.get(each["name"], {})} for each in config.tensors(signature.outputs)]


def lengths_of(signature: GraphSignature, preprocessor: Preprocessor) -> tuple[int, ...]:
    """The padded lengths that requests have; (0,) where no axis is free."""
    has_length = any(LENGTH in spec.shape for spec in signature.inputs)
    return tuple(preprocessor.settings.buckets) if has_length else (0,)


def example(signature: GraphSignature, preprocessor: Preprocessor, length: int) -> dict[str, np.ndarray]:
    """One row of valid inputs by name, without the batch axis; ``length``: tokens of a text, 0 for images."""
    arrays = {spec.name: np.zeros(signature.sizes_at(spec, length)[1:], spec.dtype) for spec in signature.inputs}
    if "input_ids" in arrays:
        special, (start, *ends), ids = preprocessor.special_ids, preprocessor.around, arrays["input_ids"]
        ids[:] = next(n for n in range(len(special) + 1) if n not in special.values())
        ids[0], ids[len(ids) - len(ends) :] = start, ends
    for name in {"attention_mask", "keep"} & set(arrays):
        arrays[name][:] = 1
    if "positions" in arrays:
        features, slots = length or preprocessor.positions, np.arange(len(arrays["positions"]))
        arrays["positions"][:], arrays["kept"][:] = np.minimum(slots, features - 1), slots < features
    return arrays


def _warm_up(row: Mapping[str, np.ndarray], length: int, size: int) -> dict[str, Any]:
    inputs = {
        name: {"data_type": config.DATA_TYPES[a.dtype.name], "dims": [*a.shape], "input_data_file": _file(name, length)}
        for name, a in row.items()
    }
    return {"name": f"{_file('warm', length)}-{size}", "batch_size": size, "inputs": inputs}


def _file(name: str, length: int) -> str:
    return f"{name}-{length}" if length else name


def model_files(configs: Mapping[str, ModelConfig], artefacts: Artefacts) -> dict[str, bytes]:
    """What the configurations name, by its path: ``rekd/labels.txt``, ``rekd_selector/warmup/input_ids-32``."""
    labels = "".join(f"{' '.join(label.split())}\n" for label in artefacts.labels).encode()
    labelled = (config.PREDICTOR, config.SINGLE, config.ENSEMBLE)
    files = {f"{model}/{config.LABEL_FILE}": labels for model in labelled if model in configs}
    for role, model in config.GRAPH_MODELS.items():
        if model in configs:
            signature = artefacts.signature.graph(role)
            for length in lengths_of(signature, artefacts.preprocessor):
                for name, array in example(signature, artefacts.preprocessor, length).items():
                    files[f"{model}/{config.WARMUP}/{_file(name, length)}"] = array.tobytes()
    return files
