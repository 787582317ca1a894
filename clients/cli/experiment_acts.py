"""`hotswap experiments promote`, `rollback` and `accept`: a person decides, and the numbers of the day are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_evaluation, open_registry
from clients.cli.output import console, print_json
from clients.cli.route import warn_unknown_to_router

if TYPE_CHECKING:
    from adapters.records import Experiment

__all__ = ["accept", "promote", "rollback"]

_NameArgument = Annotated[str, typer.Argument(help="An experiment's id, or its alias.")]
_ReasonOption = Annotated[
    str | None, typer.Option("--reason", help="Why, for the log.", show_default="the verdict's sentence")
]


def promote(
    name: _NameArgument,
    arm: Annotated[
        str | None, typer.Option("--arm", help="The treatment.", show_default="the one that the verdict promotes")
    ] = None,
    reason: _ReasonOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """End an experiment: its alias answers with a treatment's version from here on."""
    experiment = open_evaluation(home).promote(name, arm, reason=reason)
    _tell(experiment, json=json)
    if not json:
        warn_unknown_to_router(open_registry(home), experiment.alias)


def rollback(
    name: _NameArgument, reason: _ReasonOption = None, home: HomeOption = None, json: JsonOption = False
) -> None:
    """End an experiment: its alias answers with the control's version from here on."""
    _tell(open_evaluation(home).roll_back(name, reason=reason), json=json)


def accept(
    name: _NameArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why the difference is harmless, for the log.")],
    split: Annotated[
        bool, typer.Option("--split", help="Accept a split of users that chance doesn't explain, instead.")
    ] = False,
    guardrail: Annotated[
        str | None,
        typer.Option("--guardrail", metavar="METRIC", help="No longer wait for this guardrail, instead."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Let arms differ in how often outcomes are known: it no longer holds a promotion back in this stage."""
    from adapters.errors import InvalidInputError

    if guardrail is not None:
        if split:
            raise InvalidInputError("--split and --guardrail are two acts; give one of them", param="guardrail")
        open_evaluation(home).accept_guardrail(name, guardrail, reason)
        told = f"{name}: {guardrail} holds no promotion back in this stage any more; a breach of it still counts"
        console.print(told, soft_wrap=True)
        return
    if split:
        open_evaluation(home).accept_split(name, reason)
        console.print(f"{name}: arms are compared though users were not split as was meant", soft_wrap=True)
        return
    open_evaluation(home).accept_feedback(name, reason)
    console.print(f"{name}: outcomes may be known more often in one arm than in another", soft_wrap=True)


def _tell(experiment: Experiment, *, json: bool) -> None:
    if json:
        print_json(experiment)
    else:
        console.print(
            f"{experiment.id} is decided; take it back with: hotswap experiments undo {experiment.id}", soft_wrap=True
        )
