"""A component model in Triton's python backend: runs the ONNX graph, or the engine, beside it.

This file is copied into the repository as ``<model>/1/model.py``, so it stands alone: NumPy, ``triton_graphs.py`` and
``triton_tensors.py`` beside it and Triton's own utilities only. Every graph of a repository, of texts or images, uses
the same file.

A dynamic batch arrives as a list of requests, texts of all lengths among them. Where padding takes less time than a run
they are padded to the longest and run as one batch; each answer is cut to its request's own rows and length. A request
with bad values gets an error of its own and its neighbours do not.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
_RUN_ON_GPU = 256.0
"""What a run on a GPU costs beside its tokens, in tokens; a low guess, as in rekd_deploy/client/batching.py."""
_ID_LENGTH, _LINE_LENGTH = 128, 1000
"""Of what clients send, at most this many characters reach the log."""


class TritonPythonModel:
    """The class that Triton's stub process looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the graph; ``model_config`` is JSON, ``model_repository`` the model's folder."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        model = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in model["parameters"].items()}
        self._checker = InputChecker(int(parameters["max_length"]), int(parameters.get("vocabulary_size", 0)))
        self._pad_id = int(parameters.get("pad_id", 0))  # without it Triton joins requests of one length only
        folder = Path(args["model_repository"]) / args["model_version"]
        device, graphs = int(args.get("model_instance_device_id") or 0), module_beside(folder, "triton_graphs")
        self._tensors, self._run_in_tokens = module_beside(folder, "triton_tensors"), _RUN_ON_GPU
        samples = samples_of(model.get("model_warmup", ()), folder.parent / "warmup")
        if product := parameters.get("engine"):
            execution = module_beside(folder, "tensorrt_execution")
            self._graph = graphs.EngineGraph(folder, product, device, execution)
        elif args.get("model_instance_kind") == "GPU":
            sizes = {1, *model["dynamic_batching"].get("preferred_batch_size", ()), model["max_batch_size"]}
            self._graph = graphs.CapturedGraph(folder, device, sizes)
            if not self._graph.captured:
                triton_python_backend_utils.Logger.log_warn(f"{folder} has an LSTM: no CUDA graph, which is slower")
        else:
            self._graph = graphs.OnnxGraph(folder, threads_of(model), shortest_of(model))
            self._run_in_tokens = self._graph.run_in_tokens([each for each in samples if "input_ids" in each])
        if samples:
            self._try_out(samples[0], [output["name"] for output in model["output"]])

    def execute(self, requests: Sequence) -> list:
        """Answer each request, in order."""
        answers: list = [None] * len(requests)
        accepted: dict[int, Arrays] = {}
        for index, request in enumerate(requests):
            inputs = {given.name(): self._tensors.as_array(given) for given in request.inputs()}
            accepted[index] = inputs
            if reason := self._checker.reason_to_refuse(inputs):
                del accepted[index]
                answers[index] = refusal(self._triton, request, reason, self._triton.TritonError.INVALID_ARG)
        for indices in groups_by_length(accepted, self._run_in_tokens):
            for index, answer in self._run(indices, accepted, requests).items():
                answers[index] = answer
        return answers

    def finalize(self) -> None:
        """Close the graph."""
        graph, self._graph = self._graph, None
        graph.close()

    def _try_out(self, sample: Arrays, names: Sequence[str]) -> None:
        """Run a sample that has gone through Triton's tensors; a failure here fails the load, and says why.

        Left to the warm-up, it can end Triton itself: release 24.10 stops an instance's thread before the thread has
        noted its instance (core, ``StopBackendThread``).
        """
        sent = [self._tensors.as_tensor(self._triton, name, array) for name, array in sample.items()]
        inputs = {tensor.name(): self._tensors.as_array(tensor) for tensor in sent}
        if wrong := sorted(name for name in sample if not np.array_equal(inputs[name], sample[name])):
            raise RuntimeError(f"Triton's stub misreads {', '.join(wrong)}; fix: another NumPy, or export again")
        self._graph.run(names, inputs)

    def _run(self, indices: list[int], inputs: Mapping[int, Arrays], requests: Sequence) -> dict:
        wanted = {index: list(requests[index].requested_output_names()) for index in indices}
        names = sorted({name for index in indices for name in wanted[index]})
        given = [inputs[index] for index in indices]
        try:
            rows = split_rows(self._graph.run(names, joined(given, self._pad_id)), names, given)
        except Exception as error:  # whatever ONNX Runtime or the engine raises
            if len(indices) > 1:  # find the request that is to blame
                return {key: value for i in indices for key, value in self._run([i], inputs, requests).items()}
            first, internal = indices[0], self._triton.TritonError.INTERNAL
            return {first: refusal(self._triton, requests[first], f"the graph failed: {error}", internal)}
        return {
            index: self._triton.InferenceResponse(
                [self._tensors.as_tensor(self._triton, name, outputs[name]) for name in wanted[index]]
            )
            for index, outputs in zip(indices, rows, strict=True)
        }


def refusal(triton: ModuleType, request: Any, reason: str, code: int) -> Any:
    """An error, and one line in the server's log with the id that the client gave its request."""
    name = ascii(request.request_id())[1:-1][:_ID_LENGTH]
    triton.Logger.log_warn(" ".join(f"[request id: {name or '<none>'}] {reason}".split())[:_LINE_LENGTH])
    return triton.InferenceResponse(error=triton.TritonError(reason, code))


def threads_of(config: Mapping[str, Any]) -> int:
    """Threads of a model's session: those of its configuration; 0: the instances share the cores.

    So do selector, predictor and Triton itself: half of the cores is the most.
    """
    instances = sum(int(group.get("count", 1)) for group in config["instance_group"])
    threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
    return threads or max(1, usable_cores() // max(2, instances))


def shortest_of(config: Mapping[str, Any]) -> int:
    """Tokens down to which padding is cut off; 0: it must stay."""
    return int(config["parameters"].get("shortest_length", {}).get("string_value", 0))


def samples_of(warm_ups: Sequence[Mapping[str, Any]], folder: Path) -> list[Arrays]:
    """The inputs of warm-ups, whose files lie in ``folder``: one row for each length, the shortest first."""
    types = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_BOOL": bool, "TYPE_UINT8": np.uint8}
    found: dict[int, Arrays] = {}
    for warm_up in warm_ups:
        row = {}
        for name, given in warm_up["inputs"].items():
            content = np.fromfile(folder / given["input_data_file"], types[given["data_type"]])
            row[name] = content.reshape(1, *map(int, given["dims"]))
        found[_text(row).shape[1]] = row
    return [found[length] for length in sorted(found)]


def module_beside(folder: Path, name: str) -> ModuleType:
    """A Python file of a model's version folder: of that version, whatever lies on the path."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def usable_cores(quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may use: its affinity, and the quota of its container, which affinity does not show."""
    cores = len(os.sched_getaffinity(0))
    try:
        allowed, period = Path(quota).read_text().split()
        return max(1, min(cores, -(-int(allowed) // int(period))))
    except (OSError, ValueError):  # no such file, or 'max': no quota
        return cores


class InputChecker:
    """Refuses values that the graph would misread: ONNX Runtime wraps negative ids around without a word.

    ``max_length``: tokens of the longest text, patches of every image; ``vocabulary_size``: of texts.
    """

    def __init__(self, max_length: int, vocabulary_size: int = 0) -> None:
        self._max_length, self._vocabulary_size = max_length, vocabulary_size

    def reason_to_refuse(self, inputs: Arrays) -> str | None:
        """Why these inputs cannot be answered, or None.

        (B, N) ``input_ids`` and ``attention_mask``, or ``pixels``; (B, K) ``positions``, ``kept`` or (B, N) ``keep``.
        """
        for name, array in inputs.items():
            if array.ndim < 2 or 0 in array.shape:
                return f"{name} has shape {list(array.shape)}; no axis may be empty"
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:  # images: Triton itself checks their shape
            return self._handover_reason(inputs, self._max_length)
        length = ids.shape[1]
        if length > self._max_length:
            return f"input_ids has {length} columns; the model reads at most {self._max_length}"
        if reason := _outside("input_ids", ids, self._vocabulary_size, "the vocabulary"):
            return reason
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
        if positions is None:
            return None
        if positions.shape != inputs["kept"].shape:
            return f"positions has shape {list(positions.shape)} and kept {list(inputs['kept'].shape)}"
        return _outside("positions", positions, length, "the sequence" if "input_ids" in inputs else "the patches")


def _outside(name: str, array: np.ndarray, limit: int, what: str) -> str | None:
    if array.dtype == np.int64 and np.maximum.reduce(array.view(np.uint64), axis=None) < limit:
        return None  # one reading: as an unsigned number a negative one is the largest
    bad = (array < 0) | (array >= limit)
    if not bad.any():
        return None
    row, column = np.argwhere(bad)[0]
    return f"{name}[{row}, {column}] is {array[row, column]}, outside {what} 0..{limit - 1}"


def groups_by_length(inputs: Mapping[int, Arrays], run_in_tokens: float) -> list[list[int]]:
    """Indices of the requests, parted into batches; ``run_in_tokens``: so much padding costs as much as another run.

    From the shortest on, a batch takes the next longer text along as long as what that pads costs less than a run.
    """
    lengths = {index: _text(arrays).shape[1] for index, arrays in inputs.items()}
    groups: list[list[int]] = []
    rows = 0
    for index in sorted(inputs, key=lengths.__getitem__):
        if groups and rows * (lengths[index] - lengths[groups[-1][-1]]) <= run_in_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            rows = 0
        rows += len(_text(inputs[index]))
    return groups


def _text(arrays: Arrays) -> np.ndarray:
    """The ids, whose axis 1 is the length, wherever the client put them; of an image its pixels."""
    return arrays.get("input_ids", next(iter(arrays.values())))


def joined(requests: Sequence[Arrays], pad_id: int = 0) -> Arrays:
    """The requests' arrays one below the other, right-padded to the longest: ids with ``pad_id``, all else with 0."""
    if len(requests) == 1:
        return requests[0]
    return {
        name: _stacked([arrays[name] for arrays in requests], pad_id if name == "input_ids" else 0)
        for name in requests[0]
    }


def _stacked(arrays: Sequence[np.ndarray], filler: int) -> np.ndarray:
    widest = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == widest for array in arrays):
        return np.concatenate(arrays)
    result = np.full((sum(map(len, arrays)), widest), filler, arrays[0].dtype)
    start = 0
    for array in arrays:
        result[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return result


def split_rows(outputs: Sequence[np.ndarray], names: Sequence[str], requests: Sequence[Arrays]) -> list[Arrays]:
    """Undo ``joined`` on the outputs: one dictionary a request, of its own rows and, token by token, its own length.

    The slots of a hand-over (``positions``, ``kept``) stay as many as the longest text of the batch has.
    """
    if len(requests) == 1:
        return [dict(zip(names, outputs, strict=True))]
    answers, start = [], 0
    for arrays in requests:
        text = _text(arrays)
        end, length = start + len(text), text.shape[1] if "input_ids" in arrays else None
        answers.append({
            name: np.ascontiguousarray(array[start:end, : length if name in ("scores", "mask", "keep") else None])
            for name, array in zip(names, outputs, strict=True)
        })
        start = end
    return answers
