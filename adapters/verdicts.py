"""From an experiment's numbers to its verdict: pure rules, which docs/verdicts.md says in words.

Missing data is never success: what can't be shown is not passed, and what is not passed is not promoted. Knows neither
the database nor how an interval is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from adapters.statistics import Interval

__all__ = [
    "Comparison",
    "Evidence",
    "Guard",
    "GuardState",
    "Outcome",
    "Side",
    "Split",
    "Treatment",
    "Verdict",
    "VerdictKind",
    "format_effect",
    "format_interval",
    "format_margin",
    "guard_state",
    "judge",
    "outcome_of",
]

Direction = Literal["increase", "decrease"]
Scale = Literal["share", "ratio", "number"]
VerdictKind = Literal["promote", "roll_back", "continue", "inconclusive"]
Outcome = Literal["better", "worse", "equivalent", "open", "no_data"]
GuardState = Literal["held", "breached", "open", "no_data"]


@dataclass(frozen=True, slots=True)
class Side:
    """One arm's part in a comparison: users that have a value, users that have none, and the mean of the values."""

    num_units: int
    num_missing: int
    mean: float | None


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

    `gaps` compare, for each metric of the plan that can be missing, how often requests have a value of it.
    """

    name: str
    version: str
    primary: Comparison | None
    outcome: Outcome
    guards: tuple[Guard, ...]
    gaps: tuple[Comparison, ...] = ()

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
    `accepts_feedback_gap` is a person's word that feedback rates may differ.
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
        return "no_data"
    low, high = gain
    if low > -margin:
        return "held"
    return "breached" if high < -margin else "open"


def judge(evidence: Evidence) -> Verdict:
    """The verdict, by the first rule that applies.

    1. A guardrail is breached: roll back, also where the split is wrong. Harm is not waited out.
    2. The users are not split as they should be: inconclusive, whatever else the numbers say.
    3. The sample was planned, and is not there yet, or feedback on it may still come: continue.
    4. A treatment is better, and nothing holds it back: promote. Of several the one with the highest estimate.
    5. Every treatment is worse: roll back.
    6. Every treatment is worse or equivalent, or nothing more is to come: inconclusive.
    7. Otherwise: continue.
    """
    for treatment in evidence.treatments:
        if breached := [guard for guard in treatment.guards if guard.state == "breached"]:
            return _breach(evidence, treatment, breached)
    if evidence.split.fired:
        return _mismatch(evidence)
    if evidence.is_early:
        return _early(evidence)
    better = [treatment for treatment in evidence.treatments if treatment.outcome == "better"]
    if free := [treatment for treatment in better if not _obstacles(evidence, treatment)]:
        return _promotion(evidence, max(free, key=_estimate))
    outcomes = {treatment.outcome for treatment in evidence.treatments}
    if outcomes == {"worse"}:
        return _loss(evidence)
    if outcomes <= {"worse", "equivalent"}:
        return _equivalence(evidence)
    if better:
        return _held_back(evidence, max(better, key=_estimate))
    return _unsettled(evidence)


def format_effect(value: float, scale: Scale) -> str:
    """A difference for people: +4.1 points of a share, +12 % of a time, otherwise +0.052."""
    if scale == "share":
        return f"{value * 100:+.2g} points" if abs(value) < 0.1 else f"{value * 100:+.1f} points"
    if scale == "ratio":
        return f"{value * 100:+.0f} %" if abs(value) >= 0.1 else f"{value * 100:+.1f} %"
    return f"{value:+.3g}"


def format_interval(comparison: Comparison) -> str:
    """`+0.052 (between +0.012 and +0.091)`, with the unit once for both ends."""
    interval, scale = comparison.interval, comparison.scale
    if interval is None:
        return "not known yet"
    low, high = (format_effect(end, scale) for end in (interval.low, interval.high))
    low = low.removesuffix(" points").removesuffix(" %")
    return f"{format_effect(interval.estimate, scale)} (between {low} and {high})"


def _obstacles(evidence: Evidence, treatment: Treatment) -> list[str]:
    """Why a treatment that is better is not promoted; none if nothing speaks against it."""
    found = [_describe_guard(guard) for guard in treatment.guards if guard.state != "held"]
    return found if evidence.accepts_feedback_gap else [*found, *_open_gaps(treatment)]


def _describe_guard(guard: Guard) -> str:
    name = guard.comparison.metric
    if guard.state == "no_data":
        return f"the guardrail {name} has too little data to be passed"
    found = format_interval(guard.comparison)
    return f"the guardrail {name} is not shown to hold: {found}, where {format_margin(guard)} is allowed"


def format_margin(guard: Guard) -> str:
    """The worst difference that a guardrail allows: +1 points of an error rate."""
    if guard.margin is None:
        return "a share of the control's mean, not known yet,"
    worse = guard.margin if guard.comparison.direction == "decrease" else -guard.margin
    return format_effect(worse, guard.comparison.scale)


def _open_gaps(treatment: Treatment) -> list[str]:
    """Metrics of which one arm's requests have a value more often, in words."""
    return [
        f"{gap.metric} is known of {more} of {treatment.name}'s requests than of the control's: {format_interval(gap)}"
        for gap in treatment.gaps
        if gap.interval is not None and not gap.interval.low <= 0 <= gap.interval.high
        for more in ["more" if gap.interval.low > 0 else "fewer"]
    ]


def _estimate(treatment: Treatment) -> float:
    assert treatment.primary is not None
    assert treatment.primary.interval is not None
    estimate = treatment.primary.interval.estimate
    return estimate if treatment.primary.direction == "increase" else -estimate


def _confidence(treatment: Treatment) -> str:
    assert treatment.primary is not None
    assert treatment.primary.interval is not None
    return f"{treatment.primary.interval.confidence * 100:.4g} %"


def _mismatch(evidence: Evidence) -> Verdict:
    return Verdict(
        "inconclusive",
        None,
        f"No verdict: {_describe_split(evidence.split)}, so the arms can't be compared.",
        (),
        "Look for users whose id changes, clients that retry or give up with one arm alone, and robots; mend it and "
        "start a new experiment, or accept it with a reason if it does no harm to the comparison.",
    )


def _describe_split(split: Split) -> str:
    if split.stages and split.stage not in split.stages:
        before = " and ".join(map(str, split.stages))
        return f"users were not split as was meant before (stage {before}), which other weights don't mend"
    counts = " to ".join(f"{count:,}" for count in split.counts)
    weights = " to ".join(f"{weight:g}" for weight in split.weights)
    chance = "" if split.p_value is None else f" (p = {split.p_value:.2g})"
    return f"users are split {counts}, where {weights} was meant; chance doesn't explain that{chance}"


def _breach(evidence: Evidence, treatment: Treatment, breached: list[Guard]) -> Verdict:
    first = breached[0]
    notes = [f"So is {guard.comparison.metric}: {format_interval(guard.comparison)}." for guard in breached[1:]]
    if evidence.split.fired:
        words = _describe_split(evidence.split)
        notes.append(f"{words[0].upper()}{words[1:]}: how large the harm is can't be told, but it is not waited out.")
    others = [other for other in evidence.treatments if other != treatment]
    notes += [f"Rolling back ends it for {other.label}, too: {_describe_outcome(other)}." for other in others]
    step = f"Roll back, so that nobody is answered by {treatment.version} any more"
    if others:
        names = " and ".join(other.name for other in others)
        step += (
            f"; or go on with {names} alone, by giving weights to {names} and the control but not to {treatment.name}"
        )
    return Verdict(
        "roll_back",
        treatment.name,
        f"{treatment.label} breaks the guardrail {first.comparison.metric}: {format_interval(first.comparison)} "
        f"against {evidence.control}, where {format_margin(first)} is allowed.",
        tuple(notes),
        f"{step}.",
    )


def _early(evidence: Evidence) -> Verdict:
    assert evidence.planned_units is not None
    if evidence.closes_at is not None:
        return _closing(evidence.planned_units, evidence.closes_at)
    is_over = evidence.over is not None
    return Verdict(
        "inconclusive" if is_over else "continue",
        None,
        f"{evidence.num_units:,} of {evidence.planned_units:,} planned users are there; the plan was to judge once, "
        "when all of them are.",
        ("Until then there are means and no interval: one made for one look would promise too much at the second.",),
        f"No more are to come ({evidence.over}): start again with a plan that can be reached." if is_over else "Wait.",
    )


def _closing(planned_units: int, closes_at: datetime) -> Verdict:
    return Verdict(
        "continue",
        None,
        f"All {planned_units:,} planned users are there; the plan is to judge once, when no feedback on their answers "
        f"is taken any more: at {closes_at:%Y-%m-%d %H:%M} UTC.",
        ("Until then there are means and no interval: one made for one look would promise too much at the second.",),
        "Wait.",
    )


def _promotion(evidence: Evidence, treatment: Treatment) -> Verdict:
    assert treatment.primary is not None
    guards = len(treatment.guards)
    hold = {0: "there are no guardrails", 1: "the guardrail holds"}.get(guards, f"all {guards} guardrails hold")
    notes = [f"{other.label}: {_describe_outcome(other)}." for other in evidence.treatments if other != treatment]
    if evidence.split.accepted:
        notes.append(f"Accepted by hand: the split of stage {' and '.join(map(str, evidence.split.accepted))}.")
    if evidence.accepts_feedback_gap:
        notes += [f"Accepted by hand: {gap}." for gap in _open_gaps(treatment)]
    return Verdict(
        "promote",
        treatment.name,
        f"{treatment.label} is better than {evidence.control}: {treatment.primary.metric} "
        f"{format_interval(treatment.primary)}, with {_confidence(treatment)} confidence; {hold}.",
        tuple(notes),
        f"Promote {treatment.version}.",
    )


def _loss(evidence: Evidence) -> Verdict:
    worst = min(evidence.treatments, key=_estimate)
    assert worst.primary is not None
    return Verdict(
        "roll_back",
        worst.name,
        f"{worst.label} is worse than {evidence.control}: {worst.primary.metric} {format_interval(worst.primary)}, "
        f"with {_confidence(worst)} confidence.",
        tuple(f"{other.label}: {_describe_outcome(other)}." for other in evidence.treatments if other != worst),
        f"Roll back, so that everybody is answered by {evidence.control} again.",
    )


def _equivalence(evidence: Evidence) -> Verdict:
    assert evidence.smallest_effect is not None
    primary = evidence.treatments[0].primary
    assert primary is not None
    size = format_effect(evidence.smallest_effect, primary.scale).lstrip("+")
    return Verdict(
        "inconclusive",
        None,
        f"No treatment is better than {evidence.control} by as much as matters: the effect on {evidence.metric} is "
        f"smaller than {size}.",
        tuple(f"{treatment.label}: {_describe_outcome(treatment)}." for treatment in evidence.treatments),
        "Choose by cost or taste: more users won't find a difference that matters.",
    )


def _describe_outcome(treatment: Treatment) -> str:
    if treatment.primary is None or treatment.outcome == "no_data":
        return "too little data"
    words = {"better": "better", "worse": "worse", "equivalent": "no difference that matters", "open": "not settled"}
    return f"{words[treatment.outcome]}, {treatment.primary.metric} {format_interval(treatment.primary)}"


def _held_back(evidence: Evidence, treatment: Treatment) -> Verdict:
    assert treatment.primary is not None
    first, *others = _obstacles(evidence, treatment)
    is_over = evidence.over is not None
    steps = [f"No more is to come ({evidence.over})" if is_over else "Wait for the guardrails"]
    if not evidence.accepts_feedback_gap and _open_gaps(treatment):
        steps.append("find out why one arm has more feedback, and accept the difference if it is harmless")
        steps = steps if is_over or len(others) else steps[1:]
    next_step = "; ".join(steps)
    return Verdict(
        "inconclusive" if is_over else "continue",
        treatment.name,
        f"{treatment.label} looks better than {evidence.control} ({treatment.primary.metric} "
        f"{format_interval(treatment.primary)}), but {first}.",
        tuple(f"Also, {obstacle}." for obstacle in others),
        f"{next_step[0].upper()}{next_step[1:]}.",
    )


def _unsettled(evidence: Evidence) -> Verdict:
    notes = tuple(f"{treatment.label}: {_describe_outcome(treatment)}." for treatment in evidence.treatments)
    if evidence.metric is None:
        return _without_metric(evidence)
    if evidence.over is not None:
        return Verdict(
            "inconclusive",
            None,
            f"The experiment ended ({evidence.over}) without a difference in {evidence.metric} being shown.",
            (*notes, *_ruled_out(evidence)),
            "Start again with more users if an effect that is not ruled out would matter; else choose by cost.",
        )
    return Verdict(
        "continue",
        None,
        f"Not settled yet: the numbers fit a gain as well as a loss in {evidence.metric}.",
        notes,
        "Wait; looking does no harm.",
    )


def _ruled_out(evidence: Evidence) -> list[str]:
    """What an experiment without a winner has taught."""
    found = []
    for treatment in evidence.treatments:
        if treatment.primary is not None and (interval := treatment.primary.interval) is not None:
            low, high = (format_effect(end, treatment.primary.scale) for end in (interval.low, interval.high))
            found.append(f"Ruled out of {treatment.name}: an effect below {low} or above {high}.")
    return found


def _without_metric(evidence: Evidence) -> Verdict:
    guards = [guard for treatment in evidence.treatments for guard in treatment.guards]
    held = sum(guard.state == "held" for guard in guards)
    found = f"{held} of {len(guards)} guardrails are shown to hold" if guards else "there is no guardrail either"
    is_over = evidence.over is not None
    return Verdict(
        "inconclusive" if is_over else "continue",
        None,
        f"The experiment has no primary metric, so that nothing can win; {found}.",
        (),
        "Name a metric that users' feedback or the answers give, in a new experiment, to learn which arm is better.",
    )
