"""What a frozen teacher pair says about a batch, and whether it can teach a student at all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rekd_train.config.run import RunConfig
from rekd_train.data import Split
from rekd_train.errors import ConfigError
from rekd_train.inputs.preprocessors import same_tokens
from rekd_train.models.gates import apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.batches import Batch, all_batches, collected
from rekd_train.training.runtime import Runtime


class Teacher(Protocol):
    """A frozen pair. B = batch, N = positions of the batch, C = classes."""

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: the rationale by the teacher's stored policy."""

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 on the teacher's own rationale."""

    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32 on another mask (B, N)."""


class LiveTeacher:
    """Asks the pair in every step: for augmented data.

    Args:
        pair: on the runtime's device.
    """

    def __init__(self, pair: Rationalizer, runtime: Runtime, precision: str) -> None:
        self._pair, self._runtime, self._precision = pair.eval(), runtime, precision
        self._answered: Batch | None = None
        self._logits = self._mask = None

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""
        return self._read(batch)[0][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool."""
        return self._read(batch)[1][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32."""
        return self.class_logits_on(batch, self._read(batch)[1])

    @torch.no_grad()
    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32."""
        with self._runtime.autocast(self._precision):
            return self._pair.class_logits(batch.inputs, mask.detach()).float()

    @torch.no_grad()
    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._answered is not batch:
            with self._runtime.autocast(self._precision):
                self._logits = self._pair.selector_logits(batch.inputs).float()
            self._mask = rule_mask(self._pair, batch.inputs, self._logits)
            self._answered = batch
        return self._logits, self._mask


class CachedTeacher:
    """Remembers the pair's answers on its own rationales for a whole split, on the runtime's device."""

    def __init__(self, live: LiveTeacher, selector_logits: Tensor, mask: Tensor, class_logits: Tensor) -> None:
        self._live = live
        self._selector_logits, self._mask, self._class_logits = selector_logits, mask, class_logits

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""
        return self._selector_logits[batch.indices][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool."""
        return self._mask[batch.indices][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32."""
        return self._class_logits[batch.indices]

    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32."""
        return self._live.class_logits_on(batch, mask)


def teacher_for(pair: Rationalizer, split: Split, config: RunConfig, runtime: Runtime) -> Teacher:
    """The pair as a teacher over a training split: cached where the examples stay the same."""
    acceleration = config.acceleration
    live = LiveTeacher(pair.to(runtime.device), runtime, acceleration.precision)
    if not acceleration.teacher_cache or split.augmented:
        return live
    logits, mask, classes = [], [], []
    rows = []
    for batch in all_batches(split, runtime, share_out=True):
        with torch.inference_mode(), runtime.autocast(acceleration.precision):
            found = pair.selector_logits(batch.inputs).float()
            chosen = rule_mask(pair, batch.inputs, found)
            classes.append(pair.class_logits(batch.inputs, chosen).float())
        rows.append(batch.indices)
        logits.append(found)
        mask.append(chosen)
    return CachedTeacher(
        live,
        collected(rows, logits, len(split), runtime),
        collected(rows, mask, len(split), runtime).bool(),
        collected(rows, classes, len(split), runtime),
    )


def rule_mask(pair: Rationalizer, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """(B, N) bool by the pair's stored policy from its selector's logits (B, N, 2)."""
    return apply_policy(selection_scores(logits), pair.selectable(inputs), pair.policy, pair.capacity)






def check_teacher(teacher: Rationalizer, student: Rationalizer, config: RunConfig) -> None:
    """Refuse a teacher from which this student cannot learn, before any training.

    Raises:
        ConfigError: other classes, another tokenizer, another patch grid, texts against images, or too short.
    """
    if len(teacher.labels) != len(student.labels):
        raise ConfigError(
            f"the teacher has {len(teacher.labels)} classes ({', '.join(teacher.labels[:4])}...), the data have "
            f"{len(student.labels)} ({', '.join(student.labels[:4])}...); fix: a teacher of the same task"
        )
    if set(teacher.labels) == set(student.labels) and teacher.labels != student.labels:
        raise ConfigError(f"the teacher orders its classes otherwise: {teacher.labels}, the data {student.labels}")
    distillation, stages = config.distillation, config.stages
    wanted = stages.rationale_epochs and distillation.rationale_weight and distillation.alpha != 1.0
    if wanted and teacher.policy.bias is None and teacher.policy.budget is None:
        raise ConfigError(
            "the teacher is a plain classifier and has no rationales to learn from; fix: a teacher trained with "
            "stages.rationale_epochs above 0, or distillation.rationale_weight=0"
        )
    theirs, ours = teacher.preprocessor, student.preprocessor
    kinds = theirs.settings.kind, ours.settings.kind
    if "image" in kinds and kinds != ("image", "image"):
        raise ConfigError(f"the teacher reads {kinds[0]} inputs, the student {kinds[1]} inputs")
    if kinds == ("image", "image"):
        _check_images(theirs.settings, ours.settings)
    elif kinds == ("text", "text") and not same_tokens(theirs, ours):
        raise ConfigError(
            "the teacher was trained with another tokenizer; distillation needs the same tokens; fix: a teacher with "
            "the student's tokenizer"
        )
    if "image" not in kinds:
        for role in ("selector", "predictor"):
            settings = getattr(teacher, role).backbone.settings
            if settings.positions < ours.positions:
                raise ConfigError(
                    f"the teacher's {role} reads at most {settings.positions} tokens, the student's texts have up to "
                    f"{ours.positions}; fix: data.max_length={settings.positions}"
                )



def _check_images(theirs, ours) -> None:
    sizes = [(s.height, s.width, s.channels) for s in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the teacher reads images of {sizes[0]} (height, width, channels), not of {sizes[1]}")
    grids = [(s.rows, s.columns) for s in (theirs, ours)]
    if grids[0] != grids[1]:
        raise ConfigError(
            f"the teacher cuts images into {grids[0]} (rows, columns) patches, the student into {grids[1]}; "
            "distillation needs the same patches; fix: the same image.patch and size"
        )
