"""`hotswap shadow`: let a candidate answer a copy of live requests, and see how its answers compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.comparisons import PairedComparison
    from adapters.shadows import ShadowPair, ShadowReport, ShadowService
    from adapters.statistics import MeanEstimate

__all__ = ["app"]

app = typer.Typer(help="Shadows: start, list, show, stop.", no_args_is_help=True)
_NameArgument = Annotated[str, typer.Argument(help="A shadow's id, or its alias.")]


@app.command("start")
def start(
    alias: Annotated[str, typer.Argument(help="Whose requests are copied.")],
    version: Annotated[str, typer.Option("--version", help="The candidate: v2, or legal@v2.")],
    share: Annotated[float, typer.Option(help="How many percent of the requests.")] = 5.0,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Have a candidate answer a copy of live requests: hotswap shadow start support --version v2 --share 5."""
    shadow = _open(home).start(alias, version, share=share)
    if json:
        print_json(shadow)
    else:
        console.print(
            f"{shadow.id}: {shadow.label} answers a copy of {share:g} % of {alias}'s requests", soft_wrap=True
        )


@app.command("list")
def list_shadows(home: HomeOption = None, json: JsonOption = False) -> None:
    """All shadows, the newest first."""
    found = _open(home).list()
    if json:
        print_json(found)
        return
    rows = [(item.id, item.state, format_moment(item.created_at), item.label, f"{item.share:g} %") for item in found]
    print_table(["shadow", "state", "created", "version", "share"], rows, whole=["shadow", "created", "version"])


@app.command("stop")
def stop(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """End a shadow; what it has answered stays."""
    shadow = _open(home).stop(name)
    if json:
        print_json(shadow)
    else:
        console.print(f"{shadow.id} is stopped")


@app.command("show")
def show(
    name: _NameArgument,
    judge: Annotated[
        str | None,
        typer.Option(help="file.py:function, which scores kept answers as rewards do; this runs the file."),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """How a shadow's answers compare with the live ones to the same requests."""
    service = _open(home)
    report = service.report(name)
    judged = None if judge is None else _judge(judge, service.pairs(name))
    if json:
        print_json({"report": report, "judged": judged})
        return
    _print_report(report)
    if judged is not None:
        _print_judged(str(judge), judged)


def _open(home: Path | None) -> ShadowService:
    from adapters.shadows import ShadowService

    return ShadowService(open_registry(home).database)


def _judge(name: str, pairs: Sequence[ShadowPair]) -> PairedComparison:
    """The kept answers of both sides, compared by the scores of a function of the user's.

    Raises:
        NotFoundError: no text was kept.
    """
    from adapters.comparisons import compare_pair
    from adapters.errors import NotFoundError
    from training.rewards import load_reward_function, score_texts
    from training.rewards_file import public_reward

    if not pairs:
        raise NotFoundError("no answers are kept to judge; texts are kept with hotswap serve --keep-conversations")
    function, shown = load_reward_function(name, Path.cwd(), setting="--judge"), str(public_reward(name))
    prompts = [[dict(message) for message in pair.messages] for pair in pairs]
    scores = [
        score_texts(function, shown, [_text(item) for item in side], prompts, [""] * len(pairs), setting="--judge")
        for side in ([pair.shadow for pair in pairs], [pair.live for pair in pairs])
    ]
    return compare_pair("shadow", "live", list(zip(*scores, strict=True)))


def _text(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def _print_report(report: ShadowReport) -> None:
    shadow = report.shadow
    console.print(
        f"{shadow.id}, {shadow.state}: {shadow.label} on {shadow.share:g} % of {shadow.alias}", soft_wrap=True
    )
    counts = [(report.num_answered, report.num_units, report.num_dropped, report.num_failed, report.num_kept)]
    print_table(["answered", "users", "dropped", "failed", "texts kept"], counts)
    for kind, reasons in (("dropped", report.dropped_because), ("failed", report.failed_because)):
        for reason, count in reasons.items():
            console.print(f"{kind}: {count}, {reason}", markup=False, soft_wrap=True)
    if report.same_share is None:
        console.print("no copy has been answered yet: there is nothing to compare")
        return
    rows = [
        ("answers that equal the live one", f"{report.same_share.mean:.1%}", _bounds(report.same_share)),
        ("words in common, 0 to 1", f"{report.mean_overlap:.2f}", ""),
        ("tokens, live", f"{report.live_tokens:.1f}", ""),
        ("tokens, shadow", f"{report.shadow_tokens:.1f}", ""),
        ("tokens, shadow minus live", *_difference(report.token_difference)),
        ("cut at the limit, shadow minus live", *_difference(report.cut_difference)),
    ]
    print_table(["over the answered requests", "mean", "95 % interval"], rows)
    console.print(
        "Intervals hold however often one looks, and take a user's requests for one observation. The engine drops "
        "copies while it is busy: see how many.",
        style="dim",
        soft_wrap=True,
    )


def _print_judged(name: str, found: PairedComparison) -> None:
    console.print(
        f"by {name}: the shadow won {found.wins}, tied {found.ties}, lost {found.losses} of {found.num_prompts}; "
        f"p {found.sign_p:.3f} by signs, {found.permutation_p:.3f} by sizes",
        markup=False,
        soft_wrap=True,
    )


def _difference(estimate: MeanEstimate | None) -> tuple[str, str]:
    return ("-", "") if estimate is None else (f"{estimate.mean:+.2f}", _bounds(estimate))


def _bounds(estimate: MeanEstimate) -> str:
    return (
        estimate.method if estimate.interval is None else f"{estimate.interval.low:.2f} to {estimate.interval.high:.2f}"
    )
