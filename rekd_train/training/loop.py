"""The loop that every stage runs: steps, readings, evaluations, saves, and the best state at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rekd_train.config.run import OptimisationConfig, RunConfig
from rekd_train.data import Split
from rekd_train.errors import TrainingError
from rekd_train.models.base import TextBackbone
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.losses import key
from rekd_train.training.objectives import Figures, Objective
from rekd_train.training.runtime import Batch, Batches, Runtime
from rekd_train.training.state import Best, Observer, Snapshot, StateStore, pair_state

READ_EVERY = 20
"""Steps between readings: only then does the host wait for the device."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    number: int  # in the run: keys its noise, tells resumed runs where they were
    epochs: float


@dataclass
class Loop:
    """Runs objectives over the training split."""

    config: RunConfig
    pair: Rationalizer
    train: Split
    runtime: Runtime
    observer: Observer
    store: StateStore | None = None  # where states are saved
    snapshot: Snapshot | None = None  # a state to go on from; the pair already has its weights

    def seed(self, stage: Stage) -> int:
        """Key of everything random in a stage, but initial weights."""
        return key(self.config.seed, stage.number)

    def run(
        self, stage: Stage, objective: Objective, evaluate: Callable[[int], dict[str, float]] | None = None
    ) -> None:
        """Train an objective's parameters, to their best state where ``evaluate`` measures one after some steps.

        TrainingError: diverged, collapsed, or a state cannot be saved.
        """
        snapshot, self.snapshot = self.snapshot, None
        within = snapshot is not None and snapshot.stage == stage.number and snapshot.step > 0
        _Run(self, stage, objective, evaluate).run(snapshot if within else None)


class _Run:
    """One stage on its way."""

    def __init__(self, loop: Loop, stage: Stage, objective: Objective, evaluate) -> None:
        self._loop, self._stage, self._objective, self._evaluate = loop, stage, objective, evaluate
        self._config, self._runtime = loop.config, loop.runtime
        settings = self._config.optimisation
        self._steps = max(1, round(stage.epochs * len(loop.train) / settings.batch_size))
        self._batches = Batches(self._config, loop.train, self._steps, loop.seed(stage), self._runtime)
        self._optimiser = optimiser_for(objective, settings, loop.pair)
        self._peaks = [group["lr"] for group in self._optimiser.param_groups]
        self._best = Best(self._config.stages.best_metric)
        self._watch = Watch(stage.name, self._config, READ_EVERY)
        self._points = self._evaluation_points() if evaluate else set()
        self._sums: Figures = {}
        self._since_reading = 0
        self._clock = time.perf_counter()

    def run(self, snapshot: Snapshot | None) -> None:
        done = self._restore(snapshot) if snapshot else 0
        module = self._runtime.wrap(self._objective)
        self._loop.observer.stage(self._stage.name, self._steps, done)
        module.train()
        for batch in self._batches.starting_at(done):
            self._update(module, batch)
            done = batch.step + 1
            self._loop.observer.step(self._read(done))
            if done in self._points:
                if self._judged(done):
                    break
                module.train()
            if self._saved_after(done):
                self._save(done)
        if self._best.weights and self._best.step < done:
            self._objective.load_state_dict(self._best.weights)
        if not self._finite():  # the last step can break what the reading before it found in order
            self._judge(done, {"the weights' norm": float("nan")})
        self._objective.eval()
        self._runtime.release()

    def _update(self, module: torch.nn.Module, batch: Batch) -> None:
        settings, processes = self._config.optimisation, self._runtime.processes
        progress = (batch.step + 1) / (self._steps + 1)
        factor = learning_rate_factor(progress, settings.warmup, settings.schedule == "linear")
        for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        # dropout draws from torch's own generator: seeded anew in each step it needs no state to go on from
        torch.manual_seed(key(self._loop.seed(self._stage), batch.step, self._runtime.rank) >> 1)
        figures = module(batch)
        loss = figures.pop("loss")
        self._optimiser.zero_grad(set_to_none=True)
        (loss * processes).backward()  # gradients are averaged, the parts of the loss add up
        if settings.gradient_clip is not None:
            norm = nn.utils.clip_grad_norm_(self._objective.parameters(), settings.gradient_clip, foreach=True)
            figures["gradient_norm"] = norm / processes  # the same everywhere, and parts add up
        self._optimiser.step()
        figures["loss"] = loss.detach()
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._since_reading += 1

    def _read(self, done: int) -> dict[str, float]:
        """Means since the last reading, every few steps only: reading waits for the device."""
        if done % READ_EVERY and done != self._steps and not self._saved_after(done):
            return {}
        names = sorted(self._sums)
        sums = self._runtime.total(torch.stack([self._sums[name].float() for name in names])).tolist()
        totals = dict(zip(names, sums, strict=True))
        kept, features = totals.pop("kept", None), totals.pop("features", None)
        figures = {name: value / self._since_reading for name, value in totals.items()}
        if kept is not None:
            figures["selection_rate"] = kept / max(features, 1.0)
        self._judge(done, figures)
        now = time.perf_counter()
        examples = self._since_reading * self._config.optimisation.batch_size
        figures["examples_per_second"] = examples / (now - self._clock)
        figures["learning_rate"] = self._optimiser.param_groups[0]["lr"]
        self._sums, self._since_reading, self._clock = {}, 0, now
        return figures

    def _judge(self, done: int, figures: dict[str, float]) -> None:
        try:
            self._watch.judge(done, figures)
        except TrainingError as error:
            path = self._loop.store.path if self._loop.store is not None else None
            advice = f"; the last good state is in {path}: go on from it with --resume and --set"
            raise TrainingError(f"{error}{advice if path and path.exists() else ''}") from None

    def _judged(self, done: int) -> bool:
        """Measure dev; whether the stage ends early."""
        figures = self._evaluate(done)
        self._judge(done, {"loss on dev": figures["extraction_loss"]})
        figures["best"] = float(self._best.offer(done, figures, self._objective.state_dict()))
        self._loop.observer.evaluated(figures)
        self._clock = time.perf_counter()
        patience = self._config.stages.patience
        return patience is not None and self._best.since >= patience

    def _evaluation_points(self) -> set[int]:
        """Steps after which dev is measured; none if there would be a single one, at the end."""
        every = self._config.stages.evaluate_every
        if not every:
            return set()
        interval = max(1, round(every * self._batches.per_epoch))
        points = {*range(interval, self._steps + 1, interval), self._steps}
        return points if len(points) > 1 else set()

    def _saved_after(self, done: int) -> bool:
        every = self._config.stages.save_every
        return self._loop.store is not None and every > 0 and done % every == 0 and done < self._steps

    def _save(self, done: int) -> None:
        """Save the state, unless it is in doubt: the last good one stays."""
        if not self._watch.healthy or not self._finite():
            return
        if self._runtime.is_main:
            self._loop.store.save(
                Snapshot(
                    stage=self._stage.number, step=done, **pair_state(self._loop.pair),
                    objective=self._objective.state_dict(), optimiser=self._optimiser.state_dict(),
                    progress={"best": vars(self._best), "rates": self._watch.selection_rates},
                )
            )  # fmt: skip
        self._runtime.wait()

    def _restore(self, snapshot: Snapshot) -> int:
        self._objective.load_state_dict(snapshot.objective)
        self._optimiser.load_state_dict(snapshot.optimiser)
        vars(self._best).update(snapshot.progress["best"])
        self._watch.selection_rates = snapshot.progress["rates"]
        return snapshot.step

    def _finite(self) -> bool:
        norms = torch._foreach_norm([parameter.detach() for parameter in self._objective.parameters()])
        return bool(torch.stack(norms).isfinite().all())


def optimiser_for(module: nn.Module, settings: OptimisationConfig, pair: Rationalizer) -> torch.optim.AdamW:
    """AdamW; biases, norms and word embeddings do not decay, unless everything does.

    The selector (with it a stage's own heads, which are over the selector), the heads and the word embeddings may have
    rates of their own.
    """
    predictor = {id(each) for each in pair.predictor.parameters()}
    networks = {id(each) for half in (pair.selector, pair.predictor) for each in half.backbone.parameters()}
    tables = {id(table) for table in word_tables(module)}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in filter(lambda each: each.requires_grad, module.parameters()):
        own, table = id(parameter), id(parameter) in tables
        head, selector = own not in networks, own not in predictor
        rate = (settings.selector_learning_rate if selector else None) or settings.learning_rate
        rate = (settings.embedding_learning_rate if table else settings.head_learning_rate if head else None) or rate
        gentle = (table or parameter.ndim < 2) and not settings.decay_everything
        # the same groups whatever the rates are, so that a run may go on with other rates
        group = groups.setdefault(f"{selector} {head} {table} {gentle}", {"params": [], "lr": rate})
        group["params"].append(parameter)
        group["weight_decay"] = 0.0 if gentle else settings.weight_decay
    return torch.optim.AdamW([*groups.values()], lr=settings.learning_rate, betas=settings.betas, fused=True)


def word_tables(module: nn.Module) -> list[nn.Parameter]:
    """The word embeddings within a module, of whatever family its networks are."""
    return [part.table.weight for part in module.modules() if isinstance(part, TextBackbone)]


def learning_rate_factor(progress: float, warmup: float, decay: bool = True) -> float:
    """Linear from 0 to 1 during the warm-up, then linear to 0, or constant without ``decay``."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup)) if decay else 1.0


class Watch:
    """Judges the figures of one stage each time they are read: every ``every`` steps."""

    def __init__(self, stage: str, config: RunConfig, every: int) -> None:
        self._stage, self._target = stage, config.selection.target
        self._window = max(1, config.stages.collapse_window // every)
        self.selection_rates: list[float] = []
        """Mean sampled selection rates of the window, oldest first."""

    @property
    def healthy(self) -> bool:
        """Whether the last reading gives no cause for concern."""
        return not any(self._nothing(rate) or self._everything(rate) for rate in self.selection_rates[-1:])

    def judge(self, step: int, figures: dict[str, float]) -> None:
        """Raise TrainingError where a figure is not finite, or nothing or everything was kept for a whole window."""
        for name, value in sorted(figures.items(), key=lambda figure: figure[0] != "loss"):
            if not math.isfinite(value):
                raise TrainingError(f"{self._stage}: diverged, {name} is {value} at step {step}; fix: a lower "
                                    "optimisation.learning_rate or a smaller optimisation.gradient_clip")  # fmt: skip
        if "selection_rate" not in figures:
            return
        rates = self.selection_rates = [*self.selection_rates, figures["selection_rate"]][-self._window :]
        if len(rates) < self._window:
            return
        if all(map(self._nothing, rates)):
            fix = ("a smaller selection.weight, a longer warm start (stages.classifier_epochs) or a lower "
                   "optimisation.learning_rate")  # fmt: skip
        elif all(map(self._everything, rates)):
            fix = "a larger selection.weight"
        else:
            return
        raise TrainingError(
            f"{self._stage}: collapsed, the selector keeps {rates[-1]:.2%} of the features at step {step} "
            f"(target {self._target:.2%}); fix: {fix}"
        )

    def _nothing(self, rate: float) -> bool:
        return rate < self._target / 20

    def _everything(self, rate: float) -> bool:
        return self._target <= 0.9 and rate > 1 - (1 - self._target) / 20
