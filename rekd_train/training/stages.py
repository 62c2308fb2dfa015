"""Training a pair: warm starts, rationale extraction or distillation, compaction, calibration.

``fit(config, pair, train, dev)`` trains a pair alone; with ``teacher`` it distils it. The stages:

1. classifier: the predictor learns the task, half of the batches through random keep masks; the selector
   starts from it where the sizes agree and it has no pretrained weights of its own, otherwise from a warm start of
   its own (stage ``selector``);
2. rationale: selector and predictor learn together through the straight-through Gumbel mask; with a teacher
   (``distillation``) also from its rationales and predictions;
3. compact: selector frozen, the predictor learns to read gathered features alone;
and the decision rule and the probability temperature are fitted on dev.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rekd_train.config.run import RunConfig
from rekd_train.data import DataSet, Split
from rekd_train.data.examples import check_data
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.models.base import Predictor
from rekd_train.models.gates import apply_policy
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.batches import FullLength, key
from rekd_train.training.loop import Loop, Stage, word_tables
from rekd_train.training.objectives import ClassifierObjective, CompactObjective, RationaleObjective
from rekd_train.training.observers import Observer
from rekd_train.training.runtime import Runtime
from rekd_train.training.state import Snapshot, StateStore, load_pair_state, pair_state
from rekd_train.training.teacher import Teacher, check_teacher, teacher_for
from rekd_train.training.validation import (
    KEEP_ALL,
    DevEvaluation,
    base_policy,
    calibrate_policy,
    fit_temperature,
    read_selector,
)


def fit(
    config: RunConfig,
    rationalizer: Rationalizer,
    train: Split,
    dev: Split,
    *,
    teacher: Rationalizer | None = None,
    warm: bool = False,
    observer: Observer | None = None,
    runtime: Runtime | None = None,
    store: StateStore | None = None,
    resume: bool = False,
) -> Rationalizer:
    """Train a pair in place through the stages of its configuration.

    Args:
        rationalizer: a fresh pair, or one whose predictor is trained already (``warm``).
        teacher: a trained pair with the same preprocessing; None: plain rationale extraction.
        warm: leave the warm starts out.
        runtime: device and processes; None: the device the pair is on.
        store: where states are saved; None: nowhere.
        resume: go on from the stored state, if there is one.

    Returns:
        The same pair, with its policy and temperature calibrated, in evaluation mode.

    Raises:
        ConfigError: the configuration, the teacher or the stored state does not fit.
        DataError: labels that are no classes, one class only, no examples.
        TrainingError: the loss is not finite, the selector keeps nothing or everything, or the disk is full.
    """
    check_fit(config, rationalizer, train, dev, teacher, warm)
    snapshot = store.load() if store is not None and resume else None
    runner = _StageRunner(config, rationalizer, train, dev, teacher, runtime, observer, store, snapshot)
    stages = config.stages
    if stages.classifier_epochs and not warm:
        runner.take(0, "classifier", stages.classifier_epochs, runner.classifier)
    if stages.rationale_epochs:
        own_start = stages.classifier_epochs if stages.selector_warm_start is None else stages.selector_warm_start
        if own_start and not warm and not starts_from_predictor(config, rationalizer):
            runner.take(1, "selector", own_start, runner.selector)
        name = "rationale" if teacher is None else "distillation"
        runner.take(2, name, stages.rationale_epochs, runner.rationale)
        if stages.compact_epochs:
            runner.take(3, "compact", stages.compact_epochs, runner.compact)
    else:
        rationalizer.policy = KEEP_ALL
    return fit_temperature(rationalizer, runner.dev)


def compact_pair(
    config: RunConfig,
    rationalizer: Rationalizer,
    train: Split,
    dev: Split,
    *,
    teacher: Rationalizer | None = None,
    observer: Observer | None = None,
    runtime: Runtime | None = None,
) -> Rationalizer:
    """The compact stage alone, in place: any trained pair becomes one that serves gathered features."""
    if teacher is not None:
        check_teacher(teacher, rationalizer, config)
    runner = _StageRunner(config, rationalizer, train, dev, teacher, runtime, observer, keep_policy=True)
    runner.take(3, "compact", config.stages.compact_epochs or 1.0, runner.compact)
    return fit_temperature(rationalizer, runner.dev)


def check_fit(
    config: RunConfig, pair: Rationalizer, train: Split, dev: Split, teacher: Rationalizer | None, warm: bool
) -> None:
    """Refuse what cannot be trained.

    Raises:
        ConfigError: the configuration asks for what its parts cannot do, or the teacher does not fit.
        DataError: labels that are no classes of the pair, one class only, no examples.
    """
    check_data(DataSet({"train": train, "dev": dev}, tuple(pair.labels), ""), config.data.name)
    stages = config.stages
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
    if allowed >= 3:  # a negation needs as many
        return ""
    return (
        f"half of the training texts have at most {words} words, of which selection.{name}={share:g} allows {allowed}; "
        f"selection.minimum keeps {selection.minimum} all the same; fix for short texts: the preset short_texts, or "
        "--set selection.target=0.3 --set selection.budget=0.35"
    )


def same_sizes(pair: Rationalizer) -> bool:
    """Whether the selector's backbone can take the predictor's weights."""
    shapes = [
        {name: tensor.shape for name, tensor in model.backbone.state_dict().items()}
        for model in (pair.selector, pair.predictor)
    ]
    return shapes[0] == shapes[1]


def starts_from_predictor(config: RunConfig, pair: Rationalizer) -> bool:
    """Whether the selector takes over what the predictor has learnt: same sizes, no pretrained weights of its own."""
    own, theirs = config.selector, config.predictor
    pretrained = own.pretrained != "" or own.word_embeddings != "random"
    same_source = (own.pretrained, own.word_embeddings) == (theirs.pretrained, theirs.word_embeddings)
    return same_sizes(pair) and (same_source or not pretrained)


class _StageRunner:
    """The stages of one run, each from where a stored state left it."""

    def __init__(
        self, config: RunConfig, pair: Rationalizer, train: Split, dev: Split, teacher: Rationalizer | None,
        runtime: Runtime | None, observer: Observer | None, store: StateStore | None = None,
        snapshot: Snapshot | None = None, keep_policy: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.pair, self._teacher_pair = config, pair, teacher
        self.runtime = runtime or Runtime(next(pair.parameters()).device)
        self.pair.to(self.runtime.device)
        if not keep_policy:
            pair.policy = base_policy(config.selection)
        rules = {config.selection.selectable, teacher.policy.selectable if teacher is not None else "real"}
        if "all" in rules and pair.preprocessor.settings.kind != "image":
            train, dev = (FullLength(split, pair.preprocessor) for split in (train, dev))
        self.train, self.dev = train, dev
        self._done = snapshot.stage if snapshot else 0
        if snapshot:
            load_pair_state(pair, snapshot)
        self._store = store
        self._loop = Loop(config, pair, train, self.runtime, observer or Observer(), store, snapshot)
        self._teacher: Teacher | None = None

    def take(self, number: int, name: str, epochs: float, run: Callable[[Stage], None]) -> None:
        """Run a stage, unless the stored state is behind it, and store where it ended."""
        if number < self._done:
            return
        run(Stage(name, number, epochs))
        if self._store is not None:
            if self.runtime.is_main:
                self._store.save(Snapshot(stage=number + 1, **pair_state(self.pair)))
            self.runtime.wait()

    def classifier(self, stage: Stage) -> None:
        """The predictor alone; then the selector starts from what it has learnt to read."""
        self._classifier(stage, self.pair.predictor)
        if starts_from_predictor(self.config, self.pair):
            self.pair.selector.backbone.load_state_dict(self.pair.predictor.backbone.state_dict())

    def selector(self, stage: Stage) -> None:
        """The selector's backbone under a head of its own, which is thrown away."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self._loop.seed(stage)) >> 1)
            head = Predictor(self.pair.selector.backbone, len(self.pair.labels)).to(self.runtime.device)
        self._classifier(stage, head)

    def rationale(self, stage: Stage) -> None:
        """Selector and predictor together, then the decision rule."""
        config, pair = self.config, self.pair
        pair.predictor.operator = "zero"
        objective = RationaleObjective(config, pair, self.runtime, self._loop.seed(stage), self.teacher)
        evaluate = DevEvaluation(config, pair, pair.predictor, self.dev, self.runtime, with_rationale=True)
        frozen = word_tables(pair.selector) if config.optimisation.freeze_selector_embeddings else []
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            self._loop.run(stage, objective, evaluate)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        calibrate_policy(config, pair, self.dev, self.runtime)

    def compact(self, stage: Stage) -> None:
        """The predictor alone on gathered features; the selector and its policy are frozen."""
        config, pair, runtime = self.config, self.pair, self.runtime
        pair.predictor.operator = "compact"
        mask = None
        if not self.train.augmented:
            readings = read_selector(pair, self.train, runtime, config.acceleration.precision)
            mask = apply_policy(readings.scores, readings.selectable, pair.policy, pair.capacity)
        objective = CompactObjective(config, pair, runtime, self._loop.seed(stage), self.teacher, mask)
        evaluate = DevEvaluation(config, pair, pair.predictor, self.dev, runtime, with_rationale=True, fixed=True)
        self._loop.run(stage, objective, evaluate)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher over the training split, read when it is first needed."""
        if self._teacher is None and self._teacher_pair is not None:
            self._teacher = teacher_for(self._teacher_pair, self.train, self.config, self.runtime)
        return self._teacher

    def _classifier(self, stage: Stage, predictor: Predictor) -> None:
        config, pair, runtime = self.config, self.pair, self.runtime
        predictor.operator = "zero"
        teacher = self.teacher if config.distillation.classifier else None
        objective = ClassifierObjective(config, pair, predictor, runtime, self._loop.seed(stage), teacher)
        evaluate = DevEvaluation(config, pair, predictor, self.dev, runtime, with_rationale=False)
        self._loop.run(stage, objective, evaluate)
