"""The user's own images: a folder for each class, or such folders under train, dev and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rekd_train.config.run import DataConfig
from rekd_train.data.classes import class_names, class_numbers, label_fix, unknown_labels
from rekd_train.data.duplicates import find_duplicates
from rekd_train.data.examples import DataSet, LabelledImages
from rekd_train.data.partition import completed
from rekd_train.data.tables import SPLIT_NAMES
from rekd_train.errors import DataError, listed
from rekd_train.files import sha256
from rekd_train.inputs.prediction import RATIONALE

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def image_folder(config: DataConfig) -> DataSet:
    """Images of any size in ``data.path``; they are resized as the model asks for when they are encoded.

    Files NAME.rationale.png, which ``rekd-query --save`` writes, are left out.

    A file that occurs twice, byte for byte, is kept once (``rekd_train.data.duplicates``).

    Raises:
        DataError: no folder, no classes or no images in it, a class that training does not know.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"'{config.path}' is no folder; fix: --set data.path=DIR with one folder for each class")
    files = _files(root)
    labels = {split: [path.relative_to(root).parts[-2] for path in paths] for split, paths in files.items()}
    found = find_duplicates(
        {split: [sha256(path) for path in paths] for split, paths in files.items()},
        labels,
        lambda split, row: str(files[split][row].relative_to(root)),
    )
    files = {split: [files[split][row] for row in rows] for split, rows in found.kept.items()}
    labels = {split: [labels[split][row] for row in rows] for split, rows in found.kept.items()}
    names = class_names(labels, config.labels)
    _check_labels(config, files, labels, names)
    splits = {split: LabelledImages(paths, class_numbers(labels[split], names)) for split, paths in files.items()}
    return DataSet(
        splits=completed(splits, config.dev_share, config.test_share, config.seed),
        label_names=names,
        origin=f"images of the user's own, {root.name} ({found.dropped} duplicates dropped; licence: theirs)",
        duplicates=found.dropped,
        contradictions=found.contradictions,
    )


def every_image(config: DataConfig, names: Sequence[str]) -> LabelledImages:
    """All images of ``data.path``, a folder for each class, duplicates and all: to measure a model on.

    Args:
        names: the model's classes, in the order of the logits.

    Raises:
        DataError: as ``image_folder``; classes that are none of the model's.
    """
    paths = _images_by_class(Path(config.path))
    labels = [path.parent.name for path in paths]
    _check_labels(config, {"test": paths}, {"test": labels}, names)
    return LabelledImages(paths, class_numbers(labels, names))


def without_splits(root: Path) -> bool:
    """Whether a folder of images says nothing of splits."""
    return "train" not in _split_folders(root)


def _check_labels(
    config: DataConfig, files: dict[str, list[Path]], labels: dict[str, list[str]], names: Sequence[str]
) -> None:
    problems = []
    for split, paths in files.items():
        shown = [str(path.relative_to(config.path)) for path in paths]
        problems += unknown_labels(labels[split], names, shown.__getitem__)
    if problems:
        raise DataError(f"{config.path}: {listed(problems)}; {label_fix(names)}")


def _split_folders(root: Path) -> dict[str, Path]:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {SPLIT_NAMES[folder.name]: folder for folder in folders if folder.name in SPLIT_NAMES}


def _files(root: Path) -> dict[str, list[Path]]:
    parts = _split_folders(root)
    found = {split: _images_by_class(folder) for split, folder in parts.items()} if "train" in parts else {}
    return found or {"train": _images_by_class(root)}


def _images_by_class(folder: Path) -> list[Path]:
    paths = []
    for name in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        members = sorted(path for path in name.iterdir() if _is_image(path))
        if not members:
            raise DataError(f"{name} holds no images ({', '.join(SUFFIXES)}); fix: fill it or remove it")
        paths += members
    if not paths:
        raise DataError(f"{folder} holds no folders of images; fix: one folder for each class")
    return paths


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.lower().endswith(RATIONALE)
