"""What a verdict is made of: an experiment's numbers in one stage, as of one moment, and what each of them shows.

Knows neither the database nor how an interval is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from adapters.statistics import MIN_UNITS, Interval

__all__ = [
    "Comparison",
    "Evidence",
    "Guard",
    "GuardState",
    "Outcome",
    "Scale",
    "Side",
    "Split",
    "Treatment",
    "Verdict",
    "VerdictKind",
    "guard_state",
    "outcome_of",
]

Direction = Literal["increase", "decrease"]
Scale = Literal["share", "ratio", "number"]
VerdictKind = Literal["promote", "roll_back", "continue", "inconclusive"]
Outcome = Literal["better", "worse", "equivalent", "open", "no_data"]
GuardState = Literal["held", "breached", "open", "no_data", "no_variation"]


@dataclass(frozen=True, slots=True)
class Side:
    """One arm's part in a comparison: users that have a value, users that have none, and the mean of the values.

    `is_constant` is true where there would be users enough for an interval, and all have one value.
    """

    num_units: int
    num_missing: int
    mean: float | None
    is_constant: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of a treatment against the control.

    The interval is of treatment minus control: in the metric's own unit, or with the scale `ratio` as a relative
    change (0.1 is a tenth more). A share is one of 0 to 1. `variance_removed` is the share of the users' differences
    that what they did before the experiment foretold, and that the interval is free of; None where it was not used.
    """

    metric: str
    direction: Direction
    scale: Scale
    treatment: Side
    control: Side
    interval: Interval | None
    variance_removed: float | None = None

    @property
    def gain(self) -> tuple[float, float] | None:
        """The interval's ends, turned so that above zero is better."""
        if self.interval is None:
            return None
        if self.direction == "increase":
            return self.interval.low, self.interval.high
        return -self.interval.high, -self.interval.low

    @property
    def lacks_variation(self) -> bool:
        """Whether there is no interval since all users of an arm have one value: more of them may not help.

        A share has an interval all the same, after the first users.
        """
        sides = (self.treatment, self.control)
        is_enough = min(side.num_units for side in sides) >= MIN_UNITS
        return self.scale != "share" and self.interval is None and is_enough and any(s.is_constant for s in sides)


@dataclass(frozen=True, slots=True)
class Guard:
    """A guardrail of one treatment: by `margin` it may be worse than the control, on the comparison's scale.

    The margin is None while it can't be told: one relative to the control's mean, before there is a mean.
    """

    comparison: Comparison
    margin: float | None
    state: GuardState


@dataclass(frozen=True, slots=True)
class Treatment:
    """An arm that is compared with the control. `primary` is None where the experiment has no metric.

    `gaps` compare, for each metric of the plan that can be missing, how often requests have a value of it. `feedback`
    compares how often they have any feedback, whatever the plan says; None where there is none, or the gaps tell it.
    """

    name: str
    version: str
    primary: Comparison | None
    outcome: Outcome
    guards: tuple[Guard, ...]
    gaps: tuple[Comparison, ...] = ()
    feedback: Comparison | None = None

    @property
    def label(self) -> str:
        """`B (support@v2)`."""
        return f"{self.name} ({self.version})"


@dataclass(frozen=True, slots=True)
class Split:
    """How the units of the present stage, `stage`, were split, against how they should have been.

    `fired` means that chance doesn't explain it, in this stage or an earlier one that nobody has accepted: `stages` are
    those, `accepted` the ones that a person answers for.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    p_value: float | None
    fired: bool
    stage: int = 1
    stages: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict is made of: one stage of an experiment, as of one moment.

    `over` says why nothing more is to come (an end date, the planned users, a stop), None while more is. Where a plan
    with a fixed sample is not judged yet, `is_early` is true and the treatments' primaries have no interval; where
    its units are there, `closes_at` is when the last feedback on them is.
    `accepts_feedback_gap` is a person's word that feedback rates may differ, `accepted_guardrails` are those that a
    person no longer waits for; a breach of them counts. Before it `has_started` nobody comes.
    Where `is_adaptive`, weights follow the outcomes.
    """

    control: str
    treatments: tuple[Treatment, ...]
    split: Split
    metric: str | None
    smallest_effect: float | None
    num_units: int
    planned_units: int | None
    is_early: bool
    over: str | None
    accepts_feedback_gap: bool
    closes_at: datetime | None = None
    has_started: bool = True
    is_adaptive: bool = False
    accepted_guardrails: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the numbers allow. `arm` is the treatment that is meant; `notes` is what else a reader should know."""

    kind: VerdictKind
    arm: str | None
    sentence: str
    notes: tuple[str, ...]
    next_step: str


def outcome_of(comparison: Comparison | None, smallest_effect: float | None) -> Outcome:
    """What a primary metric's interval shows; a difference that is shown comes before one too small to matter."""
    if comparison is None or (gain := comparison.gain) is None:
        return "no_data"
    low, high = gain
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    if smallest_effect is not None and -smallest_effect < low and high < smallest_effect:
        return "equivalent"
    return "open"


def guard_state(comparison: Comparison, margin: float) -> GuardState:
    """Whether a treatment is shown to be no worse than by the margin, shown to be worse, or neither."""
    if (gain := comparison.gain) is None:
        return "no_variation" if comparison.lacks_variation else "no_data"
    low, high = gain
    if low > -margin:
        return "held"
    return "breached" if high < -margin else "open"
