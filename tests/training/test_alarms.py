"""Alarms: each is raised by the course that it is about, and by no healthy one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.alarms import EvaluationPoint, StepPoint, find_alarms, find_remark


def _steps(losses: Sequence[float], norms: Sequence[float] = ()) -> list[StepPoint]:
    known = [*norms, *[1.0] * (len(losses) - len(norms))]
    return [StepPoint(step, loss, norm) for step, (loss, norm) in enumerate(zip(losses, known, strict=True), 1)]


def _falling(count: int) -> list[float]:
    return [3 * 0.97**step + 0.2 * (-1) ** step for step in range(count)]


def _evaluations(*losses: float, every: int = 10) -> list[EvaluationPoint]:
    return [EvaluationPoint(every * index, loss) for index, loss in enumerate(losses, 1)]


def test_no_alarm_is_raised_when_training_goes_well() -> None:
    """A loss that falls and scatters, validated now and then, after any number of steps."""
    steps = _steps(_falling(100))
    validations = _evaluations(2.5, 2.0, 1.8, 1.7, 1.71, 1.69)
    assert [find_alarms(steps[:count], validations[: count // 10]) for count in range(101)] == [[]] * 101


def test_alarm_is_fatal_when_a_loss_is_not_a_number() -> None:
    """Of training, or of validation; the sentence names the step and what to do."""
    (training,) = find_alarms(_steps([1.0, math.nan]), [])
    (validation,) = find_alarms(_steps([1.0, 0.9]), [EvaluationPoint(2, math.inf)])
    assert (training.kind, training.is_fatal) == (validation.kind, validation.is_fatal) == ("not_a_number", True)
    assert training.message.startswith("the training loss is not a number at step 2: lower learning_rate")
    assert validation.message.startswith("the validation loss is not a number at step 2")


def test_alarm_is_fatal_when_the_loss_rises_for_good() -> None:
    """One bad batch is no divergence; ten bad steps in a row are."""
    assert find_alarms(_steps([2.0] * 19 + [9.0]), []) == []
    (alarm,) = find_alarms(_steps([2.0] * 15 + [4.0] * 10), [])
    assert (alarm.kind, alarm.is_fatal) == ("diverging", True)
    assert "rose from 2.00 to 4.00" in alarm.message


def test_divergence_is_not_seen_when_a_small_loss_doubles() -> None:
    """Where the loss is nearly nothing, half as much again is nothing, too."""
    assert find_alarms(_steps([0.01] * 10 + [0.05] * 10), []) == []


def test_alarm_warns_when_a_gradient_is_ten_times_the_usual() -> None:
    """Compared with the median of the steps before, once there are twenty."""
    norms = [1.0, 3.0] * 10
    (alarm,) = find_alarms(_steps(_falling(21), [*norms, 20.1]), [])
    assert (alarm.kind, alarm.is_fatal) == ("gradient", False)
    assert "at step 21 is 20.1, usual is 2" in alarm.message
    assert find_alarms(_steps(_falling(21), [*norms, 19.9]), []) == []
    assert find_alarms(_steps(_falling(6), [1.0] * 5 + [100.0]), []) == []


def test_alarm_warns_when_nothing_is_learned() -> None:
    """After forty steps; a fall of a fiftieth is learning."""
    assert find_alarms(_steps([2.0] * 39), []) == []
    (alarm,) = find_alarms(_steps([2.0] * 40), [])
    assert (alarm.kind, alarm.is_fatal) == ("no_learning", False)
    assert find_alarms(_steps([2.0] * 30 + [1.95] * 10), []) == []


def test_alarm_warns_when_validation_rises_while_training_falls() -> None:
    """Two validations above the best, by more than a fiftieth; it says which state was the best."""
    steps = _steps(_falling(40))
    (alarm,) = find_alarms(steps, _evaluations(2.0, 1.5, 1.6, 1.7))
    assert (alarm.kind, alarm.is_fatal) == ("overfitting", False)
    assert "rose from 1.500 (step 20) to 1.700" in alarm.message
    assert find_alarms(steps, _evaluations(2.0, 1.5, 1.6)) == []
    assert find_alarms(steps, _evaluations(2.0, 1.5, 1.6, 1.51)) == []
    assert find_alarms(_steps([*_falling(20), *[2.0] * 20]), _evaluations(2.0, 1.5, 1.6, 1.7)) == []


def test_alarm_warns_when_the_model_forgets() -> None:
    """As of the last validation, by more than is allowed; where nothing was measured nothing is said."""
    steps, points = _steps(_falling(20)), [EvaluationPoint(10, 2.0, None, 0.1), EvaluationPoint(20, 1.5, None, 0.31)]
    (alarm,) = find_alarms(steps, points, max_forgetting=0.3)
    assert (alarm.kind, alarm.is_fatal) == ("forgetting", False)
    assert "0.31 nats a token above the base model's at step 20, 0.3 is allowed" in alarm.message
    assert find_alarms(steps, points, max_forgetting=0.31) == []
    assert find_alarms(steps, points[:1], max_forgetting=0.3) == []
    assert find_alarms(steps, _evaluations(2.0, 1.5), max_forgetting=0.0) == []


def test_remark_says_that_training_made_it_worse_when_no_state_is_as_good_as_the_first() -> None:
    """In the three digits that are shown; what is told is the loss of the state that is published, not the last one."""
    points = _evaluations(0.663, 0.7)
    told = "the validation loss was 0.225 before it and is 0.663 in the state of step 10, which is published"
    assert f"training made it worse: {told}; lower learning_rate" == find_remark(0.225, points, points[0])
    assert find_remark(0.6627, points[:1], points[0]) == find_remark(0.7, points, points[0]) is None


def test_remark_is_silent_when_a_better_state_was_passed_over_for_what_it_forgot() -> None:
    """Training did lower the loss: it is the forgetting that has an alarm of its own."""
    points = _evaluations(0.8, 1.1)
    assert find_remark(1.0, points, points[1]) is None


def test_remark_says_that_the_loss_still_fell_when_the_last_state_is_the_best() -> None:
    """By more than a fiftieth of the loss of the evaluation before, or of the loss before training, and 0.01."""
    fell = "the validation loss was still falling at the last step, to {}; training longer would probably pay"
    points = _evaluations(2.0, 1.0)
    assert fell.format("1.000: by 1.000 since the evaluation before") == find_remark(5.0, points, points[1])
    assert fell.format("2.000: by 3.000 since before training") == find_remark(5.0, points[:1], points[0])
    slow, risen, learned = _evaluations(2.0, 1.97), _evaluations(1.0, 2.0), _evaluations(0.01, 0.001)
    assert find_remark(5.0, slow, slow[1]) is None
    assert find_remark(5.0, risen, risen[0]) is None
    assert find_remark(5.0, learned, learned[1]) is None
    assert find_remark(float("nan"), points[:1], points[0]) is None
    below_zero = _evaluations(-1.0, -1.5)
    assert find_remark(0.0, below_zero, below_zero[1]) is not None
