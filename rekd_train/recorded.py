"""A checkpoint taken up again: under its own record, with data that are named for it, or as a start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rekd_train import checkpoint
from rekd_train.config import RunConfig, explain
from rekd_train.config_files import override, read_document
from rekd_train.data import DataSet, load_data
from rekd_train.errors import CheckpointError, ConfigError, DataError
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.preprocess import TextPreprocessor
from rekd_train.preprocessors import same_tokens

_NAMED_FOR_IT = {"optimisation": {"learning_rate": 5e-5}}
"""For checkpoints without a record, which were made from pretrained networks: a rate that those bear."""


def recorded_config(path: Path, data: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration to calibrate, compact or evaluate a checkpoint under.

    Args:
        path: the checkpoint.
        data: a preset or a TOML file whose section ``data`` takes the place of the recorded one; needed for
            a checkpoint that records no run, such as an imported one.
        overrides: ``key=value`` changes, for example ``data.path=DIR`` or ``selection.target=0.08``.

    Raises:
        CheckpointError: no record and no data named.
        ConfigError: with every mistake in one message.
    """
    description = checkpoint.read_description(path)
    document = description.get("training", {}).get("config")
    if document is None:
        if data is None and not any(text.startswith("data.name=") for text in overrides):
            raise CheckpointError(
                f"{path} does not record the run it comes from, so its data are unknown; "
                "fix: name them: --data PRESET or --data FILE.toml"
            )
        document = {role: description[role] for role in ("selector", "predictor")} | _NAMED_FOR_IT
        document["name"] = description.get("training", {}).get("name", Path(path).name)
    if data is not None:
        document = document | {"data": dict(read_document(data).get("data", {}))}
        if "max_length" in description["preprocessing"]:
            document["data"]["max_length"] = description["preprocessing"]["max_length"]
            document["data"].pop("lengths", None)
    mistakes = [mistake for text in overrides if (mistake := override(document, text))]
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        mistakes += explain(error, RunConfig)
    if mistakes:
        raise ConfigError(f"{path}: " + "; ".join(mistakes))
    return config


def data_for(pair: Rationalizer, config: RunConfig) -> DataSet:
    """The data of a configuration, held against a pair's classes.

    Raises:
        DataError: other classes, or in another order. A pair whose classes were never named ('0', '1', ...)
            takes any of the same number.
    """
    data = load_data(config.data)
    check_classes(pair.labels, data)
    return data


def check_classes(labels: Sequence[str], data: DataSet) -> None:
    """Raise DataError unless a model's classes are those of the data; see ``data_for``."""
    unnamed = list(labels) == [str(number) for number in range(len(labels))]
    if list(labels) != list(data.label_names) and not (unnamed and len(labels) == len(data.label_names)):
        raise DataError(
            f"the data have {len(data.label_names)} classes ({_some(data.label_names)}), the model has {len(labels)} "
            f"({_some(labels)}); fix: the data it was trained for, classes in the same order (own data: data.labels)"
        )


def start_from(pair: Rationalizer, start: Rationalizer, path: Path, data: DataSet) -> None:
    """Give a fresh pair the weights of a checkpoint, in place.

    Args:
        start: the checkpoint at ``path``.

    Raises:
        DataError: other classes.
        ConfigError: other tokens or sizes.
    """
    check_classes(start.labels, data)
    mine, theirs = pair.preprocessor, start.preprocessor
    if isinstance(mine, TextPreprocessor) and not (
        isinstance(theirs, TextPreprocessor) and same_tokens(mine, theirs)
    ):
        raise ConfigError(f"{path} reads other tokens than this run; fix: a warm start with the same tokenizer")
    for role in ("selector", "predictor"):
        mine, theirs = getattr(pair, role), getattr(start, role)
        sizes = [m.backbone.settings.model_dump(exclude={"weights", "word_embeddings"}) for m in (mine, theirs)]
        if sizes[0] != sizes[1]:
            names = ", ".join(name for name in sizes[0] if sizes[0][name] != sizes[1][name])
            raise ConfigError(
                f"the {role} of {path} has other sizes than this run's ({names}); warm starts need the same; fix: "
                f"those of its config.json, by --set {role}.NAME=VALUE"
            )
        mine.load_state_dict(theirs.state_dict())


def _some(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in list(names)[:6]) + (", ..." if len(names) > 6 else "")
