"""ONNX Runtime on the CPU: the engine that runs wherever a wheel does. torch-free."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import Arrays, Runner
from rekd_train.errors import MissingExtraError, install_command

_FLAVOURS = ("onnxruntime", "onnxruntime-gpu")


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX graph in a CPU session.

    Args:
        model: path of the file, or its content.
        signature: what the graph must take and give.
        name: how messages call the graph.
        threads, target: see ``session_options``.
    """

    def __init__(
        self, model: Path | bytes, signature: GraphSignature, name: str, *, threads: int | None = None,
        target: str = "python",
    ) -> None:
        super().__init__(signature, name)
        self._model = model
        self._threads = threads
        self._target = target
        self._session = None
        self._outputs = [spec.name for spec in signature.outputs]

    def _activate(self) -> None:
        options = session_options(self._target, self._threads)
        try:
            session = cpu_session(self._model, options)
        except Exception as error:  # the library's exceptions share no root
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fix = "export it again"
            if "NOT_IMPLEMENTED" in reason:  # the file is sound: bf16 on a CPU, for example
                fix = "run the engines, or export with --precision fp32"
            raise EngineError(f"ONNX Runtime cannot load {self.name}: {reason}; fix: {fix}") from None
        found = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
        wanted = [spec.name for spec in (*self.signature.inputs, *self.signature.outputs)]
        if found != wanted:
            raise EngineError(f"{self.name} has the tensors {found}, not {wanted}; fix: export it again")
        self._session = session

    def _deactivate(self) -> None:
        self._session = None

    def _run(self, inputs: Arrays) -> Arrays:
        try:
            outputs = self._session.run(self._outputs, inputs)
        except Exception as error:  # the library's exceptions share no root
            raise EngineError(f"ONNX Runtime failed on {self.name}: {error}") from None
        return dict(zip(self._outputs, outputs, strict=True))


def session_options(target: str = "python", threads: int | None = None):
    """``onnxruntime.SessionOptions`` as the backend of a target sets them, so that what is proved is what is served.

    One difference: ``OnnxGraph`` takes numbers below 1e-37 as 0. Here that would hold for all that the caller's thread
    computes.

    Args:
        target: 'python' is the repository's own step (``backend.model.OnnxGraph``; engines' graphs, too), 'onnxruntime'
            Triton's backend, which can set nothing but the parameters of its configuration.
        threads: inside one operator; None: the cores that this process may use, for 'onnxruntime' the library's choice.
    """
    options = onnx_runtime().SessionOptions()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # lengths differ from batch to batch
    options.log_severity_level = 3
    if target == "onnxruntime":
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4  # with 0 its threads may be refused the cores they would be pinned to
        return options
    options.intra_op_num_threads = threads or available_cores()
    # two steps take turns in one process: the threads of the one that waits must not spin
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def cpu_session(model: Path | bytes, options: Any):
    """An ``InferenceSession`` on the CPU; raises what ONNX Runtime raises."""
    content = model if isinstance(model, bytes) else str(model)
    return onnx_runtime().InferenceSession(content, options, providers=["CPUExecutionProvider"])


def quiet_session(model: bytes, **settings: Any):
    """A CPU session that prints nothing; ``settings`` are attributes of its ``SessionOptions``."""
    options = onnx_runtime().SessionOptions()
    for name, value in {"log_severity_level": 4, **settings}.items():
        setattr(options, name, value)
    return cpu_session(model, options)


def onnx_runtime():
    """The module ``onnxruntime``; MissingExtraError if it is not installed, EngineError if both flavours are."""
    check_flavours()
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None
    return onnxruntime


def check_flavours() -> None:
    """Raise EngineError if both flavours are installed: they overwrite each other's files."""
    if all(map(_is_installed, _FLAVOURS)):
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; fix: pip uninstall "
            f"-y onnxruntime onnxruntime-gpu, then {install_command('cpu')} (for GPUs, gpu in place of cpu)"
        )


def _is_installed(distribution: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        return metadata.distribution(distribution) is not None
    return False


def available_cores() -> int:
    """Cores that this process may use: its affinity, its container's quota and OMP_NUM_THREADS."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with suppress(OSError, ValueError):  # no such file, or 'max': no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limits.append(-(-int(quota) // int(period)))
    if (wished := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        limits.append(int(wished))
    return max(1, min(limits))
