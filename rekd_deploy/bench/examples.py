"""Examples to measure a served model on: labelled ones, and the same as features whose content can be exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.runtimes.base import Arrays
from rekd_train.config.run import DataConfig, explain
from rekd_train.errors import ConfigError, DataError
from rekd_train.inputs.image import ImagePreprocessor
from rekd_train.inputs.text import TextPreprocessor

if TYPE_CHECKING:
    from rekd_train.data import LabelledImages, LabelledTexts, Split
    from rekd_train.inputs.preprocessors import Preprocessor

BATCH = 32
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Labelled:
    """Examples, and where they come from."""

    examples: LabelledTexts | LabelledImages
    origin: str

    @property
    def items(self) -> list[Any]:
        """What ``Pipeline.predict`` takes."""
        return list(vars(self.examples).get("texts", vars(self.examples).get("images")))

    def head(self, count: int | None) -> Labelled:
        """The first N; None: all."""
        return replace(self, examples=self.examples.head(count))


def labelled_examples(
    labels: Sequence[str], checkpoint: Path | None, data: str | None, overrides: Sequence[str] = (), split: str = "test"
) -> Labelled:
    """The examples that a command was told to measure on.

    Args:
        labels: the model's classes, in order.
        checkpoint: names the data it was trained on, unless ``data`` does.
        data: a preset, a TOML file, or a table of which every row is taken.
        overrides: ``data.KEY=VALUE`` changes.
        split: of a preset's or file's data.

    Raises:
        ConfigError: no data are named, or the settings are wrong.
        DataError: the data are missing, damaged, or have other classes than the model.
    """
    from rekd_train.checkpoints.recorded import check_classes, recorded_config
    from rekd_train.config.run import read_document
    from rekd_train.data import SPLITS, load_data, load_whole

    if data is not None and Path(data).suffix in TABLES:
        config = _data_config({"name": "table", "path": data, "labels": list(labels)}, overrides)
        return Labelled(load_whole(config, labels), f"{Path(data).name}, every row")
    if split not in SPLITS:
        raise ConfigError(f"split is '{split}'; splits: {', '.join(SPLITS)}")
    if checkpoint is not None:
        config = recorded_config(checkpoint, data, overrides).data
    elif data is not None:
        config = _data_config(dict(read_document(data).get("data", {})), overrides)
    else:
        raise ConfigError("no data to measure on; fix: --data PRESET|FILE, or --checkpoint CKPT, which records its own")
    found = load_data(config)
    check_classes(labels, found)
    if not len(found.splits[split]):
        raise DataError(f"the split '{split}' of {found.origin} is empty; fix: another --split")
    return Labelled(found.splits[split], f"{found.origin}, {split}")


def _data_config(document: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    from pydantic import ValidationError

    from rekd_train.config.run import override

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


# features: words by position, patches by place


@dataclass(frozen=True)
class Features:
    """n examples with N positions each; immutable, every change gives another one."""

    content: np.ndarray
    """Texts: (n, N) int64 token ids. Images: (n, N, height, width, channels) uint8 patches; where the grid does not
    divide the image, (n, height, width, channels) uint8 pixels."""
    selectable: np.ndarray
    """(n, N) bool: words, no special token and no padding; patches: all."""
    lengths: np.ndarray
    """(n,) int64: positions of each, specials included."""
    preprocessor: Preprocessor
    full_width: bool = False
    """Texts are padded to the model's limit: for rules by which padding may be selected."""

    def __len__(self) -> int:
        return len(self.content)

    @property
    def separable(self) -> bool:
        """Whether the content of one feature can be changed and no other's."""
        return self.content.ndim != 4

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64: selectable features."""
        return self.selectable.sum(axis=1)

    def take(self, rows: np.ndarray) -> Features:
        """These examples, in this order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("content", "selectable", "lengths")})

    def without(self, mask: np.ndarray) -> Features:
        """The examples with some features (n, N) bool taken out of the input itself.

        Words are deleted and the rest closes up, as ERASER takes a rationale out of a document; patches become
        neutral, for an image has no place without pixels.
        """
        if not isinstance(self.preprocessor, TextPreprocessor):
            return self.neutral(mask)
        ids = [row[:length][~gone[:length]] for row, length, gone in zip(self.content, self.lengths, mask, strict=True)]
        return _texts(ids, self.preprocessor, self.full_width)

    def neutral(self, mask: np.ndarray | None = None) -> Features:
        """The same content in every feature of the mask (n, N) bool, else in every selectable one.

        That of [MASK], else [UNK]; the mean colour of these images. Where patches cannot be told apart in bytes, every
        pixel is neutral.
        """
        content = self.content.copy()
        content[(self.selectable if mask is None else mask) if self.separable else ...] = self._neutral_content()
        return replace(self, content=content)

    def _neutral_content(self) -> int | np.ndarray:
        if not isinstance(self.preprocessor, TextPreprocessor):
            return np.round(self.content.mean(axis=tuple(range(self.content.ndim - 1)))).astype(np.uint8)
        ids = {self.preprocessor.token(number): number for number in range(self.preprocessor.vocabulary_size)}
        names = ("[MASK]", "<mask>", "[UNK]", "<unk>", self.preprocessor.words()[0])
        return next(ids[name] for name in names if name in ids)

    def batches(self, size: int = BATCH) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Indices and inputs of batches of similar length, as they are served; the same ones at every call."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self._inputs(rows)

    def _inputs(self, rows: np.ndarray) -> Arrays:
        if isinstance(self.preprocessor, TextPreprocessor):
            sizes = self.preprocessor
            width = sizes.positions if self.full_width else sizes.bucket(int(self.lengths[rows].max()))
            ids = self.content[rows, :width]
            return {"input_ids": ids, "attention_mask": (np.arange(width) < self.lengths[rows, None]).astype(np.int64)}
        pixels = self.content[rows]
        if self.separable:
            settings = self.preprocessor.settings
            grid = pixels.reshape(len(rows), settings.rows, settings.columns, *pixels.shape[2:]).swapaxes(2, 3)
            pixels = grid.reshape(len(rows), settings.height, settings.width, settings.channels)
        return {"pixels": np.ascontiguousarray(pixels)}


def features_of(split: Split, preprocessor: Preprocessor, *, full_width: bool = False) -> Features:
    """The features of a split; ``preprocessor`` is the served model's."""
    if isinstance(preprocessor, TextPreprocessor):
        rows = [split.inputs([index])["input_ids"][0] for index in range(len(split))]
        return _texts(rows, preprocessor, full_width)
    if not isinstance(preprocessor, ImagePreprocessor):
        raise TypeError(f"no features of {type(preprocessor).__name__}")
    content, settings = split.inputs(np.arange(len(split)))["pixels"], preprocessor.settings
    shape = (len(content), preprocessor.positions)
    if settings.height % settings.rows == 0 and settings.width % settings.columns == 0:
        high, wide = settings.height // settings.rows, settings.width // settings.columns
        cut = content.reshape(len(content), settings.rows, high, settings.columns, wide, settings.channels)
        content = np.ascontiguousarray(cut.swapaxes(2, 3)).reshape(*shape, high, wide, settings.channels)
    return Features(content, np.ones(shape, bool), np.full(shape[0], shape[1]), preprocessor)


def _texts(ids: list[np.ndarray], preprocessor: TextPreprocessor, full_width: bool) -> Features:
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    padded = preprocessor.pad(ids, preprocessor.positions)  # as wide as any batch can be, so that a batch is a slice
    special = np.isin(padded["input_ids"], list(preprocessor.special_ids.values()))
    selectable = (padded["attention_mask"] > 0) & ~special
    return Features(padded["input_ids"], selectable, lengths, preprocessor, full_width)
