"""The small files beside a config.pbtxt that it names: labels and the inputs of warm-ups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.repository.config import LABEL_FILE, PREDICTOR, SELECTOR, SINGLE, label_text
from rekd_deploy.repository.warmups import file_sizes, warm_up_file_mistakes, warm_up_files

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_ROLES = {SELECTOR: "selector", PREDICTOR: "predictor", SINGLE: "single"}


def model_files(configs: Mapping[str, ModelConfig], artefacts: Artefacts) -> dict[str, bytes]:
    """Content by name: ``rekd/labels.txt``, ``rekd_selector/warmup/input_ids-32``."""
    files = {}
    for name, config in configs.items():
        if any(tensor.label_filename for tensor in config.output):
            files[f"{name}/{LABEL_FILE}"] = label_text(artefacts.labels).encode()
        if name in _ROLES:
            signature = artefacts.signature.graph(_ROLES[name])
            for place, content in warm_up_files(config, signature, artefacts.preprocessor).items():
                files[f"{name}/{place}"] = content
    return files


def model_file_mistakes(root: Path, configs: Mapping[str, ModelConfig]) -> list[str]:
    """Mistakes in the files that lie in a repository beside its configurations."""
    mistakes = []
    for name, config in configs.items():
        mistakes += warm_up_file_mistakes(config, file_sizes(Path(root) / name))
        for tensor in config.output:
            if not tensor.label_filename:
                continue
            path = Path(root) / name / tensor.label_filename
            count = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
            if count != tensor.dims[0]:
                mistakes.append(f"{name}: {path.name} has {count} lines, {tensor.name} {tensor.dims[0]} classes")
    return mistakes
