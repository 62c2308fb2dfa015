"""Triton's onnxruntime backend of the mind: loads and runs a repository as release 24.10 was seen to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

_TYPES = {
    "TYPE_INT64": ("tensor(int64)", np.int64), "TYPE_FP32": ("tensor(float)", np.float32),
    "TYPE_BOOL": ("tensor(bool)", np.bool_), "TYPE_UINT8": ("tensor(uint8)", np.uint8),
}
_LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}


class Model:
    """One component model, loaded and warmed up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read(folder)
        versions = [int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdecimal()]
        served = list(self.config.version_policy.specific.versions) or [max(versions)]
        self.sessions = {version: self._session(folder / str(version)) for version in served}
        for warmup in self.config.model_warmup:
            self._warm_up(warmup)

    def _session(self, folder: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        parameters = {key: value.string_value for key, value in self.config.parameters.items()}
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
        options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
        options.execution_mode = onnxruntime.ExecutionMode.__members__[
            "ORT_PARALLEL" if parameters.get("execution_mode", "0") == "1" else "ORT_SEQUENTIAL"
        ]
        options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", "1") == "1"
        options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") == "1"
        level = _LEVELS[self.config.optimization.graph.level]
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        path = str(folder / "model.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = self.config.name
        given = {value.name: value for value in session.get_inputs()}
        require(set(given) == {tensor.name for tensor in self.config.input}, f"{name}: inputs differ from the graph's")
        for kind, tensors, values in (
            ("input", self.config.input, given),
            ("output", self.config.output, {value.name: value for value in session.get_outputs()}),
        ):
            for tensor in tensors:
                where = f"{name}: {kind} {tensor.name}"
                require(tensor.name in values, f"{where} is not in the graph")
                value = values[tensor.name]
                require(value.type == _TYPES[type_name(tensor)][0], f"{where} is {value.type} in the graph")
                axes = [size if isinstance(size, int) else -1 for size in value.shape]
                require(axes[:1] == [-1], f"{where}: the batch axis is not free")
                fits = all(want == size or (kind == "input" and size == -1 and want > 0)
                           for want, size in zip(tensor.dims, axes[1:], strict=True))
                require(fits, f"{where}: dims {list(tensor.dims)} are not the graph's {axes[1:]}")
        return session

    def _warm_up(self, warmup) -> None:
        inputs = {}
        require(set(warmup.inputs) == {tensor.name for tensor in self.config.input}, f"{warmup.name}: inputs differ")
        for name, given in warmup.inputs.items():
            tensor = next(tensor for tensor in self.config.input if tensor.name == name)
            require(given.data_type == tensor.data_type, f"{warmup.name}: {name} is of another type")
            content = (self.folder / "warmup" / given.input_data_file).read_bytes()
            row = np.frombuffer(content, _TYPES[type_name(tensor)][1]).reshape(given.dims)
            inputs[name] = np.repeat(row[None], warmup.batch_size, axis=0)
        self.run(inputs)

    def run(self, inputs, version: int | None = None):
        """All outputs by name, checked against the configuration."""
        session = self.sessions[version or max(self.sessions)]
        rows = len(next(iter(inputs.values())))
        require(1 <= rows <= self.config.max_batch_size, f"{rows} rows")
        for tensor in self.config.input:
            array = inputs[tensor.name]
            require(array.dtype == _TYPES[type_name(tensor)][1], f"{tensor.name} is {array.dtype}")
            fits = array.ndim == 1 + len(tensor.dims) and all(
                want in (-1, size) for want, size in zip(tensor.dims, array.shape[1:], strict=True)
            )
            require(fits, f"{tensor.name} has shape {array.shape}")
        names = [tensor.name for tensor in self.config.output]
        answers = dict(zip(names, session.run(names, inputs), strict=True))
        for tensor in self.config.output:
            found = answers[tensor.name].shape
            fits = len(found) == 1 + len(tensor.dims) and found[0] == rows
            require(fits and all(want in (-1, size) for want, size in zip(tensor.dims, found[1:], strict=True)),
                    f"{tensor.name} has shape {found}")
        return answers


class Server:
    """A whole repository of the target 'onnxruntime'."""

    def __init__(self, root: Path) -> None:
        self.models, self.ensembles = {}, {}
        for folder in sorted(entry for entry in Path(root).iterdir() if entry.is_dir()):
            config = read(folder)
            require(config.name == folder.name, f"{folder} holds {config.name}")
            if config.platform == "ensemble":
                require(any(entry.name.isdecimal() for entry in folder.iterdir()), f"{folder} has no version folder")
                require(not config.instance_group and not config.HasField("dynamic_batching"), f"{folder}: an ensemble")
                self.ensembles[config.name] = config
            elif config.backend == "onnxruntime":
                self.models[config.name] = Model(folder)

    def infer(self, name: str, inputs):
        """What an ensemble answers."""
        config = self.ensembles[name]
        known = dict(inputs)
        for step in config.ensemble_scheduling.step:
            given = {name: known[source] for name, source in step.input_map.items()}
            answers = self.models[step.model_name].run(given, step.model_version)
            known |= {target: answers[name] for name, target in step.output_map.items()}
        return {tensor.name: known[tensor.name] for tensor in config.output}


def read(folder: Path):
    """The configuration; unknown fields are errors, as they are for Triton."""
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def type_name(tensor) -> str:
    return DataType.Name(tensor.data_type)


def require(holds: bool, otherwise: str) -> None:
    assert holds, otherwise
