"""A chain of ONNX graphs that stays on one device: fixed buffers for each shape, nothing copied between the steps.

On a GPU each shape is captured once as a CUDA graph and replayed from then on: small networks on few kept tokens spend
more time being launched than computed. A captured graph has one shape and fixed addresses, so a batch is filled up to
its bucket by repeating its last row, which changes no other row. A CPU runs the same code without capture. torch-free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger
from threading import Lock
from typing import Any, Self

import numpy as np

from rekd_deploy.contract.signature import BATCH, LENGTH, SLOTS, GraphSignature, TensorSpec
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Chain, Graph, RunnerChain, check_inputs, parse_device
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, available_cores, cpu_session, onnx_runtime
from rekd_deploy.runtimes.onnxruntime_cuda import (
    Shape,
    check_cuda,
    copying_operator,
    cuda_session,
    forget_errors,
    reason_of,
    refused_capture,
)

_MOST_SHAPES = 64
"""Beyond that the shape unused for longest goes; of captured graphs, all."""


class DeviceChain:
    """A ``Chain`` on one device, 'cpu', 'cuda' or 'cuda:N'. Sessions and memory are held only inside ``with``.

    Args:
        batches: sizes that batches are filled up to; empty: every size is a shape of its own.
        captured: replay CUDA graphs; no meaning on a CPU.
        outputs: what ``run`` gives; None: every output of every graph. What is not read is not copied to the host.
    """

    def __init__(
        self, graphs: Sequence[Graph], *, device: str = "cuda", batches: Collection[int] = (), captured: bool = True,
        outputs: Collection[str] | None = None,
    ) -> None:
        self._graphs = list(graphs)
        self._kind, self._index = parse_device(device)
        self.batches = sorted(batches)
        """Sizes that batches are filled up to; the last is the most rows of one run. Empty: any number."""
        self._captured = captured and self._kind == "cuda"
        self.uncaptured: dict[str, str] = {}
        """Graphs by name that run launch by launch although ``captured``, and why."""
        given: dict[str, TensorSpec] = {}
        needed: dict[str, TensorSpec] = {}
        for graph in self._graphs:
            needed |= {spec.name: spec for spec in graph.signature.inputs if spec.name not in given}
            given |= {spec.name: spec for spec in graph.signature.outputs}
        self._inputs = GraphSignature(tuple(needed.values()), ())
        self._outputs = [name for name in given if outputs is None or name in outputs]
        self._sessions: list[Any] = []
        self._shapes: OrderedDict[tuple[tuple[str, int], ...], Shape] = OrderedDict()
        self._active = False
        self._lock = Lock()  # one request at a time: the buffers of a shape are shared
        self._worker: ThreadPoolExecutor | None = None
        """Of captured graphs: ONNX Runtime keeps them for the thread that captured them, so all run in one."""

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            check_cuda(self._index)
        if self._captured:
            self._worker = ThreadPoolExecutor(1, "rekd-graphs")
            for graph in self._graphs:
                if operator := copying_operator(graph.model):
                    self._leave_uncaptured([graph.name], f"its {operator} copies from the host at every run")
        self._active = True
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:  # what is running ends first
            self._active = False
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None
            self._release()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs by name. Threads may share a chain; they take turns.

        Raises:
            EngineError: used outside ``with``, an input does not fit, the batch is above every bucket, or ONNX Runtime
                failed; the next request starts anew then.
        """
        inputs = {spec.name: inputs[spec.name] for spec in self._inputs.inputs if spec.name in inputs}
        check_inputs(inputs, self._inputs, self._graphs[0].name)
        axes = {
            axis: size
            for spec in self._inputs.inputs
            for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        count = axes[BATCH]
        axes[BATCH] = self._bucket(count)
        for graph in self._graphs:
            if graph.signature.slots is not None:
                axes[SLOTS] = graph.signature.slots.at(axes[LENGTH])
        padded = {name: _filled(array, axes[BATCH]) for name, array in inputs.items()}
        with self._lock:
            if not self._active:
                raise EngineError("the graphs are not running; use them inside a `with` block")
            outputs = self._attempt(lambda: self._shape(tuple(sorted(axes.items()))).run(padded, self._outputs))
        return {name: array[:count] for name, array in outputs.items()}

    def _attempt(self, work: Callable[[], Arrays]) -> Arrays:
        """Do it where the chain's work is done; once more without capture where that is what was refused."""
        try:
            return work() if self._worker is None else self._worker.submit(work).result()
        except Exception as error:  # the library's exceptions share no root
            error.__traceback__ = None  # its frames would keep the sessions
            self._release()  # half of something may be left, of a capture or of memory
            if isinstance(error, EngineError):
                raise
            names = [graph.name for graph in self._graphs]
            refusal, left = refused_capture(error), [name for name in names if self._captures(name)]
            if not (refusal and left):
                raise EngineError(f"ONNX Runtime failed on {' and '.join(names)}: {reason_of(error)}") from None
        self._leave_uncaptured(left, refusal)
        return self._attempt(work)

    def _captures(self, name: str) -> bool:
        return self._captured and name not in self.uncaptured

    def _leave_uncaptured(self, names: Sequence[str], reason: str) -> None:
        """Record it, and say it once."""
        for name in filter(self._captures, names):
            self.uncaptured[name] = reason
            getLogger(__name__).warning("%s is not captured as a CUDA graph, which is slower: %s", name, reason)

    def _bucket(self, count: int) -> int:
        if not self.batches:
            return count
        if count > self.batches[-1]:
            raise EngineError(f"a batch of {count} is above the largest bucket, {self.batches[-1]}; fix: split it")
        return next(size for size in self.batches if size >= count)

    def _shape(self, key: tuple[tuple[str, int], ...]) -> Shape:
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
            captured = [graph.name for graph in self._graphs if self._captures(graph.name)]
            self._shapes[key] = Shape(
                self._sessions, self._graphs, dict(key), self._kind, self._index, len(self._shapes), captured
            )
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _session(self, graph: Graph) -> Any:
        options = onnx_runtime().SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = available_cores()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            if self._kind == "cuda":
                return cuda_session(graph.model, options, device=self._index, captured=self._captures(graph.name))
            return cpu_session(graph.model, options)
        except Exception as error:  # the library's exceptions share no root
            raise EngineError(f"ONNX Runtime cannot load {graph.name}: {reason_of(error)}") from None

    def _release(self) -> None:
        self._shapes.clear()
        self._sessions = []


def chain_on(graphs: Sequence[Graph], *, device: str = "cpu", **sessions: Any) -> Chain:
    """What runs graphs one after the other on 'cpu', 'cuda' or 'cuda:N', and gives every output of each.

    Args:
        sessions: on the CPU, ``target`` and ``threads`` of ``OnnxRuntimeRunner``.
    """
    if parse_device(device)[0] == "cpu":
        return RunnerChain([OnnxRuntimeRunner(each.model, each.signature, each.name, **sessions) for each in graphs])
    return DeviceChain(graphs, device=device)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """(rows, ...): the last row repeated; nothing is copied where nothing is missing."""
    missing = rows - len(array)
    return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
