"""Labelled examples to measure a served model on: the checkpoint's own data, a preset's, or a file of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.results import Input
from rekd_train.config.run import DataConfig, explain
from rekd_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rekd_train.data import LabelledImages, LabelledTexts

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Labelled:
    """Examples, and where they come from."""

    examples: LabelledTexts | LabelledImages
    origin: str
    own: bool
    """Whether they are the checkpoint's recorded data, so that its own figures are about them."""

    @property
    def items(self) -> list[Any]:
        """What ``Pipeline.predict`` takes."""
        from rekd_train.data import LabelledTexts

        whole = self.examples.texts if isinstance(self.examples, LabelledTexts) else self.examples.images
        return list(whole)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64."""
        return np.asarray(self.examples.labels)

    def head(self, count: int | None) -> Labelled:
        """The first ``count``; None: all."""
        return Labelled(self.examples.head(count), self.origin, self.own)

    def input(self) -> Input:
        """For the result file: where the examples come from, and a digest of every item and label."""
        digest = hashlib.sha256(self.labels.astype(np.int64).tobytes())
        for item in self.items:
            content = item.tobytes() if isinstance(item, np.ndarray) else str(item).encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return Input(name=self.origin, sha256=digest.hexdigest())


def is_table(data: str | None) -> bool:
    """Whether ``data`` names a file of the user's rather than a preset or settings."""
    return data is not None and Path(data).suffix in TABLES


def labelled_examples(
    labels: Sequence[str],
    *,
    checkpoint: Path | None,
    data: str | None,
    overrides: Sequence[str] = (),
    split: str = "test",
) -> Labelled:
    """The examples that a command was asked to measure on.

    Args:
        labels: the model's classes, in the order of its logits.
        checkpoint: names the data it was trained on, unless ``data`` does.
        data: a preset, a TOML file, or a table of which every row is taken.
        overrides: ``data.KEY=VALUE`` changes.
        split: of a preset's or file's data.

    Raises:
        ConfigError: no data are named, or the settings are wrong.
        DataError: the data are missing, damaged, or have other classes than the model.
    """
    from rekd_train.checkpoints.recorded import check_classes, recorded_config
    from rekd_train.data import SPLITS, load_data

    if is_table(data):
        from rekd_train.data.tables import every_row

        config = _data_config({"name": "table", "path": data, "labels": list(labels)}, overrides)
        examples = every_row(config, labels)
        return Labelled(examples, f"{Path(data).name}, every row", own=False)
    if split not in SPLITS:
        raise ConfigError(f"split is '{split}'; splits: {', '.join(SPLITS)}")
    if checkpoint is not None:
        config = recorded_config(checkpoint, data, overrides).data
    elif data is not None:
        from rekd_train.config.files import read_document

        config = _data_config(dict(read_document(data).get("data", {})), overrides)
    else:
        raise ConfigError("no data to measure on; fix: --data PRESET|FILE, or --checkpoint CKPT, which records its own")
    found = load_data(config)
    check_classes(labels, found)
    if not len(found.splits[split]):
        raise DataError(f"the split '{split}' of {found.origin} is empty; fix: another --split")
    own = checkpoint is not None and data is None and not overrides
    return Labelled(found.splits[split], f"{found.origin}, {split}", own)


def _data_config(document: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    from pydantic import ValidationError

    from rekd_train.config.files import override

    whole = {"data": document}
    mistakes = [mistake for text in overrides if (mistake := override(whole, text))]
    mistakes += [f"{key}: only data.KEY can be set here" for key in whole if key != "data"]
    try:
        config = DataConfig.model_validate(whole["data"])
    except ValidationError as error:
        mistakes += explain(error, DataConfig)
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return config
