"""What a student learns from: a frozen pair that runs along, or what a teacher was recorded to say."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split
from rekd_train.data.examples import names_of, text_id
from rekd_train.data.knowledge import AlignedKnowledge
from rekd_train.errors import DataError, MissingExtraError
from rekd_train.evaluation.forward import classify
from rekd_train.files import write_bytes
from rekd_train.inputs.preprocessors import full_length
from rekd_train.models.base import apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.runtime import Batch, Runtime, run_frozen


class Teaching(ABC):
    """What the objectives ask. B = batch, N = positions, C = classes."""

    @abstractmethod
    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32; only the difference of the two counts."""

    @abstractmethod
    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: the teacher's own rationale."""

    @abstractmethod
    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 on the teacher's own rationale."""

    @abstractmethod
    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32 on another mask (B, N)."""

    def known_tokens(self, batch: Batch, positions: int) -> Tensor | None:
        """(B, N) bool: tokens that it scores; None: all."""
        return None

    def known_classes(self, batch: Batch) -> Tensor | None:
        """(B,) bool: examples of which it tells the classes; None: all."""
        return None

    def marks(self, batch: Batch, positions: int) -> Tensor | None:
        """(B, N) float32: weights of the passages that decide, NaN where it marks none; None: it marks nothing."""
        return None


class Teacher(Teaching):
    """A frozen pair: computed in every step, or once over a split whose examples stay the same (``remembered``)."""

    def __init__(self, pair: Rationalizer, runtime: Runtime, precision: str, remembered: Split | None = None) -> None:
        self._pair, self._runtime, self._precision = pair.to(runtime.device).eval(), runtime, precision
        self._latest: tuple[Batch, Tensor, Tensor] | None = None
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None
        if remembered is not None:
            logits, mask, classes = run_frozen(remembered, runtime, precision, self._everything, count=3)
            self._memory = logits, mask.bool(), classes

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        return self._selector(batch)[0][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        return self._selector(batch)[1][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        return self._memory[2][batch.indices] if self._memory else self.class_logits_on(batch, self._selector(batch)[1])

    @torch.no_grad()
    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        with self._runtime.autocast(self._precision):
            return self._pair.class_logits(batch.inputs, mask.detach()).float()

    @torch.no_grad()
    def _selector(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and mask, as wide as the longest example of the batch or of what is remembered."""
        if self._memory:
            return self._memory[0][batch.indices], self._memory[1][batch.indices]
        if self._latest is None or self._latest[0] is not batch:
            pair = self._pair
            with self._runtime.autocast(self._precision):
                logits = pair.selector_logits(batch.inputs).float()
            mask = apply_policy(selection_scores(logits), pair.selectable(batch.inputs), pair.policy, pair.capacity)
            self._latest = batch, logits, mask
        return self._latest[1:]

    def _everything(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return *self._selector(batch), self.class_logits(batch)


class RecordedTeacher(Teaching):
    """What was recorded about the examples of a training split; parts that were not are left out of the loss."""

    def __init__(self, said: AlignedKnowledge, runtime: Runtime) -> None:
        probabilities = torch.from_numpy(said.probabilities)
        self._classes = runtime.to_device(probabilities.clamp(min=torch.finfo(torch.float32).tiny).log().numpy())
        self._scores = runtime.to_device(_padded(said.scores))
        self._marks = runtime.to_device(_padded(said.marks)) if any(each is not None for each in said.marks) else None

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32: the log-odds as recorded, 0 where there are none."""
        scores = self._at(self._scores, batch, positions).nan_to_num()
        return torch.stack([torch.zeros_like(scores), scores], dim=-1)

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: tokens of positive score; marked passages have a term of their own."""
        return self._at(self._scores, batch, positions) > 0

    def class_logits(self, batch: Batch) -> Tensor:
        return self._classes[batch.indices]

    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """As recorded, whatever the mask (``stages.check_teacher`` refuses settings that need more)."""
        return self.class_logits(batch)

    def known_tokens(self, batch: Batch, positions: int) -> Tensor:
        return ~self._at(self._scores, batch, positions).isnan()

    def known_classes(self, batch: Batch) -> Tensor:
        return ~self._classes[batch.indices, 0].isnan()

    def marks(self, batch: Batch, positions: int) -> Tensor | None:
        return None if self._marks is None else self._at(self._marks, batch, positions)

    def _at(self, table: Tensor, batch: Batch, positions: int) -> Tensor:
        rows = table[batch.indices]
        missing = positions - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, missing), value=float("nan")) if missing > 0 else rows[:, :positions]


def _padded(rows: list[np.ndarray | None]) -> np.ndarray:
    """(n, longest) float32, NaN where there is nothing."""
    table = np.full((len(rows), max((len(row) for row in rows if row is not None), default=1)), np.nan, np.float32)
    for index, row in enumerate(rows):
        if row is not None:
            table[index, : len(row)] = row
    return table


@torch.inference_mode()
def statements_of(
    pair: Rationalizer, items: Sequence[Any], with_texts: bool, folder: Path | None = None
) -> list[dict[str, Any]]:
    """What a pair says about each text or image: rows for ``write_knowledge``; ``folder``: of the image files.

    Class probabilities are those of its own rationale, before calibration, as a live teacher gives them. A plain
    classifier has read everything and has no scores.
    """
    device = next(pair.parameters()).device
    encoded = pair.preprocessor(items)
    arrays = encoded.inputs if pair.policy.selectable == "real" else full_length(encoded.inputs, pair.preprocessor)
    inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    plain, settings = pair.policy.keeps_everything, pair.preprocessor.settings
    scores, mask = (None, pair.selectable(inputs)) if plain else pair.select(inputs)
    logits = classify(pair, inputs, mask, max(1, int(mask.sum(dim=1).max())))
    rows: list[dict[str, Any]] = [{"probabilities": each} for each in logits.float().softmax(dim=-1).cpu().numpy()]
    if "pixels" in inputs:
        for row, name in zip(rows, (names_of(item, folder or Path()) for item in items), strict=True):
            row["file" if len(name) == 2 else "id"] = name[0]
        if scores is not None:
            maps = scores.cpu().numpy().astype(np.float64).reshape(len(items), settings.rows, settings.columns)
            for row, grid in zip(rows, maps.round(3).tolist(), strict=True):
                row["map"] = grid
        return rows
    for row, text in zip(rows, items, strict=True):
        row |= {"text": text} if with_texts else {"id": text_id(text)}
    if scores is None:
        return rows
    for row, encoding, each in zip(rows, encoded.encodings, scores.cpu().numpy(), strict=True):
        words = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
        segments = np.column_stack([np.array(encoding.offsets)[words], each[words]])
        segments = segments[np.concatenate([[True], (segments[1:, :2] != segments[:-1, :2]).any(axis=1)])]
        segments[1:, 0] = np.maximum(segments[1:, 0], segments[:-1, 1])  # tokens that share a character
        row["scores"] = segments[segments[:, 0] <= segments[:, 1]]
    return rows


def write_knowledge(path: Path, rows: Sequence[dict[str, Any]], overwrite: bool = False) -> Path:
    """Write statements as Parquet, scores packed.

    Args:
        rows: ``text`` or ``id``, and, where there are any, ``probabilities`` (C,), ``rationale`` and ``scores`` (m, 3);
            of images ``file`` or ``id``, ``probabilities``, ``boxes``, ``map``.

    Raises:
        DataError: the file exists and may not be replaced.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists; fix: another file, or --overwrite")
    written = [
        {name: np.asarray(value).tolist() if name in ("probabilities", "rationale") else value
         for name, value in row.items() if name != "scores"} | _packed(row.get("scores"))
        for row in rows
    ]  # fmt: skip
    names = dict.fromkeys(name for row in written for name in row)
    return write_parquet(path, pyarrow.table({name: [row.get(name) for row in written] for name in names}))


def write_parquet(path: Path, table: Any) -> Path:
    """Write a pyarrow table of statements, packed as they are, in place of what is there."""
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd", compression_level=9)
    write_bytes(path, content.getvalue())
    return path


def _packed(scores: np.ndarray | None) -> dict[str, Any]:
    if scores is None:
        return {}
    starts, ends = scores[:, 0].astype(np.int64), scores[:, 1].astype(np.int64)
    gaps, lengths = starts - np.concatenate([[0], ends[:-1]]), ends - starts
    if (gaps < 0).any() or max(gaps.max(initial=0), lengths.max(initial=0)) > 255:
        # a gap or a token of more characters than a byte counts; trimmed spaces, of no characters, are not written
        return {"scores": scores[starts < ends].tolist()}
    scale = float(np.abs(scores[:, 2]).max(initial=0)) / 127 or 1.0
    parts = {"scores": np.rint(scores[:, 2] / scale).astype(np.int8), "gaps": gaps.astype(np.uint8),
             "lengths": lengths.astype(np.uint8)}  # fmt: skip
    return {f"packed_{name}": values.tobytes() for name, values in parts.items()} | {"packed_scale": scale}
