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

import torch

from rekd_train.config.run import RunConfig
from rekd_train.data import Split
from rekd_train.evaluation.forward import run_split
from rekd_train.models.base import Predictor
from rekd_train.models.gates import apply_policy
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.batches import FullLength
from rekd_train.training.calibration import calibrate_temperature
from rekd_train.training.checks import check_fit, check_teacher
from rekd_train.training.loop import Loop, Stage, load_pair_state, pair_state
from rekd_train.training.noise import key
from rekd_train.training.objectives import ClassifierObjective, CompactObjective, RationaleObjective
from rekd_train.training.observers import Observer, Silent
from rekd_train.training.optimisation import word_tables
from rekd_train.training.runtime import Runtime
from rekd_train.training.state import Snapshot, StateStore
from rekd_train.training.teacher import Teacher, teacher_for
from rekd_train.training.validation import KEEP_ALL, DevEvaluation, base_policy, fitted_policy, read_selector

__all__ = ["KEEP_ALL", "Observer", "Silent", "calibrate_pair", "calibrate_policy", "compact_pair", "fit"]


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
    course = _Course(config, rationalizer, train, dev, teacher, runtime, observer, store, snapshot)
    stages = config.stages
    if stages.classifier_epochs and not warm:
        course.take(0, "classifier", stages.classifier_epochs, course.classifier)
    if stages.rationale_epochs:
        own_start = stages.classifier_epochs if stages.selector_warm_start is None else stages.selector_warm_start
        if own_start and not warm and not starts_from_predictor(config, rationalizer):
            course.take(1, "selector", own_start, course.selector)
        name = "rationale" if teacher is None else "distillation"
        course.take(2, name, stages.rationale_epochs, course.rationale)
        if stages.compact_epochs:
            course.take(3, "compact", stages.compact_epochs, course.compact)
    else:
        rationalizer.policy = KEEP_ALL
    return course.finished()


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
    course = _Course(config, rationalizer, train, dev, teacher, runtime, observer, keep_policy=True)
    course.take(3, "compact", config.stages.compact_epochs or 1.0, course.compact)
    return course.finished()


def calibrate_pair(
    config: RunConfig, rationalizer: Rationalizer, dev: Split, runtime: Runtime | None = None
) -> Rationalizer:
    """Fit the decision rule and then the probability temperature on dev, in place."""
    calibrate_policy(config, rationalizer, dev, runtime)
    logits = run_split(rationalizer, dev).class_logits
    rationalizer.probability_temperature = calibrate_temperature(logits, dev.labels)
    return rationalizer.eval()


def calibrate_policy(
    config: RunConfig, rationalizer: Rationalizer, dev: Split, runtime: Runtime | None = None
) -> None:
    """Fit the bias of the decision rule on dev to the configured target rate."""
    runtime = runtime or Runtime(_device_of(rationalizer))
    rationalizer.policy = base_policy(config.selection)
    readings = read_selector(rationalizer, dev, runtime, "fp32")
    rationalizer.policy = fitted_policy(rationalizer, readings, config.selection)


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
    pretrained = own.weights != "" or own.word_embeddings != "random"
    same_source = (own.weights, own.word_embeddings) == (theirs.weights, theirs.word_embeddings)
    return same_sizes(pair) and (same_source or not pretrained)


def _device_of(pair: Rationalizer) -> torch.device:
    return next(pair.parameters()).device


class _Course:
    """The stages of one run, each from where a stored state left it."""

    def __init__(
        self, config: RunConfig, pair: Rationalizer, train: Split, dev: Split, teacher: Rationalizer | None,
        runtime: Runtime | None, observer: Observer | None, store: StateStore | None = None,
        snapshot: Snapshot | None = None, keep_policy: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.pair, self._teacher_pair = config, pair, teacher
        self.runtime = runtime or Runtime(_device_of(pair))
        self.pair.to(self.runtime.device)
        if not keep_policy:
            pair.policy = base_policy(config.selection)
        rules = {config.selection.selectable, teacher.policy.selectable if teacher is not None else "real"}
        if "all" in rules and pair.preprocessor.settings.kind != "image":
            train, dev = (FullLength(split, pair.preprocessor) for split in (train, dev))
        self.train, self.dev = train, dev
        self._done = snapshot.stage if snapshot else 0
        self._into = snapshot.step if snapshot else 0
        if snapshot:
            load_pair_state(pair, snapshot)
        self._store = store
        self._loop = Loop(config, pair, train, self.runtime, observer or Silent(), store, snapshot)
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
        pair.predictor.operator = "compact" if config.stages.operator == "drop" else "zero"
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
        pair = self.pair
        pair.predictor.operator = "compact"
        mask = None
        if not self.train.augmented:
            readings = read_selector(pair, self.train, self.runtime, self.config.acceleration.precision)
            mask = apply_policy(readings.scores, readings.selectable, pair.policy, pair.capacity)
        objective = CompactObjective(self.config, pair, self.runtime, self._loop.seed(stage), self.teacher, mask)
        evaluate = DevEvaluation(
            self.config, pair, pair.predictor, self.dev, self.runtime, with_rationale=True, fixed=True
        )
        self._loop.run(stage, objective, evaluate)

    def finished(self) -> Rationalizer:
        """The pair, calibrated and in evaluation mode."""
        logits = run_split(self.pair, self.dev).class_logits
        self.pair.probability_temperature = calibrate_temperature(logits, self.dev.labels)
        return self.pair.eval()

    @property
    def teacher(self) -> Teacher | None:
        """The teacher over the training split, read when it is first needed."""
        if self._teacher is None and self._teacher_pair is not None:
            self._teacher = teacher_for(self._teacher_pair, self.train, self.config, self.runtime)
        return self._teacher

    def _classifier(self, stage: Stage, predictor: Predictor) -> None:
        predictor.operator = "zero"
        teacher = self.teacher if self.config.distillation.classifier else None
        objective = ClassifierObjective(
            self.config, self.pair, predictor, self.runtime, self._loop.seed(stage), teacher
        )
        evaluate = DevEvaluation(self.config, self.pair, predictor, self.dev, self.runtime, with_rationale=False)
        self._loop.run(stage, objective, evaluate)
