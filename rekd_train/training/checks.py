"""What is wrong with a run before it starts: cheap checks of data, configuration and teacher."""

from __future__ import annotations

import numpy as np

from rekd_train.config.run import RunConfig
from rekd_train.data import DataSet, Split
from rekd_train.data.checks import check_data
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor, same_tokens
from rekd_train.models.families import FAMILIES
from rekd_train.models.rationalizer import Rationalizer

_WORDS_OF_A_NEGATION = 3


def check_fit(
    config: RunConfig, pair: Rationalizer, train: Split, dev: Split, teacher: Rationalizer | None, warm: bool
) -> None:
    """Refuse what cannot be trained.

    Raises:
        ConfigError: the configuration asks for what its parts cannot do, or the teacher does not fit.
        DataError: labels that are no classes of the pair, one class only, no examples.
    """
    check_data(DataSet({"train": train, "dev": dev}, tuple(pair.labels), ""), config.data.name)
    stages, family = config.stages, pair.predictor.backbone.settings.family
    if stages.rationale_epochs and stages.operator == "drop" and not FAMILIES[family].soft_masks:
        raise ConfigError(f"stages.operator is 'drop', which the family '{family}' cannot learn by; fix: 'zero'")
    if teacher is not None:
        check_teacher(teacher, pair, config)
        learns = stages.rationale_epochs or (config.distillation.classifier and stages.classifier_epochs and not warm)
        if not learns:
            raise ConfigError(
                "a teacher is given, but no stage learns from it; fix: distillation.classifier=true, or "
                "stages.rationale_epochs above 0"
            )


def short_texts_notice(config: RunConfig, train: Split, preprocessor: Preprocessor) -> str:
    """What to tell about training texts of which the budget allows fewer than three words; else ''.

    One or two words cannot hold a negation. The median decides, so that a few short texts among long ones are fine.
    """
    selection = config.selection
    name = "target" if selection.decision == "top-k" else "budget"
    share = getattr(selection, name)
    if preprocessor.settings.kind != "text" or share is None or not config.stages.rationale_epochs:
        return ""
    words = int(np.median(train.lengths)) - (preprocessor.positions - preprocessor.features)
    allowed = int(SelectionPolicy(budget=share, minimum=0).limits(np.array([words]))[0])
    if allowed >= _WORDS_OF_A_NEGATION:
        return ""
    return (
        f"half of the training texts have at most {words} words, of which selection.{name}={share:g} allows {allowed}; "
        f"selection.minimum keeps {selection.minimum} all the same; fix for short texts: the preset short_texts, or "
        "--set selection.target=0.3 --set selection.budget=0.35"
    )


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
