"""Verdicts as people read them: one plain sentence, what else they should know, what to do; numbers with their units.

Which of them it is, `verdicts` says; what holds a promotion back is found where it is told, here.
"""

from __future__ import annotations

from datetime import datetime

from adapters.evidence import Comparison, Evidence, Guard, Scale, Split, Treatment, Verdict

__all__ = [
    "breach",
    "early",
    "equivalence",
    "estimate_of",
    "format_effect",
    "format_interval",
    "format_margin",
    "held_back",
    "limits_of",
    "loss",
    "mismatch",
    "obstacles_of",
    "promotion",
    "unsettled",
]


_ONE_LOOK = (
    "Until then the averages are shown, and not how sure they are: a test that is made for one look is wrong more "
    "often with each look before."
)

_FOLLOWED = (
    "Weights follow the outcomes (thompson): an arm with bad luck at first gets few users to show that it was luck, so "
    "that it looks worse than it is, and each day is a stage of its own with a smaller part of alpha. To learn which "
    "arm is better, leave the allocation fixed."
)


def limits_of(evidence: Evidence) -> list[str]:
    """What a reader should know of the numbers, whichever verdict they give."""
    notes = [_FOLLOWED] if evidence.is_adaptive and evidence.has_started else []
    gaps = [(treatment, treatment.feedback) for treatment in evidence.treatments]
    return notes + [
        f"Users give feedback on {more} of {treatment.name}'s answers than on the control's: {format_interval(gap)}."
        for treatment, gap in gaps
        if gap is not None and (more := _differs(gap)) is not None
    ]


def format_effect(value: float, scale: Scale) -> str:
    """A difference for people: +4.1 points of a share, +12 % of a time, otherwise +0.052; nothing is 0."""
    if scale == "number":
        return _signed(value, ".3g")
    if scale == "share":
        return f"{_signed(value * 100, '.2g' if abs(value) < 0.1 else '.1f')} points"
    return f"{_signed(value * 100, '.1f' if abs(value) < 0.1 else '.0f')} %"


def _signed(value: float, form: str) -> str:
    """With its sign, unless what is printed is nothing."""
    return format(abs(value), form) if float(format(value, form)) == 0 else format(value, f"+{form}")


def format_interval(comparison: Comparison) -> str:
    """`+0.052 (between +0.012 and +0.091)`, with the unit once for both ends."""
    interval, scale = comparison.interval, comparison.scale
    if interval is None:
        return "not known yet"
    low, high = (format_effect(end, scale) for end in (interval.low, interval.high))
    low = low.removesuffix(" points").removesuffix(" %")
    return f"{format_effect(interval.estimate, scale)} (between {low} and {high})"


def obstacles_of(evidence: Evidence, treatment: Treatment) -> list[str]:
    """Why a treatment that is better is not promoted; none if nothing speaks against it."""
    found = [_describe_guard(treatment, guard) for guard in _open_guards(evidence, treatment)]
    return found if evidence.accepts_feedback_gap else [*found, *_open_gaps(treatment)]


def _open_guards(evidence: Evidence, treatment: Treatment) -> list[Guard]:
    """The guardrails that are not shown to hold, and that nobody has accepted."""
    accepted = evidence.accepted_guardrails
    return [guard for guard in treatment.guards if guard.state != "held" and guard.comparison.metric not in accepted]


def _describe_guard(treatment: Treatment, guard: Guard) -> str:
    name = guard.comparison.metric
    if guard.state == "no_variation":
        return f"the guardrail {name} can't be shown to hold: {_describe_sameness(treatment, guard.comparison)}"
    if guard.state == "no_data":
        return f"the guardrail {name} has too little data to be passed"
    found = format_interval(guard.comparison)
    return f"the guardrail {name} is not shown to hold: {found}, where {format_margin(guard)} is allowed"


def _describe_sameness(treatment: Treatment, comparison: Comparison) -> str:
    """Whose users all have one value, of a comparison that lacks variation."""
    first, second = comparison.treatment, comparison.control
    if first.is_constant and second.is_constant and first.mean == second.mean:
        whose = f"both arms have the same value, {first.mean:.4g}, in all {first.num_units + second.num_units:,} users"
    else:
        sides = ((treatment.name, first), ("the control", second))
        whose = " and ".join(
            f"all {side.num_units:,} users of {name} have the value {side.mean:.4g}"
            for name, side in sides
            if side.is_constant
        )
    return f"{whose}, and without variation there is no interval"


def format_margin(guard: Guard) -> str:
    """The worst difference that a guardrail allows: +1 points of an error rate."""
    if guard.margin is None:
        return "a share of the control's mean, not known yet,"
    worse = guard.margin if guard.comparison.direction == "decrease" else -guard.margin
    return format_effect(worse, guard.comparison.scale)


def _open_gaps(treatment: Treatment) -> list[str]:
    """Metrics of which one arm's requests have a value more often, in words."""
    return [
        f"{gap.metric} is known of {more} of {treatment.name}'s answers than of the control's: {format_interval(gap)}"
        for gap in treatment.gaps
        if (more := _differs(gap)) is not None
    ]


def _differs(gap: Comparison) -> str | None:
    """In which direction a treatment's share is shown to differ; None if it isn't."""
    if gap.interval is None or gap.interval.low <= 0 <= gap.interval.high:
        return None
    return "more" if gap.interval.low > 0 else "fewer"


def estimate_of(treatment: Treatment) -> float:
    """The primary metric's estimate, turned so that more is better."""
    assert treatment.primary is not None
    assert treatment.primary.interval is not None
    estimate = treatment.primary.interval.estimate
    return estimate if treatment.primary.direction == "increase" else -estimate


def _confidence(treatment: Treatment) -> str:
    assert treatment.primary is not None
    assert treatment.primary.interval is not None
    return f"{treatment.primary.interval.confidence * 100:.4g} %"


def mismatch(evidence: Evidence) -> Verdict:
    """The users are not split as they should be."""
    return Verdict(
        "inconclusive",
        None,
        f"No verdict: {_describe_split(evidence.split)}. Some users are lost or counted twice, so that the "
        "arms can't be compared.",
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
    return f"users are split {counts}, where {weights} was meant, {_describe_chance(split.p_value)}"


def _describe_chance(p_value: float | None) -> str:
    """How seldom chance does that: looked at again and again, in at most so many experiments."""
    if not p_value or p_value < 1e-9:
        return "which chance doesn't do"
    return f"which chance does in at most 1 of {float(f'{1 / p_value:.2g}'):,.0f} experiments"


def breach(evidence: Evidence, treatment: Treatment, breached: list[Guard]) -> Verdict:
    """A treatment does harm."""
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
        f"against {evidence.control}, where at worst {format_margin(first)} is allowed.",
        tuple(notes),
        f"{step}.",
    )


def early(evidence: Evidence) -> Verdict:
    """A sample that was planned is not there yet, or not closed."""
    assert evidence.planned_units is not None
    if evidence.closes_at is not None:
        return _closing(evidence.planned_units, evidence.closes_at)
    is_over = evidence.over is not None
    return Verdict(
        "inconclusive" if is_over else "continue",
        None,
        f"{evidence.num_units:,} of {evidence.planned_units:,} planned users are there; the plan was to judge once, "
        "when all of them are.",
        (_ONE_LOOK,),
        f"No more are to come ({evidence.over}): start again with a plan that can be reached." if is_over else "Wait.",
    )


def _closing(planned_units: int, closes_at: datetime) -> Verdict:
    return Verdict(
        "continue",
        None,
        f"All {planned_units:,} planned users are there; the plan is to judge once, when no feedback on their answers "
        f"is taken any more: at {closes_at:%Y-%m-%d %H:%M} UTC.",
        (_ONE_LOOK,),
        "Wait.",
    )


def promotion(evidence: Evidence, treatment: Treatment) -> Verdict:
    """A treatment is better, and nothing speaks against it."""
    assert treatment.primary is not None
    notes = [
        *_adjustment(treatment),
        *(f"{other.label}: {_describe_outcome(other)}." for other in evidence.treatments if other != treatment),
    ]
    if evidence.split.accepted:
        notes.append(f"Accepted by hand: the split of stage {' and '.join(map(str, evidence.split.accepted))}.")
    accepted = [guard for guard in treatment.guards if guard.state != "held"]
    notes += [f"Accepted by hand: {_describe_guard(treatment, guard)}." for guard in accepted]
    if evidence.accepts_feedback_gap:
        notes += [f"Accepted by hand: {gap}." for gap in _open_gaps(treatment)]
    return Verdict(
        "promote",
        treatment.name,
        f"{treatment.label} is better than {evidence.control}: {treatment.primary.metric} "
        f"{format_interval(treatment.primary)}, with {_confidence(treatment)} confidence; "
        f"{_describe_hold(len(treatment.guards), len(accepted))}.",
        tuple(notes),
        f"Promote {treatment.version}.",
    )


def _describe_hold(num_guards: int, num_accepted: int) -> str:
    if num_accepted:
        return f"{num_guards - num_accepted} of {num_guards} guardrails hold, the rest is accepted by hand"
    few = {0: "there are no guardrails", 1: "the guardrail holds", 2: "both guardrails hold"}
    return few.get(num_guards, f"all {num_guards} guardrails hold")


def loss(evidence: Evidence) -> Verdict:
    """Every treatment is worse."""
    worst = min(evidence.treatments, key=estimate_of)
    assert worst.primary is not None
    return Verdict(
        "roll_back",
        worst.name,
        f"{worst.label} is worse than {evidence.control}: {worst.primary.metric} {format_interval(worst.primary)}, "
        f"with {_confidence(worst)} confidence.",
        tuple(f"{other.label}: {_describe_outcome(other)}." for other in evidence.treatments if other != worst),
        f"Roll back, so that everybody is answered by {evidence.control} again.",
    )


def equivalence(evidence: Evidence) -> Verdict:
    """No treatment is better by as much as matters."""
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
    if treatment.primary is not None and treatment.primary.lacks_variation:
        return _describe_sameness(treatment, treatment.primary)
    if treatment.primary is None or treatment.outcome == "no_data":
        return "too little data"
    words = {
        "better": "better",
        "worse": "worse",
        "equivalent": "no difference that matters",
        "open": "no difference shown",
    }
    return f"{words[treatment.outcome]}, {treatment.primary.metric} {format_interval(treatment.primary)}"


def held_back(evidence: Evidence, treatment: Treatment) -> Verdict:
    """A treatment is better, and something speaks against promoting it."""
    assert treatment.primary is not None
    first, *others = obstacles_of(evidence, treatment)
    is_over = evidence.over is not None
    guards = _open_guards(evidence, treatment)
    stuck = [guard.comparison.metric for guard in guards if guard.state == "no_variation"]
    steps = [f"No more is to come ({evidence.over})"] if is_over else []
    if len(guards) > len(stuck) and not is_over:
        steps.append("Wait for the guardrails")
    if stuck:
        steps.append(
            f"if {' and '.join(stuck)} can't get worse by as much as is allowed, as where every answer has one length, "
            "accept that with a reason; more users alone won't show it"
        )
    if not evidence.accepts_feedback_gap and _open_gaps(treatment):
        steps.append(
            "find out why one arm has more feedback: where unhappy users are silent, an arm looks better than it is. "
            "Accept the difference if it is harmless"
        )
    next_step = "; ".join(steps)
    return Verdict(
        "inconclusive" if is_over else "continue",
        treatment.name,
        f"{treatment.label} is better than {evidence.control}, {treatment.primary.metric} "
        f"{format_interval(treatment.primary)}, but is not promoted: {first}.",
        tuple(f"Also, {obstacle}." for obstacle in others),
        f"{next_step[0].upper()}{next_step[1:]}.",
    )


def unsettled(evidence: Evidence) -> Verdict:
    """Nothing is shown, yet or for good."""
    if evidence.metric is None:
        return _without_metric(evidence)
    if not evidence.has_started:
        return Verdict("continue", None, "It has not started yet.", (), "Start it, or wait for its time.")
    notes = tuple(f"{treatment.label}: {_describe_outcome(treatment)}." for treatment in evidence.treatments)
    if evidence.over is not None:
        return Verdict(
            "inconclusive",
            None,
            f"The experiment ended ({evidence.over}) without a difference in {evidence.metric} being shown.",
            (*notes, *_ruled_out(evidence), *_adjustment(evidence.treatments[0])),
            "Start again with more users if what may still be would matter; else choose by cost.",
        )
    if all(treatment.outcome == "no_data" for treatment in evidence.treatments):
        return _too_little(evidence)
    return Verdict(
        "continue",
        None,
        f"No difference in {evidence.metric} is shown yet: the numbers fit a gain as well as a loss.",
        notes,
        "Wait; looking does no harm.",
    )


def _too_little(evidence: Evidence) -> Verdict:
    known = max(
        treatment.primary.treatment.num_units + treatment.primary.control.num_units
        for treatment in evidence.treatments
        if treatment.primary is not None
    )
    same = [_describe_sameness(t, t.primary) for t in evidence.treatments if t.primary and t.primary.lacks_variation]
    if same:
        return Verdict(
            "continue",
            None,
            f"No difference in {evidence.metric} can be told: {same[0]}.",
            (),
            "Wait only if users can differ in it at all; if not, stop, and start again with a metric in which they do.",
        )
    nobody = (
        "Nobody has come yet" if evidence.split.stage == 1 else f"Nobody has come in stage {evidence.split.stage} yet"
    )
    users = nobody if evidence.num_units == 0 else f"{_count(evidence.num_units)} came"
    told = "" if evidence.num_units == 0 else f", of {known:,} {evidence.metric} is known"
    return Verdict(
        "continue",
        None,
        f"Too few users for a first estimate: {users[0].lower()}{users[1:]}{told}.",
        (),
        "Wait; looking does no harm. If users come and nothing is known of them, see whether your application sends "
        f"{evidence.metric}.",
    )


def _count(num_users: int) -> str:
    return "1 user" if num_users == 1 else f"{num_users:,} users"


def _adjustment(treatment: Treatment) -> list[str]:
    """That users' past was taken into account, if so: the means that are shown don't differ by the same."""
    removed = None if treatment.primary is None else treatment.primary.variance_removed
    if removed is None:
        return []
    note = "The difference is adjusted by what the same users did before the experiment, which explains"
    return [f"{note} {removed:.0%} of how they differ."]


def _ruled_out(evidence: Evidence) -> list[str]:
    """What an experiment without a winner has taught."""
    found = []
    for treatment in evidence.treatments:
        if treatment.outcome == "open" and treatment.primary and (gain := treatment.primary.gain):
            worse, better = (format_effect(abs(end), treatment.primary.scale).lstrip("+") for end in gain)
            may_be = f"{treatment.name} is up to {worse} worse, or up to {better} better"
            found.append(f"What may still be: {may_be}. More is ruled out.")
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
