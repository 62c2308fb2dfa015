"""The committed reference configs: what the writer makes of the tests' tiny model.

    python tests/deploy/repository/reference_repository.py     # writes model_repository/reference anew
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.signature import Slots, text_pair_signature
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ENSEMBLE, ServingSettings, config_text
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.text_endpoint import endpoint_configs
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_train.files import write_text
from rekd_train.inputs.text import TextPreprocessor

REFERENCES = Path(__file__).resolve().parents[3] / "model_repository" / "reference"
ROOT = REFERENCES / "python"
FLAVOURS = {
    "python": ("python", None, ServingSettings()),
    "python-tensorrt-rtx": ("python", "tensorrt-rtx", ServingSettings(queue_delay_us=100)),
    "python-gpu": ("python", None, ServingSettings(gpu=True, queue_delay_us=100)),
    "onnxruntime": ("onnxruntime", None, ServingSettings()),
    "onnxruntime-one-gpu": ("onnxruntime", None, ServingSettings(gpu=True, gpus=(0,), queue_delay_us=100)),
    "onnxruntime-limited": ("onnxruntime", None, ServingSettings(instances=2, threads=2, rate_limit=True)),
    "tensorrt": ("tensorrt", "tensorrt", ServingSettings(max_batch_size=8, queue_delay_us=100)),
    "tensorrt-two-gpus": ("tensorrt", "tensorrt", ServingSettings(max_batch_size=8, gpus=(0, 1), queue_delay_us=100)),
}
"""Folder: target, product of the engines, and how the server runs them."""


def reference_configs(rationalizer, tokenizer_json: str | None = None, flavour: str = "python") -> dict:
    """Configs by model name.

    Args:
        flavour: one of ``FLAVOURS``.
        tokenizer_json: in place of the model's own, whose spelling depends on the version of tokenizers.
    """
    target, product, settings = FLAVOURS[flavour]
    artefacts = reference_artefacts(rationalizer, tokenizer_json, single=flavour == "python")
    if product is not None:
        artefacts = plan_engines(artefacts, PRODUCTS[product], EngineRequest(settings.max_batch_size))
    configs = build_configs(artefacts, settings, target)
    if flavour == "python":
        configs |= endpoint_configs(artefacts, settings)
    pin_versions(configs, Versions())
    return configs


def reference_artefacts(rationalizer, tokenizer_json: str | None = None, single: bool = False) -> Artefacts:
    """What the configs are made from; the graphs are not there."""
    preprocessor = rationalizer.preprocessor
    if tokenizer_json is not None:
        preprocessor = TextPreprocessor(tokenizer_json, replace(preprocessor.settings))
    labels = tuple(rationalizer.labels)
    signature = text_pair_signature(Slots.of(rationalizer.policy, rationalizer.capacity), len(labels))
    graphs = Path("not needed for configs")
    manifest = {"policy": rationalizer.policy.model_dump()}
    return Artefacts(signature, graphs, graphs, preprocessor, labels, manifest, graphs if single else None)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from conftest import make_rationalizer

    for flavour in FLAVOURS:
        root = REFERENCES / flavour
        for name, config in reference_configs(make_rationalizer(), flavour=flavour).items():
            if name != ENSEMBLE or root == ROOT:  # the ensemble is the same in all
                (root / name).mkdir(parents=True, exist_ok=True)
                write_text(root / name / CONFIG_FILE, config_text(config))
    (ROOT / ENSEMBLE / "1").mkdir(exist_ok=True)
    (ROOT / ENSEMBLE / "1" / ".gitkeep").touch()


if __name__ == "__main__":
    main()
