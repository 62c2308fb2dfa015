"""Training a pair: warm starts, rationale extraction or distillation, compaction, calibration.

1. classifier: the predictor learns the task, half of the batches through random keep masks; the selector
   starts from it where the sizes agree and it has no pretrained weights of its own, otherwise from a warm start of
   its own (stage ``selector``). With ``stages.operator = "gather"`` it is the other way round: the selector learns
   what to keep by what single features say (``training.votes``), a predictor of its sizes starts from it. With
   ``stages.selector_classifier_epochs`` its network learns the class first (stage ``selector_classifier``);
2. rationale: selector and predictor learn together through the straight-through Gumbel mask; with a teacher
   (``distillation``) also from its rationales and predictions;
3. compact: selector frozen, the predictor learns to read gathered features alone;
and the decision rule and the probability temperature are fitted on dev.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import numpy as np
import torch
from torch import nn

from rekd_train.config.run import RunConfig
from rekd_train.data import DataSet, Split
from rekd_train.data.examples import check_data
from rekd_train.data.knowledge import AlignedKnowledge
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.base import Predictor
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import validation
from rekd_train.training.checks import AnyTeacher, check_teacher, tells_rationale
from rekd_train.training.loop import Loop, Stage, word_tables
from rekd_train.training.losses import key
from rekd_train.training.objectives import ClassifierObjective, CompactObjective, RationaleObjective
from rekd_train.training.runtime import FullLength, Runtime
from rekd_train.training.state import Observer, Snapshot, StateStore, load_pair_state, pair_state
from rekd_train.training.teacher import RecordedTeacher, Teacher, Teaching
from rekd_train.training.validation import DevEvaluation, calibrate_policy, calibrate_temperature
from rekd_train.training.votes import EvidenceObjective, VoteObjective


def fit(
    config: RunConfig, rationalizer: Rationalizer, train: Split, dev: Split, *, teacher: AnyTeacher = None,
    warm: Collection[str] = (), observer: Observer | None = None, runtime: Runtime | None = None,
    store: StateStore | None = None, resume: bool = False,
) -> Rationalizer:  # fmt: skip
    """Train a pair in place through the stages of its configuration; it returns calibrated, in evaluation mode.

    Args:
        teacher: a trained pair with the same preprocessing, or what was recorded about the examples of ``train``;
            None: plain rationale extraction.
        warm: 'selector', 'predictor' or both: trained already, their warm starts are left out.
        runtime: None: the device the pair is on.
        resume: go on from the state in ``store``, if there is one.

    Raises:
        ConfigError: the configuration, the teacher or the stored state does not fit.
        DataError: labels that are no classes, one class only, no examples.
        TrainingError: the loss is not finite, the selector keeps nothing or everything, or the disk is full.
    """
    stages = config.stages
    check_data(DataSet({"train": train, "dev": dev}, tuple(rationalizer.labels), ""), config.data.name)
    if teacher is not None:
        check_teacher(teacher, rationalizer, config)
        if not (stages.rationale_epochs or (config.distillation.classifier and stages.classifier_epochs and not warm)):
            raise ConfigError("a teacher is given, but no stage learns from it; fix: distillation.classifier=true, or "
                              "stages.rationale_epochs above 0")  # fmt: skip
    snapshot = store.load() if store is not None and resume else None
    runner = _StageRunner(config, rationalizer, train, dev, teacher, runtime, observer, store, snapshot)
    gathers = stages.operator == "gather" and stages.rationale_epochs > 0
    told = gathers and tells_rationale(teacher, config)  # then the votes would only be in its way
    own_start = stages.selector_warm_start
    if own_start is None:
        own_start = 0 if told else stages.classifier_epochs
    if gathers and not told and not own_start and "selector" not in warm and observer is not None:
        observer.note("nothing tells the selector what to keep, neither a teacher's rationale nor votes; it may well "
                      "keep what says nothing; fix: stages.selector_warm_start=1, or --teacher")  # fmt: skip
    follows = not gathers and not warm and alike(config, rationalizer)  # the selector starts from the predictor
    if stages.classifier_epochs and "predictor" not in warm and not gathers:
        runner.take(0, "classifier", stages.classifier_epochs, partial(runner.classifier, follows=follows))
    if stages.rationale_epochs:
        if gathers and stages.selector_classifier_epochs and "selector" not in warm:
            runner.take(0, "selector_classifier", stages.selector_classifier_epochs, runner.selector)
        if own_start and "selector" not in warm and not follows:
            follows = "predictor" not in warm and alike(config, rationalizer, "predictor")  # the other way round
            run = partial(runner.votes, follows=follows) if gathers else runner.selector
            runner.take(1, "selector", own_start, run)
        runner.take(2, "rationale" if teacher is None else "distillation", stages.rationale_epochs, runner.rationale)
        if stages.compact_epochs:
            runner.take(3, "compact", stages.compact_epochs, runner.compact)
    else:
        rationalizer.policy = SelectionPolicy(bias=None, budget=None, minimum=0)  # a plain classifier keeps everything
    return calibrate_temperature(rationalizer, runner.dev)


def compact_pair(
    config: RunConfig, rationalizer: Rationalizer, train: Split, dev: Split, *, teacher: AnyTeacher = None,
    observer: Observer | None = None, runtime: Runtime | None = None,
) -> Rationalizer:  # fmt: skip
    """The compact stage alone, in place: any trained pair becomes one that serves gathered features."""
    if teacher is not None:
        check_teacher(teacher, rationalizer, config)
    runner = _StageRunner(config, rationalizer, train, dev, teacher, runtime, observer, keep_policy=True)
    runner.take(3, "compact", config.stages.compact_epochs or 1.0, runner.compact)
    return calibrate_temperature(rationalizer, runner.dev)


def alike(config: RunConfig, pair: Rationalizer, follower: str = "selector") -> bool:
    """Whether this half takes over what the other has learnt to read: same sizes, no other pretrained weights."""
    mine, theirs = (
        {name: tensor.shape for name, tensor in model.backbone.state_dict().items()}
        for model in (pair.selector, pair.predictor)
    )
    sources = {role: (network.pretrained, network.word_embeddings)
               for role, network in (("selector", config.selector), ("predictor", config.predictor))}  # fmt: skip
    return mine == theirs and (sources["selector"] == sources["predictor"] or sources[follower] == ("", "random"))


@contextmanager
def frozen(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Within, these are not trained."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _StageRunner:
    """The stages of one run, each from where a stored state left it."""

    def __init__(
        self, config: RunConfig, pair: Rationalizer, train: Split, dev: Split, teacher: AnyTeacher,
        runtime: Runtime | None, observer: Observer | None, store: StateStore | None = None,
        snapshot: Snapshot | None = None, keep_policy: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.pair, self._given_teacher, self._store = config, pair, teacher, store
        self.runtime = runtime or Runtime(next(pair.parameters()).device)
        pair.to(self.runtime.device).eval()  # a stage sets what it trains to training: also in a run that goes on
        if not keep_policy:
            pair.policy = validation.base_policy(config.selection)
        theirs = teacher.policy.selectable if isinstance(teacher, Rationalizer) else "real"
        rules = {config.selection.selectable, theirs}
        if "all" in rules and pair.preprocessor.settings.kind != "image":
            train, dev = (FullLength(split, pair.preprocessor) for split in (train, dev))
        self.train, self.dev = train, dev
        self._done = snapshot.stage if snapshot else 0
        if snapshot:
            load_pair_state(pair, snapshot)
        self._loop = Loop(config, pair, train, self.runtime, observer or Observer(), store, snapshot)

    @cached_property
    def teacher(self) -> Teaching | None:
        """The teacher over the training split, computed when it is first needed: once where examples stay the same."""
        if self._given_teacher is None:
            return None
        if isinstance(self._given_teacher, AlignedKnowledge):
            return RecordedTeacher(self._given_teacher, self.runtime)
        remembered = None if self.train.augmented else self.train
        return Teacher(self._given_teacher, self.runtime, self.config.acceleration.precision, remembered)

    def take(self, number: int, name: str, epochs: float, run: Callable[[Stage], None]) -> None:
        """Run a stage, unless the stored state is behind it, and store where it ended."""
        if number < self._done:
            return
        run(Stage(name, number, epochs))
        if self._store is not None:
            if self.runtime.is_main:
                self._store.save(Snapshot(stage=number + 1, **pair_state(self.pair)))
            self.runtime.wait()

    def classifier(self, stage: Stage, follows: bool) -> None:
        """The predictor alone; the selector ``follows``: it starts from what the predictor has learnt to read."""
        self._classifier(stage, self.pair.predictor)
        if follows:
            self.pair.selector.backbone.load_state_dict(self.pair.predictor.backbone.state_dict())

    def selector(self, stage: Stage) -> None:
        """The selector's backbone under a head of its own, which is thrown away."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self._loop.seed(stage)) >> 1)
            head = Predictor(self.pair.selector.backbone, len(self.pair.labels)).to(self.runtime.device)
        self._classifier(stage, head, taught=self.config.stages.operator == "gather")

    def votes(self, stage: Stage, follows: bool) -> None:
        """The selector by the votes of single positions; the predictor ``follows``."""
        pair, backbone = self.pair, self.pair.selector.backbone
        inputs = {name: self.runtime.to_device(array) for name, array in self.train.inputs(np.arange(1)).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self._loop.seed(stage)) >> 1)
            width, inner, classes = backbone.content(inputs).shape[2], 64, len(pair.labels)
            votes = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, classes))
            reader = nn.Linear(backbone.settings.width, classes)
        parts, heads = (*self._parts(stage), self.teacher), nn.ModuleDict({"votes": votes, "reader": reader})
        heads.to(self.runtime.device)
        evidence = self.config.stages.selector_start == "evidence"
        objective = EvidenceObjective(*parts, votes=votes) if evidence else VoteObjective(*parts, **heads)
        with frozen(self._settled()):
            self._loop.run(stage, objective)
        if follows:
            pair.predictor.backbone.load_state_dict(backbone.state_dict())

    def _classifier(self, stage: Stage, predictor: Predictor, taught: bool = False) -> None:
        predictor.operator = "zero"
        teacher = self.teacher if taught or self.config.distillation.classifier else None
        objective = ClassifierObjective(*self._parts(stage), teacher, predictor)
        self._loop.run(stage, objective, self._evaluation(predictor, with_rationale=False))

    def rationale(self, stage: Stage) -> None:
        """Selector and predictor together, then the decision rule."""
        config, pair = self.config, self.pair
        pair.predictor.use("zero" if config.stages.operator == "zero" else "compact")
        objective = RationaleObjective(*self._parts(stage), self.teacher)
        tables = word_tables(pair.selector) if config.optimisation.freeze_selector_embeddings else []
        with frozen(self._settled() or tables):
            self._loop.run(stage, objective, self._evaluation(pair.predictor, with_rationale=True))
        calibrate_policy(config, pair, self.dev, self.runtime)

    def compact(self, stage: Stage) -> None:
        """The predictor alone on gathered features; the selector and its policy are frozen."""
        pair = self.pair
        pair.predictor.operator = "compact"
        mask = None
        if not self.train.augmented:
            readings = validation.read_selector(pair, self.train, self.runtime, self.config.acceleration.precision)
            mask = readings.mask(pair, pair.policy)
        objective = CompactObjective(*self._parts(stage), self.teacher, mask=mask)
        self._loop.run(stage, objective, self._evaluation(pair.predictor, with_rationale=True, fixed=True))

    def _settled(self) -> list[nn.Parameter]:
        """What of the selector stays as a classifier left it."""
        stages = self.config.stages
        classifies = stages.selector_start == "evidence" or stages.selector_classifier_epochs > 0
        return [*self.pair.selector.backbone.parameters()] if classifies and stages.operator == "gather" else []

    def _parts(self, stage: Stage) -> tuple[RunConfig, Rationalizer, Runtime, int]:
        return self.config, self.pair, self.runtime, self._loop.seed(stage)

    def _evaluation(self, predictor: Predictor, **options: bool) -> DevEvaluation:
        return DevEvaluation(self.config, self.pair, predictor, self.dev, self.runtime, **options)
