"""A line of ONNX graphs that stays on one device: fixed buffers for each shape, nothing copied between the steps.

On a GPU each shape is captured once as a CUDA graph and replayed from then on: small networks on few kept tokens spend
more time being launched than computed. A captured graph has one shape and fixed addresses, so there is a captured graph
and a set of buffers for each bucket of batch and length, all of one session a graph; a batch is filled up to its bucket
by repeating its last row, which changes no other row's answer. On a CPU the same code runs without capture. torch-free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from rekd_deploy.contract.signature import BATCH, LENGTH, SLOTS, GraphSignature, TensorSpec
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, check_inputs, parse_device
from rekd_deploy.runtimes.onnxruntime import available_cores, onnx_runtime
from rekd_deploy.runtimes.onnxruntime_cuda import check_cuda, cuda_session, forget_errors, reason_of

_MOST_SHAPES = 64
"""Buffers and captured graphs are kept for so many shapes. Beyond that the one unused for longest goes; of captured
graphs, all."""


@dataclass(frozen=True)
class Graph:
    """One step."""

    model: Path | bytes
    """File, or its content."""
    signature: GraphSignature
    name: str
    """How messages call it."""


class DeviceChain:
    """Runs graphs one after the other on one device. Sessions and memory are held only inside ``with``.

    Args:
        graphs: in order; each reads what it needs of the chain's inputs and of what earlier graphs gave.
        device: 'cpu', 'cuda' or 'cuda:N'.
        batches: sizes that batches are filled up to; empty: every size is a shape of its own.
        captured: replay CUDA graphs; no meaning on a CPU.
        outputs: what ``run`` gives; None: every output of every graph. What is not read is not copied to the host.
        threads: of a CPU session inside one operator; None: the cores that this process may use.

    Raises:
        EngineError: there is no such device.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        *,
        device: str = "cuda",
        batches: Collection[int] = (),
        captured: bool = True,
        outputs: Collection[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self._graphs = list(graphs)
        self._kind, self._index = parse_device(device)
        self._batches, self._threads = sorted(batches), threads
        self._captured = captured and self._kind == "cuda"
        self._inputs = GraphSignature(_inputs_of(self._graphs), ())
        given = [spec.name for graph in self._graphs for spec in graph.signature.outputs]
        self._outputs = [name for name in given if outputs is None or name in outputs]
        self._sessions: list[Any] = []
        self._shapes: OrderedDict[tuple[tuple[str, int], ...], _Shape] = OrderedDict()
        self._active = False
        self._lock = Lock()  # one request at a time: the buffers of a shape are shared
        self._worker: ThreadPoolExecutor | None = None
        """Of captured graphs: ONNX Runtime keeps them for the thread that captured them, so all run in one."""

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            check_cuda()
        if self._captured:
            self._worker = ThreadPoolExecutor(1, "rekd-graphs")
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # what is running ends first
            self._active = False
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None
            self._release()

    @property
    def largest_batch(self) -> int | None:
        """Most rows of one run; None: any number."""
        return self._batches[-1] if self._batches else None

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs by name. Threads may share a chain; they take turns.

        Raises:
            EngineError: used outside ``with``, an input does not fit, the batch is above every bucket, or ONNX
                Runtime failed; the next request starts anew then.
        """
        inputs = {spec.name: inputs[spec.name] for spec in self._inputs.inputs if spec.name in inputs}
        check_inputs(inputs, self._inputs, self._graphs[0].name)
        axes = _axes(self._inputs.inputs, inputs)
        count = axes[BATCH]
        axes[BATCH] = self._bucket(count)
        for graph in self._graphs:
            if graph.signature.slots is not None:
                axes[SLOTS] = graph.signature.slots.at(axes[LENGTH])
        filled = {name: _filled(array, axes[BATCH]) for name, array in inputs.items()}
        with self._lock:
            if not self._active:
                raise EngineError("the graphs are not running; use them inside a `with` block")
            try:
                work = partial(self._answer, tuple(sorted(axes.items())), filled)
                outputs = work() if self._worker is None else self._worker.submit(work).result()
            except Exception as error:  # the library's exceptions share no root
                error.__traceback__ = None  # its frames would keep the sessions
                self._release()  # half of something may be left, of a capture or of memory
                if isinstance(error, EngineError):
                    raise
                names = " and ".join(graph.name for graph in self._graphs)
                raise EngineError(f"ONNX Runtime failed on {names}: {reason_of(error)}") from None
        return {name: array[:count] for name, array in outputs.items()}

    def _answer(self, key: tuple[tuple[str, int], ...], inputs: Arrays) -> Arrays:
        return self._shape(key).run(inputs, self._outputs)

    def _bucket(self, count: int) -> int:
        if not self._batches:
            return count
        fitting = [size for size in self._batches if size >= count]
        if not fitting:
            raise EngineError(f"a batch of {count} is above the largest bucket, {self._batches[-1]}; fix: split it")
        return fitting[0]

    def _shape(self, key: tuple[tuple[str, int], ...]) -> _Shape:
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                if self._captured:  # a captured graph goes with its session alone
                    self._release()
                else:
                    self._shapes.popitem(last=False)
            if not self._sessions:
                if self._kind == "cuda":
                    forget_errors()
                self._sessions = [self._session(graph) for graph in self._graphs]
            number = len(self._shapes) if self._captured else None
            self._shapes[key] = _Shape(self._sessions, self._graphs, dict(key), self._kind, self._index, number)
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _session(self, graph: Graph) -> Any:
        runtime = onnx_runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = self._threads or available_cores()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        content = graph.model if isinstance(graph.model, bytes) else str(graph.model)
        try:
            if self._kind == "cuda":
                return cuda_session(content, options, device=self._index, captured=self._captured)
            return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions share no root
            raise EngineError(f"ONNX Runtime cannot load {graph.name}: {reason_of(error)}") from None

    def _release(self) -> None:
        self._shapes.clear()
        self._sessions = []


class _Shape:
    """Buffers of one bucket, and the number of its captured graph; None: nothing is captured."""

    def __init__(
        self, sessions: list[Any], graphs: list[Graph], axes: dict[str, int], kind: str, index: int, number: int | None
    ) -> None:
        runtime = onnx_runtime()
        self._on_cpu = kind == "cpu"
        self._options = None
        if number is not None:
            self._options = runtime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(number))
        self.buffers: dict[str, Any] = {}
        self._steps = []
        for session, graph in zip(sessions, graphs, strict=True):
            binding = session.io_binding()
            for spec in (*graph.signature.inputs, *graph.signature.outputs):
                if spec.name not in self.buffers:  # what an earlier step gave is read where it lies
                    sizes = [axes.get(axis, axis) for axis in spec.shape]
                    self.buffers[spec.name] = runtime.OrtValue.ortvalue_from_shape_and_type(
                        sizes, np.dtype(spec.dtype).type, kind, index
                    )
            for spec in graph.signature.inputs:
                binding.bind_ortvalue_input(spec.name, self.buffers[spec.name])
            for spec in graph.signature.outputs:
                binding.bind_ortvalue_output(spec.name, self.buffers[spec.name])
            self._steps.append((session, binding))

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        for name, array in inputs.items():
            self.buffers[name].update_inplace(np.ascontiguousarray(array))
        for session, binding in self._steps:
            session.run_with_iobinding(binding, self._options)
        # on a CPU what ONNX Runtime hands out is the buffer itself
        return {name: np.array(self.buffers[name].numpy(), copy=self._on_cpu) for name in outputs}


def _inputs_of(graphs: Sequence[Graph]) -> tuple[TensorSpec, ...]:
    """What no earlier graph gives."""
    given: set[str] = set()
    needed: dict[str, TensorSpec] = {}
    for graph in graphs:
        needed |= {spec.name: spec for spec in graph.signature.inputs if spec.name not in given}
        given |= {spec.name for spec in graph.signature.outputs}
    return tuple(needed.values())


def _axes(specs: Sequence[TensorSpec], inputs: Arrays) -> dict[str, int]:
    """Size of every symbolic axis."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """(rows, ...): the last row repeated; nothing is copied where nothing is missing."""
    missing = rows - len(array)
    return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
