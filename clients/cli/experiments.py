"""`hotswap experiments`: split an alias between versions and read what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, make_table, print_json

if TYPE_CHECKING:
    from adapters.experiments import ExperimentReport, ExperimentService
    from adapters.statistics import Interval

__all__ = ["app"]

app = typer.Typer(help="Experiments: create, show, stop.", no_args_is_help=True)
_NameArgument = Annotated[str, typer.Argument(help="An experiment's id, or its alias.")]


@app.command("create")
def create(
    alias: Annotated[str, typer.Argument(help="The alias to split.")],
    arms: Annotated[list[str], typer.Option("--arms", help="NAME@VERSION=PERCENT, two or more.")],
    more_arms: Annotated[list[str] | None, typer.Argument(metavar="[ARM]...", help="Further arms.")] = None,
    salt: Annotated[str | None, typer.Option(help="Decides who gets which arm; default: random.")] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Split an alias: hotswap experiments create support --arms A@v1=50 B@v2=50."""
    from adapters.experiments import parse_arm

    experiment = _open(home).create(alias, [parse_arm(arm) for arm in [*arms, *(more_arms or [])]], salt=salt)
    if json:
        print_json(experiment)
        return
    shares = ", ".join(f"{arm.name} = v{arm.number} ({arm.weight:g} %)" for arm in experiment.arms)
    console.print(f"{experiment.id} runs on {alias}: {shares}")


@app.command("show")
def show(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Counts, means and 95 % intervals per arm."""
    report = _open(home).report(name)
    if json:
        print_json(report)
    else:
        _print_report(report)


@app.command("stop")
def stop(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """End an experiment; its alias answers with the version that it points to."""
    experiment = _open(home).stop(name)
    if json:
        print_json(experiment)
    else:
        console.print(f"{experiment.id} is stopped; {experiment.alias} answers with one version again")


def _open(home: Path | None) -> ExperimentService:
    from adapters.experiments import ExperimentService

    return ExperimentService(open_registry(home).database)


def _print_report(report: ExperimentReport) -> None:
    experiment = report.experiment
    rows: list[tuple[object, ...]] = []
    for arm in report.arms:
        head = (f"{arm.arm.name} = v{arm.arm.number}", f"{arm.arm.weight:g} %", arm.num_exposures, arm.num_units)
        if not arm.metrics:
            rows.append((*head, arm.num_errors, None, None, None, None, None))
        for metric in arm.metrics:
            interval = metric.estimate.interval
            rows.append(
                (
                    *head,
                    arm.num_errors,
                    metric.metric,
                    metric.num_outcomes,
                    f"{metric.estimate.mean:.3f}",
                    _format_interval(interval) if interval else metric.estimate.method,
                    f"{metric.difference.estimate:+.3f} {_format_interval(metric.difference)}"
                    if metric.difference
                    else None,
                )
            )
    control = report.arms[0].arm.name
    columns = ["arm", "share", "requests", "users", "errors", "metric", "outcomes", "mean", "95 % interval"]
    title = f"{experiment.id} on {experiment.alias}, {experiment.state}"
    console.print(make_table([*columns, f"against {control}"], rows, title=title))
    console.print(
        "Means are over users: each user's outcomes are averaged first. Intervals hold for one look at a sample size "
        "fixed beforehand; they don't allow looking again and again until one excludes zero.",
        style="dim",
    )


def _format_interval(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]".replace("[", "\\[")
