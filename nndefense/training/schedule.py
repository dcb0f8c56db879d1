"""The learning rate of every step, as a function of its number alone."""

from __future__ import annotations

import math

from nndefense.training.settings import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``; no state, so nothing to save or to restore.

    A rise, of the warm-up or of ``one-cycle``, counts the step itself, since one with a learning rate of 0 would be
    lost.
    """
    return _scheduled(settings, step, steps) * _warmed(settings.warmup * steps / settings.epochs, step)


def _scheduled(settings: TrainingSettings, step: int, steps: int) -> float:
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step / steps)))
    if settings.schedule == "step":
        epoch = step * settings.epochs / steps
        return settings.lr * settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    if settings.schedule == "one-cycle":
        top = settings.peak * steps
        return settings.lr * min((step + 1) / top, (steps - step) / (steps - top), 1.0)
    return settings.lr


def _warmed(rising: float, step: int) -> float:
    """What the warm-up leaves of the learning rate, when it lasts ``rising`` steps."""
    return min(1.0, (step + 1) / rising) if rising > 0 else 1.0
