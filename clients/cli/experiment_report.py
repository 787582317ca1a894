"""`hotswap experiments show`: what came of an experiment, and what may still come. Writes for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from clients.cli.effect_plot import EffectPoint, draw_effect, draw_effects_svg
from clients.cli.options import HomeOption, JsonOption, open_evaluation
from clients.cli.output import console, format_confidence, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.evidence import Comparison, Guard, Treatment
    from adapters.experiment_report import ExperimentReport, MetricReport

__all__ = ["show"]

_VERDICTS = {
    "promote": ("green", "promote {arm}"),
    "roll_back": ("red", "roll back: {arm} must go"),
    "continue": ("cyan", "go on: nothing is decided yet"),
    "inconclusive": ("yellow", "inconclusive"),
}
_COMMANDS = {"promote": "promote", "roll_back": "rollback"}
_GUARD_STATES = {
    "held": "[green]holds[/green]",
    "breached": "[red]breached[/red]",
    "open": "not shown to hold yet",
    "no_data": "too little data",
    "no_variation": "no variation: no interval",
}
_MAX_DECISIONS = 8
_UNITS = {"share": " in points", "ratio": " in %", "number": ""}


def show(
    name: Annotated[str, typer.Argument(help="An experiment's id, or its alias.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Also draw the effect into this file.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """What came of an experiment: the verdict and why, the effect over time, guardrails and counts."""
    report = open_evaluation(home).report(name)
    if plot is not None:
        _write_plot(report, plot)
    if json:
        print_json(report)
    else:
        _print_report(report)


def _write_plot(report: ExperimentReport, path: Path) -> None:
    from adapters.errors import InvalidInputError

    effects = {arm: points for arm in report.history if (points := _points(report, arm))}
    if not effects or report.experiment.metric is None:
        raise InvalidInputError(
            f"experiment {report.experiment.id} has no effect to draw: it needs a primary metric, a sequential "
            "analysis, and a few users with outcomes in each arm"
        )
    control = report.experiment.arms[0].name
    unit = _UNITS[report.treatments[0].primary.scale] if report.treatments[0].primary else ""
    sure = format_confidence(report.confidence)
    title = f"{report.experiment.metric.name}: difference to {control}{unit} by users, {sure} sure"
    try:
        path.write_text(draw_effects_svg(effects, title=title), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} can't be written: {error.strerror}") from None


def _points(report: ExperimentReport, arm: str) -> list[EffectPoint]:
    """The effect over time; of shares and ratios in points and percent, as everything else tells them."""
    primary = next(treatment.primary for treatment in report.treatments if treatment.name == arm)
    factor = 1 if primary is None or primary.scale == "number" else 100
    return [
        EffectPoint(
            point.num_units,
            *(factor * end for end in (point.interval.estimate, point.interval.low, point.interval.high)),
        )
        for point in report.history[arm]
    ]


def _print_report(report: ExperimentReport) -> None:
    experiment = report.experiment
    began = "made" if experiment.starts_at is None else "started"
    since = f"; {began} {format_moment(experiment.starts_at or experiment.created_at)} UTC"
    stage = (
        ""
        if experiment.stage == 1
        else f", stage {experiment.stage} (weights were changed; only this stage counts, "
        f"what users did before it doesn't)"
    )
    console.print(f"{experiment.id} on {experiment.alias}, {experiment.state}{since}{stage}\n", soft_wrap=True)
    _print_verdict(report)
    _print_arms(report)
    _print_plan(report)
    for treatment in report.treatments:
        _print_effect(report, treatment)
        _print_guards(report, treatment)
    _print_split(report)
    _print_gaps(report)
    _print_others(report)
    _print_decisions(report)
    console.print(_footnote(report), style="dim")


def _print_verdict(report: ExperimentReport) -> None:
    verdict = report.verdict
    colour, words = _VERDICTS[verdict.kind]
    console.print(f"Verdict: {words.format(arm=verdict.arm)}", style=f"bold {colour}")
    for sentence in (verdict.sentence, *verdict.notes):
        console.print(f"  {sentence}", markup=False)
    console.print(f"  What to do: {verdict.next_step}", markup=False)
    if (command := _command(report)) is not None:
        console.print(f"    hotswap experiments {command}", markup=False, soft_wrap=True)
    console.print()


def _command(report: ExperimentReport) -> str | None:
    """What the verdict's next step is typed as."""
    from adapters.experiment_report import accepted_guardrails, has_accepted_feedback

    experiment, verdict = report.experiment, report.verdict
    if experiment.state == "draft":
        return f"start {experiment.id}" if experiment.starts_at is None else None
    if experiment.state != "running":
        return None
    if verdict.kind in _COMMANDS:
        return f"{_COMMANDS[verdict.kind]} {experiment.id}"
    if report.split.fired:
        return f'accept {experiment.id} --split --reason "..."'
    meant = [treatment for treatment in report.treatments if treatment.name == verdict.arm]
    accepted = accepted_guardrails(experiment, report.decisions)
    stuck = [guard.comparison.metric for t in meant for guard in t.guards if guard.state == "no_variation"]
    if waits := [metric for metric in stuck if metric not in accepted]:
        return f'accept {experiment.id} --guardrail {waits[0]} --reason "..."'
    gaps = (gap for treatment in meant for gap in treatment.gaps)
    is_accepted = has_accepted_feedback(experiment, report.decisions)
    return f'accept {experiment.id} --reason "..."' if any(map(_differs, gaps)) and not is_accepted else None


def _print_arms(report: ExperimentReport) -> None:
    rows = [
        (
            f"{arm.arm.name}{' (control)' if place == 0 else ''}",
            f"{report.experiment.alias}@v{arm.arm.number}",
            f"{arm.arm.weight:g} %",
            f"{arm.num_units:,}",
            f"{arm.num_exposures:,}",
            f"{arm.num_errors:,}",
            *(_primary_mean(arm.metrics) if report.experiment.metric else ()),
        )
        for place, arm in enumerate(report.arms)
    ]
    columns = ["arm", "version", "of users", "users", "requests", "errors"]
    if report.experiment.metric:
        columns += [report.experiment.metric.name, "known of"]
    print_table(columns, rows, whole=["arm", "version"])


def _print_plan(report: ExperimentReport) -> None:
    experiment, come = report.experiment, sum(arm.num_units for arm in report.arms)
    if experiment.planned_units is None or experiment.analysis == "fixed":  # of a fixed one the verdict tells it
        return
    told = f"{come:,} of {experiment.planned_units:,} planned users have come"
    if come >= experiment.planned_units and experiment.state == "running":
        told += (
            "; later ones count as well, and the intervals hold. End it with stop when what may still be would not "
            "matter to you"
        )
    console.print(f"{told}.", soft_wrap=True)


def _primary_mean(metrics: Sequence[MetricReport]) -> tuple[str | None, str | None]:
    found = next((metric for metric in metrics if metric.role == "primary"), None)
    return (None, None) if found is None else (_format_mean(found), f"{found.num_units:,} users")


def _format_mean(metric: MetricReport) -> str:
    return f"{metric.mean * 100:.3g} %" if metric.scale == "share" else f"{metric.mean:.4g}"


def _print_effect(report: ExperimentReport, treatment: Treatment) -> None:
    from adapters.verdict_words import format_interval

    if treatment.primary is None or treatment.primary.interval is None:
        return
    better = "more is better" if treatment.primary.direction == "increase" else "less is better"
    console.print(
        f"\n{treatment.primary.metric}, {treatment.name} against the control ({better}): "
        f"{format_interval(treatment.primary)}",
        soft_wrap=True,
    )
    points = _points(report, treatment.name)
    if len(points) > 1:
        for line in draw_effect(points, width=min(60, max(20, console.width - 14))):
            console.print(f"  {line}", style="cyan", markup=False)
        console.print("  ● estimate   ░ interval   ┄ no difference", style="dim")


def _print_guards(report: ExperimentReport, treatment: Treatment) -> None:
    if treatment.guards:
        console.print()
        rows = [_guard_row(report, treatment, guard) for guard in treatment.guards]
        control = report.experiment.arms[0].name
        columns = ["guardrail", control, treatment.name, "difference", "at worst allowed", "state"]
        print_table(columns, rows, whole=["guardrail"])


def _guard_row(report: ExperimentReport, treatment: Treatment, guard: Guard) -> tuple[object, ...]:
    from adapters.verdict_words import format_interval, format_margin

    means = {arm.arm.name: _mean_of(arm.metrics, guard.comparison.metric) for arm in report.arms}
    return (
        guard.comparison.metric,
        means[report.experiment.arms[0].name],
        means[treatment.name],
        format_interval(guard.comparison),
        format_margin(guard),
        _GUARD_STATES[guard.state],
    )


def _mean_of(metrics: Sequence[MetricReport], name: str) -> str | None:
    return next((_format_mean(metric) for metric in metrics if metric.metric == name), None)


def _print_split(report: ExperimentReport) -> None:
    split = report.split
    counts = " to ".join(f"{count:,}" for count in split.counts)
    weights = " to ".join(f"{weight:g}" for weight in split.weights)
    state = "not by chance, see the verdict" if split.fired else "as it should be"
    if sum(split.counts):
        console.print(f"\nUsers are split {counts}, {weights} was meant: {state}.", soft_wrap=True)


def _print_gaps(report: ExperimentReport) -> None:
    from adapters.verdict_words import format_interval

    for treatment in report.treatments:
        for gap in (*treatment.gaps, *([treatment.feedback] if treatment.feedback else [])):
            if gap.interval is None or gap.control.mean is None or gap.treatment.mean is None:
                continue
            judged = f"the arms differ, {format_interval(gap)}" if _differs(gap) else "no difference is shown"
            sides = ((report.arms[0].arm.name, gap.control.mean), (treatment.name, gap.treatment.mean))
            what = "There is feedback on" if gap is treatment.feedback else f"{gap.metric} is known of"
            if not any(mean for _, mean in sides):
                whose = " and ".join(name for name, _ in sides)
                console.print(f"{what} no answer in {whose} in this stage.", soft_wrap=True)
                continue
            known = ", ".join(f"{mean * 100:.3g} % in {name}" for name, mean in sides)
            console.print(f"{what} so many of a user's answers: {known}; {judged}.", soft_wrap=True)


def _differs(gap: Comparison) -> bool:
    return gap.interval is not None and not gap.interval.low <= 0 <= gap.interval.high


def _print_others(report: ExperimentReport) -> None:
    names = dict.fromkeys(metric.metric for arm in report.arms for metric in arm.metrics if metric.role == "other")
    if names:
        rows = [(name, *(_mean_of(arm.metrics, name) for arm in report.arms)) for name in names]
        console.print()
        print_table(["measured besides", *(arm.arm.name for arm in report.arms)], rows, whole=["measured besides"])


def _print_decisions(report: ExperimentReport) -> None:
    if report.decisions:
        rows = [
            (format_moment(decision.made_at), decision.action.replace("_", " "), decision.by, escape(decision.reason))
            for decision in report.decisions[-_MAX_DECISIONS:]
        ]
        console.print()
        print_table(["when", "what was done", "by", "why"], rows, whole=["when"])


def _footnote(report: ExperimentReport) -> str:
    experiment, sure = report.experiment, format_confidence(report.confidence)
    guards = sorted(
        {
            guard.comparison.interval.confidence
            for treatment in report.treatments
            for guard in treatment.guards
            if guard.comparison.interval is not None
        }
    )
    if experiment.analysis == "fixed":
        told = (
            "Each user counts once, with the average of all answers until then. The truth lies between the two ends "
            f"with {sure} confidence."
        )
    else:
        told = (
            f"Each user counts once, with the first outcome. The truth lies between the two ends with {sure} "
            "confidence, at all looks together, however often you look."
        )
    told += (
        f" Of guardrails that is {format_confidence(guards[0])}." if guards and guards != [report.confidence] else ""
    )
    return f"{told} What is measured besides are averages of all answers."
