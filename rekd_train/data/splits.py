"""One split as training and evaluation read it: batches of arrays by index, and what lies on its tokens and patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, Examples, LabelledImages, LabelledTexts
from rekd_train.errors import ConfigError, DataError, InputError, listed
from rekd_train.inputs.image import ImagePreprocessor
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor

_TOKENIZED_AT_ONCE = 512  # texts: an encoding takes some fifty times the memory of its ids, more with windows


@dataclass(frozen=True)
class TokenizedTexts:
    """One split of texts, tokenised once and padded batch by batch."""

    ids: list[np.ndarray] = field(repr=False)  # for each text (length,) int32, specials included
    labels: np.ndarray  # (n,) int64
    preprocessor: TextPreprocessor
    truth: list[np.ndarray | None] | None = field(default=None, repr=False)  # (length,) bool: in a human rationale
    whole_lengths: np.ndarray | None = field(default=None, repr=False)  # (n,) int64: tokens before cutting, if known

    augmented = False

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each text, specials included."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def inputs(self, indices: Sequence[int], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The batch of these texts: ``input_ids`` and ``attention_mask`` (B, N), as wide as the longest of them."""
        rows = [self.ids[index] for index in indices]
        return self.preprocessor.pad(rows, max(len(row) for row in rows))


@dataclass(frozen=True)
class ImageSplit:
    """One split of images, all of the size that the model takes."""

    pixels: np.ndarray = field(repr=False)  # uint8 (n, height, width, channels)
    labels: np.ndarray  # (n,) int64
    preprocessor: ImagePreprocessor
    truth: list[np.ndarray | None] | None = field(default=None, repr=False)  # (patches,) bool: mostly in its region
    augmentation: str = "none"  # 'none', 'crop', 'flip' or 'crop_flip': see ``augment``

    whole_lengths = None

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64: patches of each image, all the same."""
        return np.full(len(self), self.preprocessor.positions, dtype=np.int64)

    @property
    def augmented(self) -> bool:
        """Whether ``inputs`` changes the images at random when it is given a generator."""
        return self.augmentation != "none"

    def inputs(self, indices: Sequence[int], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The batch of these images: ``pixels``, uint8 (B, height, width, channels); no generator: as they are."""
        pixels = self.pixels[np.asarray(indices)]
        return {"pixels": pixels if generator is None else augment(pixels, self.augmentation, generator)}


Split = TokenizedTexts | ImageSplit  # encoded examples of one split, as training and evaluation read them


def encode(examples: Examples, preprocessor: Preprocessor, augmentation: str = "none") -> Split:
    """The tensors of a split's examples.

    ConfigError: texts for a model of images, or vice versa; DataError: an image that cannot be read, a wordless text.
    """
    if isinstance(examples, LabelledTexts) and isinstance(preprocessor, TextPreprocessor):
        return tokenize(examples, preprocessor)
    if isinstance(examples, LabelledImages) and isinstance(preprocessor, ImagePreprocessor):
        return _pixels(examples, preprocessor, augmentation)
    kind = "texts" if isinstance(examples, LabelledTexts) else "images"
    raise ConfigError(f"the data are {kind}, the model reads {preprocessor.settings.kind}s")


def encode_splits(data: DataSet, preprocessor: Preprocessor, config: DataConfig) -> dict[str, Split]:
    """Every split of a data set; augmentation is for the training split alone. Errors as ``encode``."""
    return {name: encode(examples, preprocessor, config.augmentation if name == "train" else "none")
            for name, examples in data.splits.items()}


def tokenize(examples: LabelledTexts, preprocessor: TextPreprocessor) -> TokenizedTexts:
    """Tokenise a split; DataError names all texts in which the tokenizer finds nothing but special tokens."""
    texts, rationales = examples.texts, examples.rationales
    ids, truth, wordless = [], [], []
    whole = np.zeros(len(texts), dtype=np.int64)
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        encodings = preprocessor.encode(texts[start : start + _TOKENIZED_AT_ONCE])
        for index, encoding in enumerate(encodings, start):
            specials = sum(encoding.special_tokens_mask)
            if len(encoding) <= specials:
                wordless.append(repr(texts[index][:40]))
            ids.append(np.array(encoding.ids, dtype=np.int32))
            shared = specials + preprocessor.window_overlap  # with the window before
            whole[index] = len(encoding) + sum(len(window) - shared for window in encoding.overflowing)
            if rationales is not None:
                spans = rationales[index]
                truth.append(None if spans is None else _touched(encoding.offsets, spans))
    if wordless:
        raise DataError(f"texts that hold no word that the tokenizer knows: {listed(wordless)}; fix: leave them out")
    return TokenizedTexts(ids, np.asarray(examples.labels, dtype=np.int64), preprocessor, truth or None, whole)


def _touched(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N,) bool: tokens that share a character with any span; special tokens have none."""
    starts, ends = np.asarray(offsets).reshape(-1, 2).T
    touched = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        touched |= (starts < end) & (ends > start)
    return touched


def _pixels(examples: LabelledImages, preprocessor: ImagePreprocessor, augmentation: str) -> ImageSplit:
    settings, images = preprocessor.settings, examples.images
    if isinstance(images, np.ndarray) and images.shape[1:] == (settings.height, settings.width, settings.channels):
        pixels = images
    else:
        try:
            pixels = np.concatenate(
                [preprocessor(images[i : i + 256], first_index=i).inputs["pixels"] for i in range(0, len(images), 256)])
        except InputError as error:
            raise DataError(f"{error}; fix: repair it or take it out of the data") from None
    truth = None
    if examples.regions is not None:  # the patches of which at least half lies in the region
        top, left, bottom, right = examples.regions.T.astype(float)
        tall = _shares(top, bottom, settings.rows, images.shape[1])
        wide = _shares(left, right, settings.columns, images.shape[2])
        truth = list((tall[:, :, None] * wide[:, None, :] >= 0.5).reshape(len(images), -1))
    return ImageSplit(pixels, np.asarray(examples.labels, dtype=np.int64), preprocessor, truth, augmentation)


def scores_at(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) values of the segments (m, 3), in order, under tokens (N, 2): the mean by shared characters, else NaN."""
    empty = segments[segments[:, 0] == segments[:, 1]]  # a space that a tokenizer trims away
    starts, ends, values = segments[segments[:, 0] < segments[:, 1]].T
    first, last = np.searchsorted(ends, offsets[:, 0], "right"), np.searchsorted(starts, offsets[:, 1], "left")
    found = np.full(len(offsets), np.nan, dtype=np.float32)
    one = (last - first == 1) & (offsets[:, 0] < offsets[:, 1])
    found[one] = values[first[one]]
    for token in np.flatnonzero((last - first > 1) & (offsets[:, 0] < offsets[:, 1])):
        chosen = slice(first[token], last[token])
        shared = np.minimum(ends[chosen], offsets[token, 1]) - np.maximum(starts[chosen], offsets[token, 0])
        found[token] = np.average(values[chosen], weights=shared)
    for start, end, value in empty:
        found[(offsets[:, 0] == start) & (offsets[:, 1] == end)] = value
    return found


def marks_at(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) the largest weight of a passage (m, 3) that a token (N, 2) touches; 0 for none."""
    found = np.zeros(len(offsets), dtype=np.float32)
    for start, end, weight in segments:
        touched = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
        found[touched] = np.maximum(found[touched], weight)
    return found


def on_patches(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns,) float32: under each patch the mean of a grid of any size, by the area they share."""
    high, wide = (np.arange(count + 1) / count for count in grid.shape)
    means = _shares(high[:-1], high[1:], rows).T @ grid @ _shares(wide[:-1], wide[1:], columns)
    return means.astype(np.float32).ravel()


def marked_patches(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns,) float32: the weight of boxes (m, 5) in parts of the image, times how far they fill a patch.

    A box that is smaller than a patch counts by how much of the box lies in it.
    """
    left, top, right, bottom, weight = boxes.T
    filled = _shares(top, bottom, rows)[:, :, None] * _shares(left, right, columns)[:, None, :]
    smaller = np.maximum(1, 1 / (rows * columns * (right - left) * (bottom - top)))
    return (filled * (weight * smaller)[:, None, None]).max(axis=0, initial=0).astype(np.float32).ravel()


def _shares(starts: np.ndarray, ends: np.ndarray, cells: int, length: int = 1) -> np.ndarray:
    """(m, cells): the part of each of so many equal cells of a length that lies within an interval."""
    edges = np.arange(cells + 1) * length / cells
    shared = np.minimum(ends[:, None], edges[1:]) - np.maximum(starts[:, None], edges[:-1])
    return np.clip(shared, 0, None) / (length / cells)


def bucketed_batches(lengths: np.ndarray, batch_size: int,
                     generator: np.random.Generator | None = None) -> Iterator[np.ndarray]:
    """Index batches of examples of similar ``lengths`` (n,), so that little padding is computed.

    Shuffled by the generator; without one in ascending length, for evaluation. Every example comes once.
    """
    order = np.arange(len(lengths)) if generator is None else generator.permutation(len(lengths))
    pool = len(order) if generator is None else batch_size * 16
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        block = order[start : start + pool]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
    shuffled = range(len(batches)) if generator is None else generator.permutation(len(batches))
    yield from (batches[index] for index in shuffled)


MARGIN = 4  # pixels of black border that a crop may move the image by, on each side (the paper's CIFAR runs)


def augment(pixels: np.ndarray, augmentation: str, generator: np.random.Generator) -> np.ndarray:
    """Images, uint8 (B, height, width, channels): 'crop' shifts them within a black border of ``MARGIN`` pixels, 'flip'
    mirrors half of them left to right, at random; 'crop_flip' does both, 'none' neither."""
    if "crop" in augmentation:
        count, height, width, _ = pixels.shape
        padded = np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
        tops, lefts = generator.integers(0, 2 * MARGIN + 1, size=(2, count))
        rows = (tops[:, None] + np.arange(height))[:, :, None]
        columns = (lefts[:, None] + np.arange(width))[:, None, :]
        pixels = padded[np.arange(count)[:, None, None], rows, columns]
    if "flip" in augmentation:
        mirrored = generator.random(len(pixels)) < 0.5
        pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
    return np.ascontiguousarray(pixels)
