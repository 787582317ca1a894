"""`hotswap shadow`: let a candidate answer a copy of live requests, and see how its answers compare."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.judging import (
    DEFAULT_CRITERION,
    CriterionOption,
    Journal,
    JudgeUrlOption,
    Judging,
    ToJudge,
    bias_of,
    is_function,
    load_judge,
    print_bias,
    scores_of,
)
from clients.cli.options import HomeOption, JsonOption, UrlOption, open_registry
from clients.cli.output import console, format_moment, print_json, print_table
from clients.cli.shadow_loss import ShadowArgument, loss

if TYPE_CHECKING:
    from adapters.comparisons import PairedComparison
    from adapters.shadows import ShadowPair, ShadowReport, ShadowService
    from adapters.statistics import MeanEstimate

__all__ = ["app"]

app = typer.Typer(help="Shadows: start, list, show, judge, loss, stop.", no_args_is_help=True)
app.command("loss")(loss)


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
def stop(name: ShadowArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """End a shadow; what it has answered stays."""
    shadow = _open(home).stop(name)
    if json:
        print_json(shadow)
    else:
        console.print(f"{shadow.id} is stopped")


@app.command("show")
def show(
    name: ShadowArgument,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """How a shadow's answers compare with the live ones to the same requests."""
    report = _open(home).report(name)
    if json:
        print_json({"report": report})
    else:
        _print_report(report)


@app.command("judge")
def judge_pairs(
    name: ShadowArgument,
    judge: Annotated[
        str,
        typer.Option(help="file.py:function, which scores answers as rewards do, or the name of a model that judges."),
    ],
    judge_url: JudgeUrlOption = None,
    criterion: CriterionOption = DEFAULT_CRITERION,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many pairs at most, the newest ones.")] = 500,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests to a judge model at once.")] = 4,
    journal: Annotated[
        Path | None, typer.Option(help="Keeps a judge model's verdicts, so that none is asked for twice.")
    ] = None,
    url: UrlOption = "http://127.0.0.1:8000",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Have the kept answers of a shadow and the live ones judged: hotswap shadow judge support --judge gpt-x."""
    from adapters.errors import NotFoundError

    pairs = _open(home).pairs(name, limit=limit)
    if not pairs:
        raise NotFoundError("no answers are kept to judge; texts are kept with hotswap serve --keep-conversations")
    bias = None
    if is_function(judge):
        judged = _judge_by_function(judge, pairs)
    else:
        judging = Judging(judge, judge_url, url, criterion, Journal(journal), concurrency)
        judged, bias = _judge_by_model(judging, pairs)
    if json:
        print_json({"judged": judged, "position_bias": bias})
        return
    _print_judged(judge, judged)
    if bias is not None:
        print_bias(judge, bias)


def _open(home: Path | None) -> ShadowService:
    from adapters.shadows import ShadowService

    return ShadowService(open_registry(home).database)


def _judge_by_function(name: str, pairs: Sequence[ShadowPair]) -> PairedComparison:
    """Both sides compared by the scores of a function of the user's."""
    from adapters.chat_messages import answer_text
    from adapters.comparisons import compare_pair

    _, score = load_judge(name)
    prompts, nothing = [pair.messages for pair in pairs], [""] * len(pairs)
    ours, live = (
        score([answer_text(message) for message in side], prompts, nothing)
        for side in ([pair.shadow for pair in pairs], [pair.live for pair in pairs])
    )
    return compare_pair("shadow", "live", list(zip(ours, live, strict=True)), [pair.unit for pair in pairs])


def _judge_by_model(judging: Judging, pairs: Sequence[ShadowPair]) -> tuple[PairedComparison, dict[str, int]]:
    """Both sides compared by what a model prefers in both orders, and how often it went by the place."""
    from adapters.chat_messages import answer_text
    from adapters.comparisons import compare_pair

    both = [ToJudge(pair.messages, None, answer_text(pair.shadow), answer_text(pair.live)) for pair in pairs]
    verdicts = asyncio.run(judging.judge(both))
    judged = compare_pair("shadow", "live", scores_of(verdicts), [pair.unit for pair in pairs])
    return judged, bias_of(verdicts)


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
        ("answers that equal the live one", f"{report.same_share.mean:.1%}", _bounds(report.same_share, ".1%")),
        ("words in common, 0 to 1", f"{report.mean_overlap:.2f}", ""),
        ("tokens, live", f"{report.live_tokens:.1f}", ""),
        ("tokens, shadow", f"{report.shadow_tokens:.1f}", ""),
        ("tokens, shadow minus live", *_difference(report.token_difference, "+.2f")),
        ("cut at the limit in points, shadow minus live", *_difference(report.cut_difference, "+.1f", per=100)),
    ]
    print_table(["over the answered requests", "mean", "95 % interval"], rows)
    console.print(
        "Intervals are made to be looked at often (simulated, not proved), and take a user's requests for one "
        "observation. The engine drops copies while it is busy: see how many.",
        style="dim",
        soft_wrap=True,
    )


def _print_judged(name: str, found: PairedComparison) -> None:
    interval = found.win_interval
    bounds = "" if interval is None else f" ({interval.low:.2f} to {interval.high:.2f})"
    console.print(
        f"by {name}: the shadow won {found.wins}, tied {found.ties}, lost {found.losses} of {found.num_prompts} pairs "
        f"of {found.num_units} users; win rate {found.win_rate:.2f}{bounds}; p {found.sign_p:.3f} by signs, "
        f"{found.permutation_p:.3f} by sizes, for one look",
        markup=False,
        soft_wrap=True,
    )


def _difference(estimate: MeanEstimate | None, form: str, *, per: int = 1) -> tuple[str, str]:
    return ("-", "") if estimate is None else (f"{estimate.mean * per:{form}}", _bounds(estimate, form, per=per))


def _bounds(estimate: MeanEstimate, form: str, *, per: int = 1) -> str:
    """The ends of its interval in the form of the mean."""
    found = estimate.interval
    return estimate.method if found is None else f"{found.low * per:{form}} to {found.high * per:{form}}"
