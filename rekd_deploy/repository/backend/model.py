"""A component model in Triton's python backend: runs the ONNX graph, or the engine, beside it.

This file is copied into the repository as ``<model>/1/model.py``, so it stands alone: NumPy, ONNX Runtime (or the
engine's library and ``tensorrt_execution.py``), ``triton_batches.py`` and ``triton_cuda.py`` beside it and Triton's
own utilities only. Every graph of a repository, of texts or images, uses the same file.

A dynamic batch arrives as a list of requests, texts of all lengths among them. Requests of similar length are padded to
the longest of them and run as one batch; each answer is cut to its request's own rows and length. A request with bad
values gets an error of its own and its neighbours do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

Arrays = dict[str, np.ndarray]
_ID_LENGTH, _LINE_LENGTH = 128, 1000
"""Of what clients send, at most this many characters reach the log."""


class TritonPythonModel:
    """The class that Triton's stub process looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the graph.

        Args:
            args: as Triton gives them; ``model_config`` is JSON, ``model_repository`` the model's folder.
        """
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._checker = InputChecker(int(parameters["max_length"]), int(parameters.get("vocabulary_size", 0)))
        self._pad_id = int(parameters.get("pad_id", 0))  # without it Triton joins requests of one length only
        folder = Path(args["model_repository"]) / args["model_version"]
        self._batches = module_beside(folder, "triton_batches")
        device = int(args.get("model_instance_device_id") or 0)
        if product := parameters.get("engine"):
            self._graph = EngineGraph(folder, product, device)
        elif args.get("model_instance_kind") == "GPU":
            sizes = {1, *config["dynamic_batching"].get("preferred_batch_size", ()), config["max_batch_size"]}
            self._graph = module_beside(folder, "triton_cuda").CapturedGraph(folder, device, sizes)
            if not self._graph.captured:
                triton_python_backend_utils.Logger.log_warn(f"{folder} has an LSTM: no CUDA graph, which is slower")
        else:
            instances = sum(int(group.get("count", 1)) for group in config["instance_group"])
            # all instances share the cores, and so do selector, predictor and Triton: half of them is the most
            threads = int(parameters["intra_op_thread_count"]) or max(1, usable_cores() // max(2, instances))
            self._graph = OnnxGraph(folder, threads)

    def execute(self, requests: Sequence) -> list:
        """Answer each request, in order."""
        answers: list = [None] * len(requests)
        accepted: dict[int, Arrays] = {}
        for index, request in enumerate(requests):
            inputs = {given.name(): given.as_numpy() for given in request.inputs()}
            reason = self._checker.reason_to_refuse(inputs)
            if reason is None:
                accepted[index] = inputs
            else:
                answers[index] = self._refusal(request, reason, self._triton.TritonError.INVALID_ARG)
        for indices in self._batches.groups_by_length(accepted):
            for index, answer in self._run(indices, accepted, requests).items():
                answers[index] = answer
        return answers

    def finalize(self) -> None:
        """Close the graph."""
        graph, self._graph = self._graph, None
        graph.close()

    def _run(self, indices: list[int], inputs: Mapping[int, Arrays], requests: Sequence) -> dict:
        wanted = {index: list(requests[index].requested_output_names()) for index in indices}
        names = sorted({name for index in indices for name in wanted[index]})
        try:
            given = [inputs[i] for i in indices]
            outputs = self._graph.run(names, self._batches.joined(given, self._pad_id))
            rows = self._batches.split_rows(outputs, names, given)
        except Exception as error:  # whatever ONNX Runtime or the engine raises
            if len(indices) > 1:  # find the request that is to blame
                return {key: value for i in indices for key, value in self._run([i], inputs, requests).items()}
            first, internal = indices[0], self._triton.TritonError.INTERNAL
            return {first: self._refusal(requests[first], f"the graph failed: {error}", internal)}
        return {
            index: self._triton.InferenceResponse(
                [self._triton.Tensor(name, outputs[name]) for name in wanted[index]]
            )
            for index, outputs in zip(indices, rows, strict=True)
        }

    def _refusal(self, request, reason: str, code: int):
        log_refusal(self._triton, request, reason)
        return self._triton.InferenceResponse(error=self._triton.TritonError(reason, code))


def module_beside(folder: Path, name: str) -> ModuleType:
    """A Python file of a model's version folder: of that version, whatever lies on the path."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_refusal(triton, request, reason: str) -> None:
    """Write the id that the client gave its request, and why it gets an error, to the server's log, in one line."""
    name = ascii(request.request_id())[1:-1][:_ID_LENGTH]
    triton.Logger.log_warn(" ".join(f"[request id: {name or '<none>'}] {reason}".split())[:_LINE_LENGTH])


class OnnxGraph:
    """model.onnx on ONNX Runtime.

    Args:
        folder: where it lies.
        threads: inside one operation; 0: one a core.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()  # the same as the gate's: rekd_deploy/runtimes/onnxruntime.py
        # ONNX Runtime's own 0 would pin its threads to cores that selector and predictor share
        options.intra_op_num_threads = threads or usable_cores()
        # selector and predictor take turns on the same cores: a waiting one must not spin; within a run it pays
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_mem_pattern = False  # lengths differ from batch to batch
        options.inter_op_num_threads = 1
        path = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        """The outputs of these names."""
        return self._session.run(list(names), inputs)

    def close(self) -> None:
        self._session = None


def usable_cores(quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may use: its affinity, and the quota of its container, which affinity does not show."""
    cores = len(os.sched_getaffinity(0))
    try:
        allowed, period = Path(quota).read_text().split()
        return max(1, min(cores, -(-int(allowed) // int(period))))
    except (OSError, ValueError):  # no such file, or 'max': no quota
        return cores


class EngineGraph:
    """model.plan on a GPU, run by the ``tensorrt_execution.py`` beside it.

    Args:
        folder: where both lie.
        product: 'tensorrt-rtx'.
        device: index of the GPU.
    """

    def __init__(self, folder: Path, product: str, device: int) -> None:
        execution = module_beside(folder, "tensorrt_execution")
        api = importlib.import_module(product.replace("-", "_"))
        logger = api.Logger(api.Logger.ERROR)  # writes to the server's log
        plan = (folder / "model.plan").read_bytes()
        self._execution = execution.EngineExecution(api, plan, logger, lambda: "see the server's log", device)

    def run(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        """The outputs of these names."""
        outputs = self._execution.run(inputs)
        return [outputs[name] for name in names]

    def close(self) -> None:
        """Give the device memory back."""
        self._execution.close()


class InputChecker:
    """Refuses values that the graph would misread: ONNX Runtime wraps negative ids around without a word.

    Args:
        max_length: tokens of the longest text; patches of every image.
        vocabulary_size: ids lie in 0..vocabulary_size - 1; 0 for images.
    """

    def __init__(self, max_length: int, vocabulary_size: int = 0) -> None:
        self._max_length = max_length
        self._vocabulary_size = vocabulary_size

    def reason_to_refuse(self, inputs: Arrays) -> str | None:
        """Why these inputs cannot be answered, or None.

        Args:
            inputs: by name; (B, N) ``input_ids`` and ``attention_mask``, or ``pixels``; (B, K) ``positions`` and
                ``kept``, or (B, N) ``keep``.
        """
        for name, array in inputs.items():
            if array.ndim < 2 or 0 in array.shape:
                return f"{name} has shape {list(array.shape)}; no axis may be empty"
        ids = inputs.get("input_ids")
        if ids is None:  # images: Triton itself holds their shape against the config
            return self._handover_reason(inputs, self._max_length)
        length = ids.shape[1]
        if length > self._max_length:
            return f"input_ids has {length} columns; the model reads at most {self._max_length}"
        if reason := _outside("input_ids", ids, self._vocabulary_size, "the vocabulary"):
            return reason
        mask = inputs.get("attention_mask")
        if mask is not None:
            if mask.shape != ids.shape:
                return f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; they must be equal"
            if reason := _outside("attention_mask", mask, 2, "the allowed values"):
                return reason
            real = np.maximum.reduce(mask, axis=1)
            if not np.minimum.reduce(real):
                return f"row {int(np.argmin(real))} of attention_mask is all 0; a text has at least one token"
        return self._handover_reason(inputs, length)

    def _handover_reason(self, inputs: Arrays, length: int) -> str | None:
        """As ``reason_to_refuse``, of what the selector handed over for ``length`` features."""
        keep, positions = inputs.get("keep"), inputs.get("positions")
        if keep is not None and keep.shape[1] != length:
            return f"keep has {keep.shape[1]} columns; the input has {length} features"
        if positions is not None:
            if positions.shape != inputs["kept"].shape:
                return f"positions has shape {list(positions.shape)} and kept {list(inputs['kept'].shape)}"
            return _outside("positions", positions, length, "the sequence" if "input_ids" in inputs else "the patches")
        return None


def _outside(name: str, array: np.ndarray, limit: int, what: str) -> str | None:
    if array.dtype == np.int64 and np.maximum.reduce(array.view(np.uint64), axis=None) < limit:
        return None  # one reading: as an unsigned number a negative one is the largest
    bad = (array < 0) | (array >= limit)
    if not bad.any():
        return None
    row, column = np.argwhere(bad)[0]
    return f"{name}[{row}, {column}] is {array[row, column]}, outside {what} 0..{limit - 1}"
