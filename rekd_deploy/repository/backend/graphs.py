"""What runs a graph in Triton's python backend: ONNX Runtime on CPUs, the same on a GPU, or a TensorRT engine.

This file is copied beside ``model.py`` and needs NumPy and the runtime alone.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
_PROVIDER = "CUDAExecutionProvider"
_MOST_SHAPES = 128
"""So many are captured, those of the warm-ups first (16 lengths up to 512 tokens, 5 sizes); any other runs as it is."""
_BY_TOKEN = ("scores", "mask", "keep")
"""Outputs that have a column for each token."""
_MOST_RUN = 512.0
"""Tokens: the most that ``run_in_tokens`` returns, since a measurement beside other loads is noisy."""
_COPYING = (b"\x22\x04LSTM", b"\x22\x03GRU", b"\x22\x03RNN")
"""As a graph's bytes have them, operators that cannot be replayed: rekd_deploy/runtimes/onnxruntime_cuda.py."""


class OnnxGraph:
    """model.onnx in ``folder`` on ONNX Runtime; ``threads`` inside one operation.

    Padding costs as much as text, and changes no answer: columns that are padding in every row are cut off, down to
    ``shortest`` tokens; 0: never. At padding scores are 0 and nothing is kept, whatever else is in the batch.
    """

    def __init__(self, folder: Path, threads: int, shortest: int = 0) -> None:
        import onnxruntime

        # as the gate's, rekd_deploy/runtimes/onnxruntime.py, but for numbers near zero
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # not 0, which would pin them to cores that both steps share
        # selector and predictor take turns on the same cores: a waiting one must not spin; within a run it pays
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # attention makes 1e-45 of what is masked, and processors compute such numbers many times slower than 0: a batch
        # that is half padding took twice as long. The option holds for the whole thread, and this process is ours alone
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.enable_mem_pattern = False  # lengths differ from batch to batch
        options.inter_op_num_threads = 1
        path, self._shortest = str(folder / "model.onnx"), shortest
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        """The outputs of these names."""
        mask = inputs.get("attention_mask") if self._shortest else None
        if mask is None:
            return self._session.run(list(names), inputs)
        rows, width = mask.shape
        length = max(self._shortest, width - int(mask.any(axis=0)[::-1].argmax()))
        outputs = self._session.run(list(names), {name: array[:, :length] for name, array in inputs.items()})
        real = mask[:, :length].astype(bool)  # a shorter row of the batch has padding, too
        for index in (index for index, name in enumerate(names) if name in _BY_TOKEN):
            whole = np.zeros((rows, width), outputs[index].dtype)
            np.multiply(outputs[index], real, out=whole[:, :length])
            outputs[index] = whole
        return outputs

    def run_in_tokens(self, texts: Sequence[Arrays]) -> float:
        """What a run costs beside its tokens, measured, as a number of tokens; 0 where all texts have one length.

        Some hundred for small networks, which spend most of a run between operators; a few for large ones.

        Args:
            texts: inputs of one text each, the shortest first.
        """
        lengths = [text["input_ids"].shape[1] for text in texts]
        if len(lengths) < 2:
            return 0.0
        long = next((index for index, length in enumerate(lengths) if length >= 4 * lengths[0]), len(lengths) - 1)
        brief, whole = self._seconds(texts[0], texts[long])
        a_token = (whole - brief) / (lengths[long] - lengths[0])
        return min(_MOST_RUN, max(0.0, brief / a_token - lengths[0])) if a_token > 0 else _MOST_RUN

    def close(self) -> None:
        self._session = None

    def _seconds(self, *texts: Arrays) -> list[float]:
        """The shortest of some runs with each, in turns: other models are loaded meanwhile."""
        found: list[list[float]] = [[] for _ in texts]
        for _ in range(10):
            for text, seconds in zip(texts, found, strict=True):
                begun = time.perf_counter()
                self._session.run(None, text)
                seconds.append(time.perf_counter() - begun)
        return list(map(min, found))


class EngineGraph:
    """model.plan of a product ('tensorrt-rtx') on a GPU; ``execution`` is ``tensorrt_execution.py`` beside it."""

    def __init__(self, folder: Path, product: str, device: int, execution: Any) -> None:
        api = importlib.import_module(product.replace("-", "_"))
        logger = api.Logger(api.Logger.ERROR)  # writes to the server's log
        plan = (folder / "model.plan").read_bytes()
        self._execution = execution.EngineExecution(api, plan, logger, lambda: "see the server's log", device)

    def run(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        """The outputs of these names."""
        outputs = self._execution.run(inputs)
        return [outputs[name] for name in names]

    def close(self) -> None:
        self._execution.close()


class CapturedGraph:
    """model.onnx on a GPU: each shape of a batch is captured once as a CUDA graph and replayed from then on.

    To be used by one thread: ONNX Runtime keeps captured graphs for the thread that captured them. Triton's own
    onnxruntime backend cannot do this: it binds other buffers at each request, and a captured graph knows only its own.
    Batches are filled up to one of ``batches`` by repeating the last row, which changes no other row's answer.
    """

    def __init__(self, folder: Path, device: int, batches: Collection[int]) -> None:
        import onnxruntime

        self._runtime, self._path, self._device = onnxruntime, str(folder / "model.onnx"), device
        self._batches = sorted(batches)
        self._shapes: dict[tuple, tuple[dict[str, Any], Any, Any]] = {}
        if _PROVIDER not in onnxruntime.get_available_providers():
            raise RuntimeError(
                "the ONNX Runtime of Triton's Python serves no GPUs; fix: install onnxruntime-gpu[cuda,cudnn] there"
            )
        onnxruntime.preload_dlls()
        content = Path(self._path).read_bytes()
        self.captured = not any(operator in content for operator in _COPYING)
        self._session: Any = self._opened()

    def run(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        """The outputs of these names; no others are copied from the GPU."""
        count = len(next(iter(inputs.values())))
        size = min((size for size in self._batches if size >= count), default=count)
        filled = {
            name: np.concatenate([inputs[name], np.repeat(inputs[name][-1:], size - count, axis=0)])
            for name in sorted(inputs)
        }
        try:
            outputs = self._answer(names, filled)
        except Exception as error:
            self.close()  # half of something may be left, of a capture or of memory; the next request starts anew
            raise error.with_traceback(None) from None  # the frames would keep the session and its memory
        return [array[:count] for array in outputs]

    def close(self) -> None:
        """Give the device memory back."""
        self._shapes.clear()
        self._session = None

    def _answer(self, names: Sequence[str], inputs: Arrays) -> list[np.ndarray]:
        if self._session is None:
            self._session = self._opened()
        if not self.captured:
            return self._session.run(list(names), inputs)
        key = tuple(array.shape for array in inputs.values())
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                return self._session.run(list(names), inputs, self._options(-1))
            self._shapes[key] = self._shape(inputs)
        buffers, binding, options = self._shapes[key]
        for name, array in inputs.items():
            buffers[name].update_inplace(array)
        self._session.run_with_iobinding(binding, options)
        return [buffers[name].numpy() for name in names]

    def _shape(self, inputs: Arrays) -> tuple[dict[str, Any], Any, Any]:
        """Buffers of these shapes and of what the graph makes of them, bound for good, and the graph's number."""
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(names, inputs, self._options(-1)), strict=True))
        allocated = self._runtime.OrtValue.ortvalue_from_shape_and_type
        buffers = {
            name: allocated(list(array.shape), array.dtype.type, "cuda", self._device)
            for name, array in {**inputs, **outputs}.items()
        }
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            (binding.bind_ortvalue_input if name in inputs else binding.bind_ortvalue_output)(name, buffer)
        return buffers, binding, self._options(len(self._shapes))

    def _options(self, number: int) -> Any:
        """Of a run: the number of its captured graph, -1 for none."""
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def _opened(self) -> Any:
        options = self._runtime.SessionOptions()  # as the gate's on a GPU: rekd_deploy/runtimes/onnxruntime_device.py
        options.log_severity_level = 4  # what fails is raised
        options.add_session_config_entry("session.force_spinning_stop", "1")
        settings = {"device_id": str(self._device), "enable_cuda_graph": str(int(self.captured)), "use_tf32": "0"}
        providers = [(_PROVIDER, settings)]
        session = self._runtime.InferenceSession(self._path, options, providers=providers, enable_fallback=0)
        if session.get_providers()[0] != _PROVIDER:  # ONNX Runtime falls back without a word
            raise RuntimeError(f"ONNX Runtime would run it on the CPU, not on GPU {self._device}: see the server's log")
        return session
