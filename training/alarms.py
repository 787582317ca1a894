"""Looks at the course of a run and says in plain sentences what is wrong with it. Pure functions over numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from adapters.gate_report import FORGETTING_CURE

__all__ = ["Alarm", "AlarmKind", "EvaluationPoint", "StepPoint", "find_alarms", "find_remark"]

AlarmKind = Literal["not_a_number", "diverging", "gradient", "no_learning", "overfitting", "forgetting"]

_WINDOW = 10  # steps whose mean loss stands for a moment of the run: single batches scatter too much
_DIVERGED_FACTOR = 1.5
_DIVERGED_NATS = 0.5
_LEARNED_SHARE = 0.02
_NO_LEARNING_STEPS = 40
_USUAL_STEPS = 50
_GRADIENT_FACTOR = 10
_OVERFITTING_RISE = 1.02
_STILL_FALLING = 0.02  # of the loss before
_LEAST_FALL = 0.01  # nats a token


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One optimiser step: mean training loss, and the gradient's norm before clipping where it is known."""

    step: int
    loss: float
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """The validation loss and accuracy after a step, and by how much the loss on general text has risen (nats)."""

    step: int
    loss: float
    accuracy: float | None = None
    forgetting: float | None = None


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person should know; with `is_fatal` there is no point in going on."""

    kind: AlarmKind
    message: str
    is_fatal: bool = False


def find_alarms(
    steps: Sequence[StepPoint], evaluations: Sequence[EvaluationPoint], *, max_forgetting: float = math.inf
) -> list[Alarm]:
    """What is wrong as of the last step. The same alarm is found again at later steps for as long as it holds."""
    if not steps:
        return []
    checks: tuple[Callable[[], Alarm | None], ...] = (
        lambda: _check_number(steps, evaluations),
        lambda: _check_diverging(steps),
        lambda: _check_gradient(steps),
        lambda: _check_learning(steps),
        lambda: _check_overfitting(steps, evaluations),
        lambda: _check_forgetting(evaluations, max_forgetting),
    )
    return [alarm for check in checks if (alarm := check()) is not None]


def find_remark(before: float, evaluations: Sequence[EvaluationPoint], best: EvaluationPoint) -> str | None:
    """What the validation losses of a whole run say of it in a sentence, if anything.

    Training made it worse: no state has a loss as low as the one before the first step, as they are shown. Or it was
    still falling: the last state is published, and its loss is lower than that of the evaluation before it, for the
    first one that before the first step, by more than 2 %, and 0.01 nats a token.

    Args:
        before: The loss before the first step.
        evaluations: Those of the run, in order.
        best: The one whose state is published.
    """
    if round(min(point.loss for point in evaluations), 3) > round(before, 3):
        losses = (
            f"the validation loss was {before:.3f} before it and is {best.loss:.3f} in the state of step {best.step}"
        )
        return f"training made it worse: {losses}, which is published; lower learning_rate"
    previous = evaluations[-2].loss if len(evaluations) > 1 else before
    fall = previous - best.loss
    if best.step != evaluations[-1].step or not fall > max(_STILL_FALLING * abs(previous), _LEAST_FALL):
        return None
    since = "the evaluation before" if len(evaluations) > 1 else "before training"
    falling = f"the validation loss was still falling at the last step, to {best.loss:.3f}: by {fall:.3f} since {since}"
    return f"{falling}; training longer would probably pay"


def _check_number(steps: Sequence[StepPoint], evaluations: Sequence[EvaluationPoint]) -> Alarm | None:
    for what, points in (("training", steps[-1:]), ("validation", evaluations[-1:])):
        for point in points:
            if not math.isfinite(point.loss):
                message = (
                    f"the {what} loss is not a number at step {point.step}: lower learning_rate, "
                    "or look for rows that are not text"
                )
                return Alarm("not_a_number", message, is_fatal=True)
    return None


def _check_diverging(steps: Sequence[StepPoint]) -> Alarm | None:
    if len(steps) < 2 * _WINDOW:
        return None
    first, last = _mean_loss(steps[:_WINDOW]), _mean_loss(steps[-_WINDOW:])
    if last <= max(first * _DIVERGED_FACTOR, first + _DIVERGED_NATS):
        return None
    message = (
        f"the training loss rose from {first:.2f} to {last:.2f} (means of {_WINDOW} steps) by step {steps[-1].step}: "
        "training is diverging; lower learning_rate, or raise warmup_steps"
    )
    return Alarm("diverging", message, is_fatal=True)


def _check_gradient(steps: Sequence[StepPoint]) -> Alarm | None:
    last = steps[-1].gradient_norm
    before = [point.gradient_norm for point in steps[-_USUAL_STEPS - 1 : -1] if point.gradient_norm is not None]
    if last is None or len(before) < 2 * _WINDOW:
        return None
    usual = median(before)
    if last <= _GRADIENT_FACTOR * usual:
        return None
    message = (
        f"the gradient's norm at step {steps[-1].step} is {last:.3g}, usual is {usual:.3g}: a row may be broken "
        "(garbage, or another language than the rest), or learning_rate is too high"
    )
    return Alarm("gradient", message)


def _check_learning(steps: Sequence[StepPoint]) -> Alarm | None:
    if len(steps) < _NO_LEARNING_STEPS:
        return None
    first, last = _mean_loss(steps[:_WINDOW]), _mean_loss(steps[-_WINDOW:])
    if last < first * (1 - _LEARNED_SHARE):
        return None
    message = (
        f"after {len(steps)} steps the training loss is {last:.3f}, at the beginning it was {first:.3f} (means of "
        f"{_WINDOW} steps): nothing is learned; raise learning_rate, or check that answers follow from their prompts"
    )
    return Alarm("no_learning", message)


def _check_overfitting(steps: Sequence[StepPoint], evaluations: Sequence[EvaluationPoint]) -> Alarm | None:
    if not evaluations:
        return None
    best = min(evaluations, key=lambda point: point.loss)
    later = [point for point in evaluations if point.step > best.step]
    if len(later) < 2 or later[-1].loss <= best.loss * _OVERFITTING_RISE:
        return None
    until_best = [point for point in steps if point.step <= best.step][-_WINDOW:]
    if not until_best or _mean_loss(steps[-_WINDOW:]) >= _mean_loss(until_best):
        return None
    message = (
        f"the validation loss rose from {best.loss:.3f} (step {best.step}) to {later[-1].loss:.3f} while the training "
        "loss fell: the model learns the rows by heart; train for fewer epochs, or set patience"
    )
    return Alarm("overfitting", message)


def _check_forgetting(evaluations: Sequence[EvaluationPoint], max_forgetting: float) -> Alarm | None:
    rise = evaluations[-1].forgetting if evaluations else None
    if rise is None or rise <= max_forgetting:
        return None
    message = (
        f"the loss on general text is {rise:.2f} nats a token above the base model's at step {evaluations[-1].step}, "
        f"{max_forgetting:g} is allowed (gate_forgetting): the model forgets what it knew; {FORGETTING_CURE}"
    )
    return Alarm("forgetting", message)


def _mean_loss(steps: Sequence[StepPoint]) -> float:
    return fmean(point.loss for point in steps)
