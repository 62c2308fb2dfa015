"""Notices a run that has diverged or collapsed, and says what to do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from rekd_train.config.run import RunConfig
from rekd_train.errors import TrainingError


class Watch:
    """Judges the figures of one stage each time they are read.

    Args:
        every: steps between readings.
        rates: earlier readings of the window, of a resumed stage.
    """

    def __init__(self, stage: str, config: RunConfig, every: int, rates: Iterable[float] = ()) -> None:
        self._stage = stage
        self._target = config.selection.target
        self._readings = max(1, config.stages.collapse_window // every)
        self._rates = deque(rates, maxlen=self._readings)

    @property
    def rates(self) -> list[float]:
        """Mean sampled rates of the window, oldest first."""
        return list(self._rates)

    @property
    def healthy(self) -> bool:
        """Whether the last reading gives no cause for concern."""
        return not self._rates or not (self._nothing(self._rates[-1]) or self._everything(self._rates[-1]))

    def judge(self, step: int, figures: dict[str, float]) -> None:
        """Look at a reading.

        Raises:
            TrainingError: a figure is not finite, or nothing or everything was kept for a whole window.
        """
        for name, value in sorted(figures.items(), key=lambda figure: figure[0] != "loss"):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self._stage}: diverged, {name} is {value} at step {step}; fix: a lower "
                    "optimisation.learning_rate or a smaller optimisation.gradient_clip"
                )
        if "rate" not in figures:
            return
        self._rates.append(figures["rate"])
        if len(self._rates) < self._readings:
            return
        if all(map(self._nothing, self._rates)):
            raise TrainingError(
                f"{self._stage}: collapsed, the selector keeps {figures['rate']:.2%} of the features at step {step} "
                f"(target {self._target:.2%}); fix: a smaller selection.weight, a longer warm start "
                "(stages.classifier_epochs) or a lower optimisation.learning_rate"
            )
        if all(map(self._everything, self._rates)):
            raise TrainingError(
                f"{self._stage}: collapsed, the selector keeps {figures['rate']:.2%} of the features at step {step} "
                f"(target {self._target:.2%}); fix: a larger selection.weight, or stages.operator=zero"
            )

    def _nothing(self, rate: float) -> bool:
        return rate < self._target / 20

    def _everything(self, rate: float) -> bool:
        return self._target <= 0.9 and rate > 1 - (1 - self._target) / 20
