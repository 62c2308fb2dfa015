"""Where the parity gate of an export runs the graphs: where they will be served, as far as that is here. torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rekd_deploy.contract.parity_report import GPU_PRECISIONS, RUNTIME_PRECISIONS, Precision
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.base import parse_device
from rekd_deploy.runtimes.onnxruntime_cuda import check_device
from rekd_train.errors import RekdError

if TYPE_CHECKING:
    from rekd_deploy.export.options import ExportOptions


def device_mistakes(device: str, precision: Precision) -> list[str]:
    """What is wrong with a device that was asked for."""
    try:
        kind, _ = parse_device(device)
    except EngineError as error:
        return [str(error)]
    if kind == "cuda" and precision in RUNTIME_PRECISIONS and precision not in GPU_PRECISIONS:
        return [f"ONNX Runtime has no {precision} kernels for GPUs, so the gate cannot run there; fix: --device cpu"]
    return []


def gate_device(options: ExportOptions) -> tuple[str, str]:
    """The device, and why it is not the GPU that will serve the graphs, or ''.

    Without a choice it is that GPU (the first of several), or the CPU where ONNX Runtime has no use of a GPU.

    Raises:
        EngineError, MissingExtraError: the GPU that was asked for cannot be used here.
    """
    serving = "cpu"
    if options.serving.gpu:
        serving = f"cuda:{options.gpus[0]}" if options.gpus else "cuda"
    device = options.device or serving
    if device == "cpu":
        return device, "" if serving == "cpu" else "--device cpu was given"
    try:
        check_device(device)
    except RekdError as error:
        if options.device is not None:
            raise
        return "cpu", str(error)
    return device, ""


def proof_elsewhere(reason: str, repository: object) -> str:
    """For people: that the gate ran on the CPU, and what proves the graphs on the GPU."""
    return (
        f"the graphs are proved on the CPU, not on the GPU that will serve them, since here {reason}; on that machine: "
        f"rekd-export --verify {repository} --device cuda"
    )
