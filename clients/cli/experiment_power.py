"""`hotswap experiments power`: how many users, and how many days, an experiment takes. Writes for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import JsonOption
from clients.cli.output import console, format_confidence, print_json, print_table

if TYPE_CHECKING:
    from adapters.statistics.planning import Analysis

__all__ = ["power"]

_LOOKS = {"sequential": "as often as you like", "fixed": "once, when all users are there"}


@dataclass(frozen=True, slots=True)
class _Size:
    """What an experiment with this analysis takes: units of all arms, and days if it is known who comes."""

    analysis: Analysis
    planned_units: int
    days: int | None


def power(
    effect: Annotated[
        float, typer.Option("--effect", help="The true difference that is to be found, in the metric's own unit.")
    ],
    base_rate: Annotated[
        float | None, typer.Option("--base-rate", min=0, max=1, help="The control's share, of a metric of yes and no.")
    ] = None,
    std_dev: Annotated[
        float | None, typer.Option("--std-dev", min=0, help="Of any other metric: how far users differ.")
    ] = None,
    users_per_day: Annotated[
        float | None, typer.Option("--users-per-day", min=0.001, max=1e12, help="New users a day, for the days.")
    ] = None,
    traffic: Annotated[
        float, typer.Option("--traffic", min=0.01, max=100, help="Percent of the users that are in the experiment.")
    ] = 100.0,
    alpha: Annotated[float, typer.Option("--alpha", min=0.0001, max=0.5, help="Rate of false alarms.")] = 0.05,
    chance: Annotated[
        float, typer.Option("--power", min=0.01, max=0.999, help="Probability that the difference is found.")
    ] = 0.8,
    treatments: Annotated[
        int, typer.Option("--treatments", min=1, max=15, help="Arms beside the control, all of equal weight.")
    ] = 1,
    json: JsonOption = False,
) -> None:
    """How many users an experiment takes, and how many days, looked at all along or once at the end."""
    from adapters.errors import InvalidInputError
    from adapters.statistics import comparison_confidence, duration_days, required_units

    confidence = comparison_confidence(alpha, num_treatments=treatments)

    def plan(analysis: Analysis) -> _Size:
        pair = required_units(
            effect, base_rate=base_rate, std_dev=std_dev, confidence=confidence, power=chance, analysis=analysis
        )
        units = -(-pair * (treatments + 1) // 2)
        if users_per_day is None:
            return _Size(analysis, units, None)
        return _Size(analysis, units, duration_days(units, units_per_day=users_per_day, traffic_percent=traffic))

    try:
        sizes = [plan("sequential"), plan("fixed")]
    except ValueError as error:
        is_asked_well = (base_rate is None) != (std_dev is None)
        wanted = "" if is_asked_well else "; give --effect and either --base-rate or --std-dev"
        raise InvalidInputError(f"{error}{wanted}") from None
    if json:
        print_json(sizes)
    else:
        _print(sizes, effect=effect, chance=chance, confidence=confidence)


def _print(sizes: Sequence[_Size], *, effect: float, chance: float, confidence: float) -> None:
    rows = [(size.analysis, _LOOKS[size.analysis], f"{size.planned_units:,}", size.days) for size in sizes]
    print_table(["analysis", "you may look", "users in all arms", "days"], rows, whole=["analysis"])
    console.print(
        f"With so many users a true difference of {effect:+g} is found with a probability of {chance:.0%}. "
        f"Its intervals have {format_confidence(confidence)} confidence until weights are changed. "
        "A sequential experiment mostly ends earlier if the difference is larger, and looking can't fool you.",
        style="dim",
    )
    console.print("Write it into the experiment's file, which otherwise plans for 10,000:", soft_wrap=True)
    for size, when in zip(sizes, ("looked at all along", "with analysis: fixed"), strict=True):
        console.print(f"    planned_units: {size.planned_units}        # {when}", soft_wrap=True)
