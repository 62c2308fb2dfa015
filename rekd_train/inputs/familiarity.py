"""How usual a text is beside the ones that a model has learnt from: what ``Prediction.doubt`` says. Torch-free.

A model answers gibberish and other languages as readily as what it knows, and as sure. Their tokens are rare in the
texts of the training, so a text's mean surprise, -ln p(token), tells them apart.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from rekd_train.errors import CheckpointError

_STEP = 0.1  # nats of one count of the table
_AT_ONCE = 1000  # texts that are counted at once
_USUAL = 25  # a text counts as if it held so many tokens of the usual surprise, too: of a short one little is known
_SHARES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Familiarity:
    """Surprise of each token, and what surprise the dev texts have."""

    table: np.ndarray  # (V,) uint8: -ln p of each token, in tenths of a nat
    usual: float  # mean surprise of a dev text, nats a token
    quantiles: np.ndarray  # (101,) float32: percentiles of the dev texts' surprise, ascending

    @classmethod
    def fit(cls, train: Sequence[ArrayLike], dev: Sequence[ArrayLike], vocabulary: int) -> Familiarity:
        """From the token ids of training texts and of dev texts, special tokens left out."""
        counts = np.ones(vocabulary)  # every token may come
        for start in range(0, len(train), _AT_ONCE):
            joined = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in train[start : start + _AT_ONCE]])
            counts += np.bincount(joined, minlength=vocabulary)
        table = np.clip(np.rint(-np.log(counts / counts.sum()) / _STEP), 0, 255).astype(np.uint8)
        usual = float(np.mean([_STEP * table[np.asarray(ids)].mean() for ids in dev if len(ids)]))
        untold = cls(table, usual, np.zeros(101, dtype=np.float32))
        surprises = [untold.surprise(ids) for ids in dev]
        return cls(table, usual, np.percentile(surprises, np.arange(101)).round(4).astype(np.float32))  # as packed

    @cached_property
    def _values(self) -> np.ndarray:
        """The table, and behind it what a token beyond it counts: it is as rare as any."""
        return np.append(self.table, self.table.max()).astype(np.int64)

    def surprise(self, ids: Sequence[int]) -> float:
        """Nats a token."""
        return float(self._surprises(*_row(ids))[0])

    def doubt(self, ids: Sequence[int]) -> float:
        """Share of the dev texts that are more usual, 0..1: 1 is stranger than all of them."""
        return self.doubts(*_row(ids))[0]

    def doubts(self, ids: np.ndarray, mask: np.ndarray, around: Sequence[int] = ()) -> list[float]:
        """The doubt of each text of a batch: (B, N) token ids, of which those count where the mask (B, N) is 1, but
        for the ids ``around`` each."""
        return np.interp(self._surprises(ids, mask, around), self.quantiles, _SHARES).tolist()

    def _surprises(self, ids: np.ndarray, mask: np.ndarray, around: Sequence[int] = ()) -> np.ndarray:
        known, last = self._values, len(self.table)
        # whole numbers: a text's sum is the same in any batch
        sums = (known.take(ids, mode="clip") * mask).sum(axis=1) - sum(int(known[min(each, last)]) for each in around)
        return (_STEP * sums + _USUAL * self.usual) / (mask.sum(axis=1) - len(around) + _USUAL)

    def packed(self) -> str:
        """As text; ``unpacked`` is the inverse."""
        content = {"usual": self.usual, "quantiles": [round(float(each), 4) for each in self.quantiles],
                   "table": base64.b64encode(zlib.compress(self.table.tobytes(), 9)).decode("ascii")}  # fmt: skip
        return json.dumps(content)

    @classmethod
    def unpacked(cls, text: str) -> Familiarity:
        """CheckpointError: damaged."""
        try:
            content = json.loads(text)
            table = np.frombuffer(zlib.decompress(base64.b64decode(content["table"], validate=True)), np.uint8)
            quantiles, usual = np.array(content["quantiles"], dtype=np.float32), float(content["usual"])
            if quantiles.shape != (101,) or not len(table) or not (np.diff(quantiles) >= 0).all() or usual != usual:
                raise ValueError("no 101 ascending percentiles, no mean, or no table")
            return cls(table, usual, quantiles)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise CheckpointError(f"what is known of usual texts is damaged: {error}; fix: copy it again") from None


def _row(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    row = np.asarray([ids], dtype=np.int64)
    return row, np.ones_like(row)
