"""What must hold before a pair is trained, and what is told before it."""

from __future__ import annotations

import numpy as np

from rekd_train.config.run import RunConfig
from rekd_train.data import Split
from rekd_train.data.examples import UNLABELLED
from rekd_train.data.knowledge import AlignedKnowledge
from rekd_train.errors import ConfigError
from rekd_train.evaluation.forward import check_features
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.models.rationalizer import Rationalizer

AnyTeacher = Rationalizer | AlignedKnowledge | None


def check_teacher(teacher: Rationalizer | AlignedKnowledge, student: Rationalizer, config: RunConfig) -> None:
    """Raise ConfigError for a teacher from which this student cannot learn: other classes, features, or too short."""
    if isinstance(teacher, AlignedKnowledge):
        if config.distillation.teacher_mask == "student":
            raise ConfigError(
                "recorded knowledge cannot answer on the student's rationale; fix: distillation.teacher_mask=teacher"
            )
        if teacher.empty:
            raise ConfigError("the recorded knowledge says nothing about any training example; "
                              "fix: rows about them, which rekd-train check-teacher counts")  # fmt: skip
        return
    if len(teacher.labels) != len(student.labels):
        raise ConfigError(
            f"the teacher has {len(teacher.labels)} classes ({', '.join(teacher.labels[:4])}...), the data have "
            f"{len(student.labels)} ({', '.join(student.labels[:4])}...); fix: a teacher of the same task"
        )
    if set(teacher.labels) == set(student.labels) and teacher.labels != student.labels:
        raise ConfigError(f"the teacher orders its classes otherwise: {teacher.labels}, the data {student.labels}")
    distillation = config.distillation
    wanted = config.stages.rationale_epochs and distillation.rationale_weight and distillation.alpha != 1.0
    if wanted and teacher.policy.keeps_everything:
        raise ConfigError(
            "the teacher is a plain classifier and has no rationales to learn from; fix: a teacher trained with "
            "stages.rationale_epochs above 0, or distillation.rationale_weight=0"
        )
    check_features(student, teacher)
    for role in ("selector", "predictor"):
        settings, longest = getattr(teacher, role).backbone.settings, student.preprocessor.positions
        if settings.image is None and settings.positions < longest:
            raise ConfigError(
                f"the teacher's {role} reads at most {settings.positions} tokens, the student's texts have up to "
                f"{longest}; fix: data.max_length={settings.positions}"
            )


def tells_rationale(teacher: AnyTeacher, config: RunConfig) -> bool:
    """Whether a teacher says what to keep, and the student is to learn it."""
    distillation = config.distillation
    if teacher is None or not distillation.rationale_weight or distillation.alpha == 1.0:
        return False
    if not isinstance(teacher, AlignedKnowledge):
        return True  # a pair
    return any(each is not None for each in (*teacher.scores, *teacher.marks))


def short_texts_notice(config: RunConfig, train: Split, preprocessor: Preprocessor) -> str:
    """What to tell about training texts of which the budget allows fewer than three words; else ''.

    One or two words cannot hold a negation. The median decides, so that a few short texts among long ones are fine.
    """
    selection = config.selection
    name = "target" if selection.decision == "top-k" else "budget"
    share = getattr(selection, name)
    if preprocessor.settings.kind != "text" or share is None or not config.stages.rationale_epochs:
        return ""
    lengths = train.lengths[train.labels != UNLABELLED]  # the others are there to be read as well, such as sentences
    words = int(np.median(lengths)) - (preprocessor.positions - preprocessor.features)
    allowed = int(SelectionPolicy(budget=share, minimum=0).limits(np.array([words]))[0])
    if allowed >= 3:  # a negation needs as many
        return ""
    return (
        f"half of the training texts have at most {words} words, of which selection.{name}={share:g} allows {allowed}; "
        f"selection.minimum keeps {selection.minimum} all the same; fix for short texts: the preset short_texts, or "
        "--set selection.target=0.3 --set selection.budget=0.35"
    )
