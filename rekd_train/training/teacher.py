"""What a frozen teacher pair says about a batch, and whether it can teach a student at all."""

from __future__ import annotations

import torch
from torch import Tensor

from rekd_train.config.run import RunConfig
from rekd_train.data import Split
from rekd_train.errors import ConfigError
from rekd_train.inputs.preprocessors import same_tokens
from rekd_train.models.gates import apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.batches import Batch, answers
from rekd_train.training.runtime import Runtime


class Teacher:
    """A frozen pair: asked in every step, or once about a whole split. B = batch, N = positions, C = classes.

    Args:
        pair: on the runtime's device.
        remembered: a split whose examples stay the same; None: asked anew each time.
    """

    def __init__(self, pair: Rationalizer, runtime: Runtime, precision: str, remembered: Split | None = None) -> None:
        self._pair, self._runtime, self._precision = pair.eval(), runtime, precision
        self._asked: Batch | None = None
        self._answer: tuple[Tensor, Tensor] | None = None
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None
        if remembered is not None:
            logits, mask, classes = answers(remembered, runtime, precision, self._everything, count=3)
            self._memory = logits, mask.bool(), classes

    @property
    def remembers(self) -> bool:
        """Whether it was asked once about a whole split."""
        return self._memory is not None

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""
        return self._read(batch)[0][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: the rationale by the teacher's stored policy."""
        return self._read(batch)[1][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 on the teacher's own rationale."""
        return self._memory[2][batch.indices] if self._memory else self.class_logits_on(batch, self._read(batch)[1])

    @torch.no_grad()
    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32 on another mask (B, N)."""
        with self._runtime.autocast(self._precision):
            return self._pair.class_logits(batch.inputs, mask.detach()).float()

    @torch.no_grad()
    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Selector logits and mask, as wide as the longest example that it was asked about."""
        if self._memory:
            return self._memory[0][batch.indices], self._memory[1][batch.indices]
        if self._asked is not batch:
            pair = self._pair
            with self._runtime.autocast(self._precision):
                logits = pair.selector_logits(batch.inputs).float()
            mask = apply_policy(selection_scores(logits), pair.selectable(batch.inputs), pair.policy, pair.capacity)
            self._asked, self._answer = batch, (logits, mask)
        return self._answer

    def _everything(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return *self._read(batch), self.class_logits(batch)


def teacher_for(pair: Rationalizer, split: Split, config: RunConfig, runtime: Runtime) -> Teacher:
    """The pair as a teacher over a training split: remembered where the examples stay the same."""
    remembered = None if split.augmented else split
    return Teacher(pair.to(runtime.device), runtime, config.acceleration.precision, remembered)


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
