"""The committed reference configs: what the writer makes of the tests' tiny model.

    python tests/deploy/repository/reference_repository.py     # writes model_repository/reference anew
"""

import sys
from dataclasses import replace
from pathlib import Path

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ENSEMBLE, ServingSettings, config_text
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.text_endpoint import endpoint_config
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
    "tensorrt-two-gpus": ("tensorrt", "tensorrt", ServingSettings(max_batch_size=8, gpus=(0, 1), queue_delay_us=100))}
"""Folder: target, product of the engines, and how the server runs them."""
WITH_ENDPOINT = ("python", "onnxruntime")
"""It holds the graphs, or asks those that run them."""


def artefacts_of(model, single: bool = False, preprocessor=None) -> Artefacts:
    """What the configs are made from; the graphs are not there."""
    graph, rule = Path("not needed for configs"), {"policy": model.policy.model_dump()}
    reading = preprocessor or model.preprocessor
    return Artefacts(pair_signature(model), graph, graph, reading, tuple(model.labels), rule, graph if single else None)


def planned(artefacts: Artefacts, flavour: str, lengths=None) -> Artefacts:
    _, product, settings = FLAVOURS[flavour]
    request = EngineRequest(settings.max_batch_size, lengths=lengths)
    return artefacts if product is None else plan_engines(artefacts, PRODUCTS[product], request)


def configs_of(artefacts: Artefacts, settings: ServingSettings, target: str, endpoint: bool = True) -> dict:
    """Configs by model name, of version 1."""
    configs = build_configs(artefacts, settings, target)
    if endpoint:
        written = endpoint_config(artefacts, settings, target)
        configs[written.name] = written
    pin_versions(configs, Versions())
    return configs


def reference_configs(model, tokenizer_json: str | None = None, flavour: str = "python") -> dict:
    """Configs by model name; ``tokenizer_json``: not the model's, whose spelling depends on tokenizers' version."""
    target, _, settings = FLAVOURS[flavour]
    reading = model.preprocessor
    other = tokenizer_json and TextPreprocessor(tokenizer_json, replace(reading.settings), reading.familiarity)
    made = planned(artefacts_of(model, flavour == "python", other), flavour)
    return configs_of(made, settings, target, endpoint=flavour in WITH_ENDPOINT)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from conftest import make_rationalizer
    for flavour in FLAVOURS:
        for name, config in reference_configs(make_rationalizer(), flavour=flavour).items():
            if name != ENSEMBLE or flavour == "python":  # the ensemble is the same in all
                (REFERENCES / flavour / name).mkdir(parents=True, exist_ok=True)
                write_text(REFERENCES / flavour / name / CONFIG_FILE, config_text(config))
    (ROOT / ENSEMBLE / "1").mkdir(exist_ok=True)
    (ROOT / ENSEMBLE / "1" / ".gitkeep").touch()


if __name__ == "__main__":
    main()
