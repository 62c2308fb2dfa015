"""Random changes of training images that keep their label. Vectorised over a batch."""

from __future__ import annotations

import numpy as np

AUGMENTATIONS = ("none", "crop", "flip", "crop_flip")
MARGIN = 4
"""Pixels of black border that a crop may move the image by, on each side (the paper's CIFAR runs)."""


def augment(pixels: np.ndarray, augmentation: str, generator: np.random.Generator) -> np.ndarray:
    """Crop and mirror each image at random.

    Args:
        pixels: uint8 (B, height, width, channels).
        augmentation: 'crop' shifts within a black border of ``MARGIN`` pixels, 'flip' mirrors half of the
            images left to right, 'crop_flip' does both, 'none' neither.
        generator: decides; the same state gives the same images.
    """
    if "crop" in augmentation:
        pixels = _cropped(pixels, generator)
    if "flip" in augmentation:
        mirrored = generator.random(len(pixels)) < 0.5
        pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
    return np.ascontiguousarray(pixels)


def _cropped(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    count, height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    tops, lefts = generator.integers(0, 2 * MARGIN + 1, size=(2, count))
    rows = (tops[:, None] + np.arange(height))[:, :, None]
    columns = (lefts[:, None] + np.arange(width))[:, None, :]
    return padded[np.arange(count)[:, None, None], rows, columns]
