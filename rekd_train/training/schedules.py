"""Quantities that change during training, as functions of progress in [0, 1]."""

from __future__ import annotations

from rekd_train.config.run import TemperatureConfig


def annealed_temperature(progress: float, settings: TemperatureConfig) -> float:
    """tau = tau_0 (tau_K / tau_0)^progress (REKD sec. 3.2)."""
    return settings.start * (settings.end / settings.start) ** progress


def refreshed_step(step: int, refresh: int) -> int:
    """The step whose temperature the step ``step`` (from 0) takes: it changes every ``refresh`` steps.

    The authors count steps from 1 and change it in those that ``refresh`` divides, so the first refresh - 1 steps
    run at tau_0. With a refresh of 1 each step takes its own, from tau_0 on.
    """
    return step if refresh == 1 else step + 1 - (step + 1) % refresh


def annealed_alpha(progress: float, settings: TemperatureConfig) -> float:
    """alpha = (tau_0 - tau) / (tau_0 - tau_K): from pure distillation to pure rationale extraction."""
    if settings.start == settings.end:
        return 1.0
    return (settings.start - annealed_temperature(progress, settings)) / (settings.start - settings.end)


def learning_rate_factor(progress: float, warmup: float, decay: bool = True) -> float:
    """Linear from 0 to 1 during the warm-up, then linear to 0, or constant without ``decay``."""
    if progress < warmup:
        return progress / warmup
    if not decay:
        return 1.0
    return max(0.0, (1.0 - progress) / (1.0 - warmup))
