"""The committed reference configs: what the writer makes of the tests' tiny model.

    python tests/deploy/reference_repository.py     # writes model_repository/reference/python anew
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rekd_deploy.artefacts import Artefacts
from rekd_deploy.signature import text_pair_signature
from rekd_deploy.triton_config import CONFIG_FILE, ENSEMBLE, ServingSettings, build_configs, config_text
from rekd_deploy.versions import Versions, pin_versions
from rekd_train.files import write_text
from rekd_train.preprocess import TextPreprocessor

ROOT = Path(__file__).resolve().parents[2] / "model_repository" / "reference" / "python"


def reference_configs(rationalizer, tokenizer_json: str | None = None) -> dict:
    """Configs by model name.

    Args:
        tokenizer_json: in place of the model's own, whose spelling depends on the version of tokenizers.
    """
    preprocessor = rationalizer.preprocessor
    if tokenizer_json is not None:
        preprocessor = TextPreprocessor(tokenizer_json, replace(preprocessor.settings))
    labels = tuple(rationalizer.labels)
    signature = text_pair_signature(rationalizer.capacity, len(labels))
    graphs = Path("not needed for configs")
    configs = build_configs(Artefacts(signature, graphs, graphs, preprocessor, labels, {}), ServingSettings())
    pin_versions(configs, Versions())
    return configs


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from conftest import make_rationalizer

    for name, config in reference_configs(make_rationalizer()).items():
        (ROOT / name / "1").mkdir(parents=True, exist_ok=True)
        write_text(ROOT / name / CONFIG_FILE, config_text(config))
    (ROOT / ENSEMBLE / "1" / ".gitkeep").touch()


if __name__ == "__main__":
    main()
