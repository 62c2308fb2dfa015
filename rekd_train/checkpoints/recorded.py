"""A checkpoint taken up again: under its own record, with data that are named for it, or as a start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.checkpoints import checkpoint, read_description
from rekd_train.config.run import RunConfig, check_removed, checked_config, read_document
from rekd_train.data import DataSet, LabelledTexts, Split, encode, is_unsplit, load_data, load_whole
from rekd_train.data.table_files import SUFFIXES
from rekd_train.errors import CheckpointError, ConfigError, DataError
from rekd_train.inputs.preprocessors import Preprocessor, same_tokens
from rekd_train.inputs.text import TextPreprocessor
from rekd_train.models.rationalizer import Rationalizer


def recorded_config(path: Path, data: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration to calibrate, compact or evaluate a checkpoint under, with ``key=value`` changes.

    ``data``: a preset or a TOML file whose section ``data`` takes the place of the recorded one, or a table of texts
    (columns as recorded); needed for a checkpoint that records no run, such as an imported one.
    CheckpointError: no record and no data named; ConfigError: with every mistake in one message.
    """
    description = read_description(path)
    document = description.get("training", {}).get("config")
    if document is None:
        if data is None and not any(text.startswith("data.name=") for text in overrides):
            raise CheckpointError(f"{path} does not record the run it comes from, so its data are unknown; fix: name "
                                  "them: --data PRESET or --data FILE.toml")
        document = {role: description[role] for role in ("selector", "predictor")}
        document["optimisation"] = {"learning_rate": 5e-5}  # that pretrained networks bear, which those were made from
        document["name"] = description.get("training", {}).get("name", Path(path).name)
    check_removed(document)
    if data is not None:
        document = document | {"data": _named_data(data, description, document.get("data", {}))}
        if "max_length" in description["preprocessing"]:
            document["data"]["max_length"] = description["preprocessing"]["max_length"]
            document["data"].pop("lengths", None)
    return checked_config(document, overrides, path)


def _named_data(data: str | Path, description: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    if Path(data).suffix.lower() not in SUFFIXES:
        return dict(read_document(data).get("data", {}))
    if recorded.get("name") != "table":
        return {"name": "table", "path": str(data), "labels": _named(description["labels"])}
    changes = {} if _same_path(recorded["path"], data) else {"path": str(data), "split_column": ""}
    return {**recorded, **changes, "labels": _named(description["labels"])}


def splits_to_measure(pair: Rationalizer, path: Path, config: RunConfig, split: str | None,
                      named: bool) -> tuple[dict[str, Split], str, str, str]:
    """What to measure the pair of the checkpoint at ``path`` on.

    ``split`` None: 'test'; of new data that say nothing of splits everything, which is called 'all'. Data that were
    ``named`` for it are new unless they are the recorded ones. Returns the encoded splits (the wanted one and 'dev';
    'all' alone), which of them is wanted, where the data come from, and in words what is measured.
    """
    data, unsplit = config.data, is_unsplit(config.data)
    shown = Path(data.path).name if data.path else f"data '{data.name}'"
    recorded = (read_description(path).get("training", {}).get("config") or {}).get("data", {})
    new = named and not (recorded.get("name") == data.name and _same_path(recorded["path"], data.path))
    if split is None and new and unsplit:
        names = _named(pair.labels) or data.labels or pair.labels
        check_classes(pair.labels, DataSet({}, tuple(names), shown))
        examples = load_whole(data, names)
        words = f"every {'row' if data.modality == 'text' else 'image'} of {shown}"
        if isinstance(examples, LabelledTexts) and (seen := len(set(examples.texts) & checkpoint.dev_texts(path))):
            words += f" ({seen} of them are dev examples of the checkpoint: it may have been trained on this file)"
        return {"all": encode(examples, pair.preprocessor)}, "all", shown, words
    split, found = split or "test", data_for(pair, config)
    share = {"train": 1 - data.dev_share - data.test_share, "dev": data.dev_share, "test": data.test_share}[split]
    cut = "" if (most := data.limits[split]) is None else f"at most {most} of "
    words = f"the {split} split of {shown}" + (f" ({cut}{share:.0%} of it, chosen by data.seed)" if unsplit else "")
    splits = {name: encode(found.splits[name], pair.preprocessor) for name in {split, "dev"}}
    return splits, split, found.origin, words


def _same_path(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def data_for(pair: Rationalizer, config: RunConfig) -> DataSet:
    """The data of a configuration; DataError unless a pair's classes are those of the data."""
    data = load_data(config.data)
    check_classes(pair.labels, data)
    return data


def check_classes(labels: Sequence[str], data: DataSet) -> None:
    """Raise DataError unless a model's classes are those of the data, in order; unnamed ones need the same number."""
    if list(labels) != list(data.label_names) and (_named(labels) or len(labels) != len(data.label_names)):
        raise DataError(f"the data have {len(data.label_names)} classes ({_some(data.label_names)}), the model has "
                        f"{len(labels)} ({_some(labels)}); fix: the data it was trained for, classes in the same order "
                        "(own data: data.labels)")


def _named(labels: Sequence[str]) -> list[str]:
    """Names of classes; none if they are but numbers."""
    return [] if list(labels) == [str(number) for number in range(len(labels))] else list(labels)


_NO_SIZES = {"pretrained", "word_embeddings", "dropout", "attention_dropout", "head_dropout"}
"""Settings of a network that say where its weights came from or how they are trained: its tensors do not show them."""


def start_from(
    pair: Rationalizer, start: Rationalizer, path: Path, data: DataSet, halves: Collection[str]
) -> None:
    """Give ``halves`` of a fresh pair the weights of ``start``, the checkpoint at ``path``, in place.

    DataError: other classes; ConfigError: other tokens or sizes.
    """
    check_classes(start.labels, data)
    mine, theirs = pair.preprocessor, start.preprocessor
    if isinstance(mine, TextPreprocessor) and not (isinstance(theirs, TextPreprocessor) and same_tokens(mine, theirs)):
        raise ConfigError(f"{path} reads other tokens than this run; fix: a warm start with the same tokenizer")
    for role in halves:
        mine, theirs = getattr(pair, role), getattr(start, role)
        sizes = [m.backbone.settings.model_dump(exclude=_NO_SIZES) for m in (mine, theirs)]
        if sizes[0] != sizes[1]:
            names = ", ".join(name for name in sizes[0] if sizes[0][name] != sizes[1][name])
            raise ConfigError(f"the {role} of {path} has other sizes than this run's ({names}); warm starts need the "
                              f"same; fix: those of its config.json, by --set {role}.NAME=VALUE")
        mine.load_state_dict(theirs.state_dict())


def _some(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in list(names)[:6]) + (", ..." if len(names) > 6 else "")


EXAMPLES = 200
IMAGE_BYTES = 8_000_000  # large images are fewer: a checkpoint should stay a file to send


def checkpoint_examples(data: DataSet, preprocessor: Preprocessor) -> dict[str, Any]:
    """Arguments for ``checkpoint.save``: ``examples`` for texts, ``images`` for images."""
    dev = data.splits["dev"]
    if isinstance(dev, LabelledTexts):
        some = dev.head(EXAMPLES)
        pairs = zip(some.texts, some.labels, strict=True)
        return {"examples": [{"text": text, "label": data.label_names[label]} for text, label in pairs]}
    settings = preprocessor.settings
    fitting = IMAGE_BYTES // (settings.height * settings.width * settings.channels)
    split = encode(dev.head(max(16, min(EXAMPLES, fitting))), preprocessor)
    return {"images": {"pixels": split.inputs(np.arange(len(split)))["pixels"], "labels": split.labels}}
