"""`hotswap experiments`: split an alias between versions and read what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.experiment_acts import accept, promote, rollback
from clients.cli.experiment_report import power, show
from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.experiments import ExperimentService
    from adapters.records import Experiment

__all__ = ["app"]

app = typer.Typer(help="Experiments: create, list, show, stop; and how long one takes.", no_args_is_help=True)
app.command("show")(show)
app.command("power")(power)
app.command("promote")(promote)
app.command("rollback")(rollback)
app.command("accept")(accept)
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
    console.print(f"{experiment.id} runs on {alias}: {_describe_arms(experiment)}", soft_wrap=True)


@app.command("list")
def list_experiments(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """The newest experiments."""
    found = _open(home).list(limit=limit)
    if json:
        print_json(found)
        return
    rows = [(item.id, item.state, format_moment(item.created_at), _describe_arms(item)) for item in found]
    print_table(["experiment", "state", "created", "arms"], rows, whole=["experiment", "created"])


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


def _describe_arms(experiment: Experiment) -> str:
    return ", ".join(f"{arm.name} = {experiment.alias}@v{arm.number} ({arm.weight:g} %)" for arm in experiment.arms)
