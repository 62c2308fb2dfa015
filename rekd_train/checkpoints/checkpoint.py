"""Checkpoints written and read; what one says of itself: ``rekd_train.checkpoints``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rekd_train.checkpoints import FORMAT, VERSION, in_one_line, read_description, read_json
from rekd_train.config.run import BackboneConfig
from rekd_train.config.sections import trusted_code
from rekd_train.data.examples import summary_notes, summary_rows
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.files import AGAIN, atomic_directory, cannot_write, sha256, write_json, write_text
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import load_preprocessor
from rekd_train.inputs.text import FAMILIARITY_FILE, TOKENIZER_FILE, TextPreprocessor
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer

_OLD_PREFIX = re.compile(r"^backbone\.(bert|vit)\.")  # of weights in versions 1 and 2, which had a class for each
EXAMPLES_FILE, IMAGES_FILE = "examples.jsonl", "examples.npz"
_WEIGHTS = {role: f"{role}.safetensors" for role in ("selector", "predictor")}
_CARD = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
                    lstrip_blocks=True).get_template("model_card.md.j2")


def save(rationalizer: Rationalizer, directory: str | Path, *, metrics: dict[str, Any] | None = None,
         training: dict[str, Any] | None = None, examples: Sequence[dict[str, str]] = (),
         images: dict[str, np.ndarray] | None = None, fix: str = AGAIN) -> Path:
    """Write a checkpoint atomically, in place of one that lies there.

    Args:
        training: the run's configuration and the origin of data and weights, for config.json.
        examples: ``{"text", "label"}`` of the dev split, on which exports prove their parity.
        images: the same of a vision model: ``pixels`` uint8 (n, H, W, C) and ``labels`` (n,) int64.
        fix: what to do if the disk is full.

    CheckpointError: something else lies at ``directory`` and is left there, or it cannot be written.
    """
    directory = Path(directory)
    check_output(directory, overwrite=True)
    try:
        with atomic_directory(directory) as work:
            description = _write_model(rationalizer, work) | {"training": training or {}}
            write_json(work / "config.json", description)
            write_json(work / "metrics.json", metrics or {})
            lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
            write_text(work / EXAMPLES_FILE, "".join(lines))
            if images is not None:
                np.savez_compressed(work / IMAGES_FILE, **images)
            write_text(work / "README.md", model_card(description, rationalizer.policy, metrics or {}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(cannot_write(directory, error, fix)) from error
    return directory


def _write_model(rationalizer: Rationalizer, work: Path) -> dict[str, Any]:
    """Weights, tokenizer and decision rule; the description of the model."""
    for role, name in _WEIGHTS.items():
        state = getattr(rationalizer, role).state_dict()
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, work / name)
        (work / name).chmod(0o644)  # safetensors writes files for the owner only
    preprocessor, temperature = rationalizer.preprocessor, rationalizer.probability_temperature
    own: dict[str, Any] = {}
    if isinstance(preprocessor, TextPreprocessor):
        write_text(work / TOKENIZER_FILE, preprocessor.tokenizer_json)
        if preprocessor.familiarity is not None:
            write_text(work / FAMILIARITY_FILE, preprocessor.familiarity.packed())
            own["familiarity_sha256"] = sha256(work / FAMILIARITY_FILE)
    policy = {"policy": rationalizer.policy.model_dump(), "probability_temperature": temperature}
    write_json(work / "policy.json", policy)
    return {
        "format": FORMAT, "version": VERSION, "labels": rationalizer.labels,
        "operator": rationalizer.predictor.operator,
        **{role: getattr(rationalizer, role).backbone.settings.model_dump() for role in _WEIGHTS},
        "preprocessing": asdict(preprocessor.settings), "preprocessing_sha256": preprocessor.fingerprint,
        "weights_sha256": {name: sha256(work / name) for name in _WEIGHTS.values()}, **own,
    }


def check_output(directory: str | Path, overwrite: bool = False) -> None:
    """Raise CheckpointError where saving would destroy something: call it before the work starts.

    ``overwrite``: a checkpoint may be replaced; a file or a directory with other content never is.
    """
    directory = Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        description = read_json(directory / "config.json") if directory.is_dir() else None
    except CheckpointError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{directory} exists and is not a checkpoint; fix: give another output directory")
    if not overwrite:
        raise CheckpointError(f"{directory} is a checkpoint already; fix: another output directory, or --overwrite to "
                              "replace it")


def load(path: str | Path, trust_code: bool = False) -> Rationalizer:
    """Read a checkpoint strictly: every file, every weight and every setting must fit.

    ``trust_code``: run the code of backbones outside of REKD that it names (``package.module:Class``).
    Returns the model in evaluation mode, on the CPU. CheckpointError: missing, damaged, of another version, or files
    that do not belong together; CodeError: a class that it names is not trusted, not there, or no backbone.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}: not a directory; fix: one that rekd-train has written")
    description = read_description(directory)
    try:
        preprocessor = load_preprocessor(directory, description["preprocessing"])
        stored = read_json(directory / "policy.json")
        policy = SelectionPolicy.model_validate(stored["policy"])
        temperature = float(stored["probability_temperature"])
        with trusted_code(trust_code):
            sizes = [BackboneConfig.model_validate(description[role]) for role in _WEIGHTS]
            first, second = (build_backbone(each, preprocessor.special_ids) for each in sizes)
        labels = [str(label) for label in description["labels"]]
        predictor = Predictor(second, len(labels), description["operator"])
        rationalizer = Rationalizer(Selector(first), predictor, policy, preprocessor, labels, temperature)
        digests = dict(description["weights_sha256"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        problem = f"the description does not fit this version of rekd: {in_one_line(error)}"
        raise CheckpointError(f"{directory}: {problem}") from None
    if preprocessor.fingerprint != description.get("preprocessing_sha256"):
        what = TOKENIZER_FILE if (directory / TOKENIZER_FILE).exists() else "the preprocessing"
        raise CheckpointError(f"{directory}: {what} is not the one this model was trained with")
    known, digest = directory / FAMILIARITY_FILE, description.get("familiarity_sha256")
    if digest and not (known.exists() and sha256(known) == digest):
        raise CheckpointError(f"{known} is missing, or not the file that config.json describes; fix: copy it again")
    for role, name in _WEIGHTS.items():
        _load_weights(getattr(rationalizer, role), directory / name, digests.get(name))
    return rationalizer.eval()


def read_metrics(directory: Path) -> dict[str, Any]:
    """metrics.json of a checkpoint."""
    return read_json(Path(directory) / "metrics.json")


def dev_texts(directory: Path) -> set[str]:
    """The texts of the dev split that a checkpoint carries; an import or a model of images has none."""
    path = Path(directory) / EXAMPLES_FILE
    if not path.exists():
        return set()
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["text"] for line in file}


def checkpoint_hash(directory: Path) -> str:
    """SHA-256 over the files that decide what the model computes."""
    optional = (TOKENIZER_FILE, FAMILIARITY_FILE)
    files = [Path(directory) / name for name in ("config.json", "policy.json", *optional, *_WEIGHTS.values())]
    found = (path for path in files if path.name not in optional or path.exists())
    joined = "".join(f"{path.name}:{sha256(path)}\n" for path in found)
    return hashlib.sha256(joined.encode()).hexdigest()


def _load_weights(module: Selector | Predictor, path: Path, expected_digest: str | None) -> None:
    try:
        digest, state = sha256(path), load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fix: copy the whole directory again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut off; fix: copy it again") from None
    if digest != expected_digest:
        raise CheckpointError(f"{path} is not the file that config.json describes (SHA-256 differs); fix: copy it "
                              "again")
    state = {_OLD_PREFIX.sub("backbone.model.", name): tensor for name, tensor in state.items()}
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the sizes in config.json: {in_one_line(error)}") from None


def model_card(description: dict[str, Any], policy: SelectionPolicy, metrics: dict[str, Any]) -> str:
    """Markdown text of the card, from what the checkpoint itself says."""
    figures = _flat({key: value for key, value in metrics.items() if key != "data"})
    return _CARD.render(description=description, training=description["training"], policy=policy, figures=list(figures),
                        data=metrics.get("data"), summary_rows=summary_rows, summary_notes=summary_notes)


def _flat(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "never_predicted" and value:
            yield f"{prefix}{key}", ", ".join(value)
        elif not isinstance(value, list):
            yield f"{prefix}{key}", round(value, 4) if isinstance(value, float) else value
