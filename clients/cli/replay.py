"""`hotswap experiments replay`: two or more versions answer a file of prompts, and are compared pair by pair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.judging import (
    DEFAULT_CRITERION,
    CriterionOption,
    Journal,
    JudgeUrlOption,
    Judging,
    is_function,
    print_bias,
    write_private,
)
from clients.cli.options import (
    EncodingOption,
    HomeOption,
    JoinTurnsOption,
    MapOption,
    RolesOption,
    SplitOption,
    SubsetOption,
    UrlOption,
    load_core,
    read_options,
)
from clients.cli.output import console, print_table
from clients.cli.replay_run import Replay, Scoring, compare_by_function

if TYPE_CHECKING:
    from clients.cli.replay_run import Given, Measure
    from training.answer_rules import ComparisonPrompt
    from training.formats import ReadOptions

__all__ = ["conclude", "replay"]


def replay(
    alias: Annotated[str, typer.Argument(help="The alias whose versions answer.")],
    a: Annotated[str, typer.Option("--a", help="A version: v1, legal@v1, or base.")],
    b: Annotated[str, typer.Option("--b", help="The version that it is compared with.")],
    prompts: Annotated[str, typer.Option("--prompts", metavar="SOURCE", help="Training data of any shape.")],
    output: Annotated[Path, typer.Option("--output", metavar="REPORT.json", help="Where to write the report.")],
    also: Annotated[list[str] | None, typer.Option("--also", help="A further version; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many prompts at most, the first ones.")] = 200,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE", help="exact: is it the reference answer; length; format: has it the form. May be repeated."
        ),
    ] = None,
    answer_pattern: Annotated[
        str | None, typer.Option(help="For the rule format: a regular expression for the whole answer.")
    ] = None,
    answer_schema: Annotated[Path | None, typer.Option(help="For the rule format: a file with a JSON schema.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="file.py:function, which scores answers as rewards do, or the name of a model that judges."),
    ] = None,
    judge_url: JudgeUrlOption = None,
    criterion: CriterionOption = DEFAULT_CRITERION,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=131_072, help="Longest answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed for temperature above 0.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 4,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again for what an earlier run has kept.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Start a server for this run on the home folder.")] = False,
    url: UrlOption = "http://127.0.0.1:8000",
    mapping: MapOption = None,
    roles: RolesOption = None,
    join_turns: JoinTurnsOption = False,
    split: SplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    home: HomeOption = None,
) -> None:
    """Compare versions: hotswap experiments replay legal --a v1 --b v2 --prompts FILE --output report.json."""
    models = _model_names(alias, [a, b, *(also or [])])
    reading = read_options(mapping, split, subset, encoding, roles, join_turns=join_turns)
    asked, num_repeated = _read_prompts(prompts, reading, limit)
    scoring = Scoring(list(rule or ()) or ([] if judge else ["exact", "length"]), answer_pattern, _read(answer_schema))
    scoring.check()
    options = {"temperature": temperature, "seed": seed, "store": False}
    options |= {} if max_tokens is None else {"max_tokens": max_tokens}
    journal = Journal(output.with_suffix(".answers.jsonl"), fresh=fresh)
    with _server(serve, url, home) as base_url:
        work = Replay(base_url, _base_of(serve, url, home), models, asked, options, journal, concurrency)
        answers = asyncio.run(work.answer_all())
        measures = scoring.measure(models, asked, answers)
        if judge is not None and is_function(judge):
            measures.append(compare_by_function(judge, asked, answers))
        elif judge is not None:
            judging = Judging(judge, judge_url, base_url, criterion, journal, concurrency)
            measures.append(asyncio.run(work.judge_all(answers, judging)))
    _check_compared(measures, answers)
    source = {"source": prompts, "count": len(asked), "num_repeated": num_repeated}
    report = _make_report(alias, source, answers, measures, {**options, "criterion": criterion})
    write_private(output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if num_repeated:
        console.print(f"left out: {num_repeated}, asks what an earlier row has asked")
    _print_report(report)
    console.print(f"the report is in {output}, the answers are in {journal.path}", markup=False, soft_wrap=True)


def _model_names(alias: str, versions: Sequence[str]) -> list[str]:
    from adapters.errors import InvalidInputError

    models = [_model_name(alias, version) for version in versions]
    if len(set(models)) < len(models):
        raise InvalidInputError(f"expected different versions, found {', '.join(models)}")
    return models


def _read_prompts(source: str, options: ReadOptions, limit: int) -> tuple[list[ComparisonPrompt], int]:
    """The first different prompts, and how many rows ask what an earlier one has asked: those would count it twice."""
    from training.answer_rules import comparison_prompts
    from training.formats import read_rows

    found = comparison_prompts(read_rows(source, options).as_dataset())
    asked: dict[str, ComparisonPrompt] = {}
    for prompt in found:
        asked.setdefault(json.dumps([prompt.messages, prompt.tools], sort_keys=True), prompt)
    return list(asked.values())[:limit], len(found) - len(asked)


def _check_compared(measures: Sequence[Measure], answers: dict[str, list[Given]]) -> None:
    """Refuse a report without a single comparison.

    Raises:
        InvalidInputError: no prompt was answered, or can be scored, for two versions; says why.
    """
    from adapters.errors import InvalidInputError

    if any(measure.comparisons for measure in measures):
        return
    errors = [answer.error for given in answers.values() for answer in given if answer.error is not None]
    reason = f"the first error: {errors[0]}" if errors else "no prompt has a reference answer"
    raise InvalidInputError(f"no prompt could be compared between two versions; {reason}")


def _model_name(alias: str, version: str) -> str:
    """What the server is asked for; a name that moves would be compared with itself from one day to the next.

    Raises:
        InvalidInputError: it is no version.
    """
    from adapters.errors import InvalidInputError
    from adapters.records import BASE_MODEL_NAME, parse_model_name, version_name

    if version == BASE_MODEL_NAME:
        return version
    name = version_name(alias, version)
    parse_model_name(name)
    if "@" not in name:
        raise InvalidInputError(f"{version!r} is no version: expected v1, or {alias}@v1")
    return name


def _base_of(is_own: bool, url: str, home: Path | None) -> str:
    """What the answers of `base` are kept under: our own server's base model, or else whose server it is."""
    if not is_own:
        return url
    core = load_core(home)
    return f"{core.base} {core.quantisation}"


@contextlib.contextmanager
def _server(is_own: bool, url: str, home: Path | None) -> Iterator[str]:
    """The URL of the server that answers: the one that runs, or one of our own for the length of the block."""
    if not is_own:
        yield url
        return
    from adapters.errors import ConfigurationError
    from clients.local_server import ServerDidNotStartError, running_server

    core = load_core(home)
    environment = os.environ | {"HOTSWAP_HOME": str(core.home)}
    log = core.home / "replay-server.log"
    try:
        with running_server(environment, log, "--log-level", "warning", "--no-jobs") as started:
            yield started
    except ServerDidNotStartError as error:
        raise ConfigurationError(str(error)) from None


def _make_report(
    alias: str,
    prompts: dict[str, Any],
    answers: dict[str, list[Given]],
    measures: Sequence[Measure],
    options: dict[str, Any],
) -> dict[str, Any]:
    from adapters.comparisons import rate

    return {
        "alias": alias,
        "prompts": prompts,
        "options": options,
        "versions": [_describe(model, given) for model, given in answers.items()],
        "measures": [
            {
                "name": measure.name,
                "comparisons": [asdict(found) for found in measure.comparisons],
                "ratings": [asdict(rating) for rating in rate(measure.comparisons)],
                "position_bias": measure.bias,
            }
            for measure in measures
        ],
    }


def _describe(model: str, given: Sequence[Given]) -> dict[str, Any]:
    good = [answer for answer in given if answer.error is None]
    return {
        "version": model,
        "digest": good[0].digest if good else None,
        "num_answers": len(good),
        "num_failed": len(given) - len(good),
        "num_cut": sum(answer.finish_reason == "length" for answer in good),
        "mean_tokens": sum(answer.tokens for answer in good) / len(good) if good else None,
    }


def _print_report(report: dict[str, Any]) -> None:
    versions = [
        tuple(_short(value) for name, value in version.items() if name != "digest") for version in report["versions"]
    ]
    print_table(["version", "answers", "failed", "cut", "tokens"], versions, whole=["version"])
    rows = [
        (
            measure["name"],
            f"{_number(report, found['first'])} against {_number(report, found['second'])}",
            f"{found['wins']}-{found['ties']}-{found['losses']}",
            f"{found['win_rate']:.2f} {_interval(found['win_interval'])}",
            f"{found['sign_p']:.3f}",
            f"{found['mean_difference']:+.3g} {_interval(found['difference'])}",
            f"{found['permutation_p']:.3f}",
        )
        for measure in report["measures"]
        for found in measure["comparisons"]
    ]
    columns = ["by", "versions", "won-tied-lost", "win rate", "p (signs)", "difference", "p (sizes)"]
    print_table(columns, rows, whole=columns)
    for sentence in conclude(report):
        console.print(sentence, markup=False, soft_wrap=True)
    for measure in report["measures"]:
        _print_ratings(measure)
    console.print(
        "A tie is half a win. Intervals are of 95 % and, like the p-values, hold for one look and one comparison.",
        style="dim",
    )


def conclude(report: dict[str, Any]) -> list[str]:
    """What the numbers of a report say, a sentence a comparison, and what may be wrong with the answers behind them."""
    found = [_conclude_one(measure["name"], one) for measure in report["measures"] for one in measure["comparisons"]]
    return found + [
        f"{version['num_cut']} of {version['num_answers']} answers of {version['version']} were cut at the limit of "
        "tokens: what is compared are beginnings. Give a higher --max-tokens."
        for version in report["versions"]
        if version["num_cut"] * 2 >= version["num_answers"] > 0
    ]


def _conclude_one(measure: str, found: dict[str, Any]) -> str:
    first, second, interval = (found[name] for name in ("first", "second", "win_interval"))
    by = f"By {measure}, over {found['num_prompts']} prompts"
    if interval is None or interval["low"] <= 0.5 <= interval["high"]:  # half is what chance gives
        return f"{by}: neither {first} nor {second} is shown to win more often."
    winner, loser = (first, second) if found["win_rate"] > 0.5 else (second, first)
    return f"{by}: {winner} wins more often than {loser}."


def _print_ratings(measure: dict[str, Any]) -> None:
    if measure["ratings"] and len(measure["ratings"]) > 2:
        strengths = [
            f"{rating['name']} {rating['strength']['estimate']:+.2f} {_interval(rating['strength'])}"
            for rating in measure["ratings"]
        ]
        console.print(f"ratings by {measure['name']}: {', '.join(strengths)}", markup=False, soft_wrap=True)
    if measure["position_bias"] is not None:
        print_bias(measure["name"], measure["position_bias"])


def _number(report: dict[str, Any], model: str) -> str:
    """A version without the alias that all of them share."""
    return model.removeprefix(f"{report['alias']}@")


def _interval(interval: dict[str, float] | None) -> str:
    return "" if interval is None else f"({interval['low']:.2f} to {interval['high']:.2f})"


def _short(value: Any) -> Any:
    return f"{value:.1f}" if isinstance(value, float) else value


def _read(path: Path | None) -> str | None:
    """The text of a file.

    Raises:
        InvalidInputError: it can't be read.
    """
    from adapters.errors import InvalidInputError

    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} can't be read: {error}") from None
