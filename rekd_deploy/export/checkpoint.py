"""What an export begins from: the checkpoint's description, read in an instant, and the machine, with the device that
the parity gate runs on: where the graphs will be served, as far as that is here. torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.signature import PairSignature, signature_of
from rekd_deploy.repository.backend.model import usable_cores
from rekd_deploy.runtimes.onnxruntime_cuda import check_device
from rekd_train.checkpoints import in_one_line, read_description, read_json
from rekd_train.config.run import BackboneConfig
from rekd_train.errors import CheckpointError, ConfigError, RekdError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor, load_preprocessor

if TYPE_CHECKING:
    from rekd_deploy.export.options import ExportOptions

WEIGHTS = {"selector": "selector.safetensors", "predictor": "predictor.safetensors"}


@dataclass(frozen=True)
class CheckpointFacts:
    """The description of a checkpoint, without its weights."""

    directory: Path
    labels: tuple[str, ...]
    operator: str
    """'compact' or 'zero'."""
    policy: SelectionPolicy
    preprocessor: Preprocessor
    backbones: dict[str, BackboneConfig]
    """Of 'selector' and 'predictor'."""

    @property
    def kind(self) -> str:
        """'text' or 'image'."""
        return self.preprocessor.settings.kind

    @property
    def capacity(self) -> int:
        """K, most features that any rationale holds."""
        sizes = self.preprocessor
        return self.policy.capacity(sizes.positions if self.policy.selectable == "all" else sizes.features)

    @property
    def shortest_length(self) -> int:
        """Fewest tokens to pad texts to: room for the minimum and, where words are gathered, for K of them."""
        least = max(3, self.policy.minimum + 2)
        return max(least, self.capacity) if self.operator == "compact" else least

    @property
    def signature(self) -> PairSignature:
        """The tensors of the served pair."""
        settings = self.preprocessor.settings
        return signature_of(settings, self.policy, self.capacity, self.operator, len(self.labels))


def read_facts(checkpoint: str | Path) -> CheckpointFacts:
    """Read the description of a checkpoint; its weights are only looked at, not read.

    Raises:
        CheckpointError: missing, incomplete, damaged, or without a decision rule.
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}: not a directory; fix: one that rekd-train has written")
    description, rule = read_description(directory), read_json(directory / "policy.json")
    try:
        facts = CheckpointFacts(
            directory, tuple(str(label) for label in description["labels"]), str(description["operator"]),
            SelectionPolicy.model_validate(rule["policy"]),
            load_preprocessor(directory, description["preprocessing"]),
            {role: BackboneConfig.model_validate(description[role]) for role in WEIGHTS},
        )
        for name in WEIGHTS.values():
            (directory / name).stat()
        return facts
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing; fix: copy the whole directory again") from None
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        problem = f"the description does not fit this version of rekd: {in_one_line(error)}"
        raise CheckpointError(f"{directory}: {problem}") from None


def machine() -> dict[str, int]:
    """What an export can use here: cores, and GPUs whose driver is loaded."""
    cores = usable_cores() if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cores": cores, "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*")))}


def gate_device(options: ExportOptions) -> tuple[str, str]:
    """The device of the gate, and why it is not the GPU that will serve the graphs (the first of several), or ''.

    Raises:
        EngineError, MissingExtraError: the chosen GPU cannot be used here.
    """
    serving = "cpu" if not options.on_gpu else f"cuda:{options.gpus[0]}" if options.gpus else "cuda"
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
