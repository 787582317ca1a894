"""`hotswap data`: convert, show and check training data before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from clients.cli.options import (
    BaseOption,
    DeviceOption,
    EncodingOption,
    HomeOption,
    JsonOption,
    MapOption,
    SplitOption,
    SubsetOption,
    ValidationSplitOption,
    load_core,
    read_options,
)
from clients.cli.output import console, error_console, format_bytes, format_seconds, print_json
from clients.cli.settings_flags import with_settings
from training.config import TrainSettings

if TYPE_CHECKING:
    from adapters.chat_template import RenderedRow
    from adapters.settings import CoreSettings
    from training.estimate import Estimate
    from training.formats import Dataset, ReadRows
    from training.preflight import Preflight, SetReport

__all__ = ["app"]

app = typer.Typer(help="Training data: convert any shape to rows, show their tokens, check them.", no_args_is_help=True)
_SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A file (JSONL, JSON, CSV, TSV, Parquet), a folder, or a hub id.")
]
_MAX_LINES = 20
_BAR_WIDTH = 40


@app.command("convert")
def convert(
    source: _SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where to write the rows, one a line.")],
    mapping: MapOption = None,
    split: SplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over OUT if it exists.")] = False,
    drop_bad: Annotated[bool, typer.Option("--drop-bad", help="Leave bad rows out, and say which.")] = False,
) -> None:
    """Write the rows of SOURCE as JSON lines that can be trained on and uploaded."""
    from training.formats import read_rows, write_dataset

    found = read_rows(source, read_options(mapping, split, subset, encoding))
    _say(_summary(found.as_dataset() if not drop_bad or not found.rows else found.good_rows()))
    num_rows = write_dataset(found.rows, out, overwrite=force)
    for problem in found.problems[:_MAX_LINES]:
        _say(f"left out: {problem}")
    if len(found.problems) > _MAX_LINES:
        _say(f"... and {len(found.problems) - _MAX_LINES} more problems")
    console.print(f"{num_rows} {found.rows[0].row.kind} rows written to {out}", markup=False)


@app.command("show")
def show(
    source: _SourceArgument,
    rows: Annotated[int, typer.Option("--rows", min=1, max=1000, help="How many rows.")] = 3,
    mapping: MapOption = None,
    split: SplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Render rows with the base model's chat template, and show which tokens carry loss."""
    from training.formats import read_rows
    from training.rendering import render_row, token_rows

    dataset = read_rows(source, read_options(mapping, split, subset, encoding)).as_dataset()
    tokenizer = _load_tokenizer(load_core(home, base=base))
    _say(_summary(dataset))
    shown = [
        (numbered.line, tokens)
        for numbered in dataset.rows[:rows]
        for result in render_row(tokenizer, numbered.row)
        for tokens in token_rows(result)
    ]
    if json:
        print_json([_as_document(line, tokens, tokenizer) for line, tokens in shown])
        return
    for line, tokens in shown:
        num_loss = sum(tokens.loss_mask)
        console.print(f"line {line}: {len(tokens.input_ids)} tokens, {num_loss} of them carry loss", style="bold")
        _print_tokens(tokens, tokenizer)


@app.command("check")
@with_settings(TrainSettings)
def check(
    source: _SourceArgument,
    flags: dict[str, Any],
    validation: Annotated[str | None, typer.Option("--validation", help="Validation data, as SOURCE.")] = None,
    mapping: MapOption = None,
    split: SplitOption = None,
    validation_split: ValidationSplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Look at training data as a run with these settings would: errors, warnings, figures. Trains nothing."""
    from training.formats import read_rows

    core = load_core(home, base=base, device=device)
    settings = TrainSettings.load(core.home, **flags)
    found = [read_rows(source, read_options(mapping, split, subset, encoding))]
    if validation is not None:
        found.append(read_rows(validation, read_options(mapping, validation_split, subset, encoding)))
    report, estimate = _inspect(found, core, settings)
    problems = [problem for data in found for problem in data.problems]
    problems += [problem for data in (report.sets if report else ()) for problem in data.problems]
    if json:
        warnings = report.warnings if report else []
        print_json({"problems": problems, "warnings": warnings, "report": report, "estimate": estimate})
    else:
        _print_report(report, problems)
        _print_estimate(estimate)
    if problems:
        raise typer.Exit(1)


def _inspect(
    found: list[ReadRows], core: CoreSettings, settings: TrainSettings
) -> tuple[Preflight | None, Estimate | None]:
    """What the rows that could be read look like, and what training on them takes; None without rows."""
    from adapters.base_files import pull_base
    from training.estimate import estimate_run
    from training.preflight import inspect_data

    if not found[0].rows:
        return None, None
    train, *rest = [data.good_rows() for data in found if data.rows]
    report = inspect_data(train, rest[0] if rest else None, tokenizer=_load_tokenizer(core), settings=settings)
    if report.train.tokens is None or train.kind not in ("chat", "text"):
        return report, None
    folder = pull_base(core.base, core.home)
    return report, estimate_run(report.train.tokens, len(train.rows), folder, core=core, settings=settings)


def _load_tokenizer(core: CoreSettings) -> Any:
    from adapters.base_files import pull_base
    from adapters.base_model import load_tokenizer

    return load_tokenizer(pull_base(core.base, core.home))


def _say(text: str) -> None:
    error_console.print(text, markup=False, soft_wrap=True)


def _summary(dataset: Dataset) -> str:
    return f"{dataset.name}: {len(dataset.rows)} rows; {dataset.recognised}"


def _spans(row: RenderedRow, tokenizer: Any) -> Iterator[tuple[bool, str]]:
    """The row's text, cut where the loss begins and ends."""
    pairs = zip(row.loss_mask, row.input_ids, strict=True)
    for carries_loss, span in groupby(pairs, key=lambda pair: pair[0]):
        yield carries_loss, tokenizer.decode([token for _, token in span])


def _print_tokens(row: RenderedRow, tokenizer: Any) -> None:
    """Tokens with loss in green; where there are no colours, between marks."""
    from rich.text import Text

    text = Text()
    for carries_loss, span in _spans(row, tokenizer):
        if console.is_terminal and not console.no_color:
            text.append(span, style="bold green" if carries_loss else "dim")
        else:
            text.append(f"⟦{span}⟧" if carries_loss else span)
    console.print(text, soft_wrap=True)


def _as_document(line: int, row: RenderedRow, tokenizer: Any) -> dict[str, Any]:
    spans = [{"loss": carries_loss, "text": text} for carries_loss, text in _spans(row, tokenizer)]
    return {"line": line, "input_ids": row.input_ids, "loss_mask": row.loss_mask, "spans": spans}


def _print_report(report: Preflight | None, problems: list[str]) -> None:
    warnings = report.warnings if report else ()
    for found in report.sets if report else ():
        _print_set(found)
    for warning in warnings:
        console.print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)
    for problem in problems[:_MAX_LINES]:
        console.print(f"[red]error[/red]: {escape(problem)}", soft_wrap=True)
    if len(problems) > _MAX_LINES:
        console.print(f"... and {len(problems) - _MAX_LINES} more errors")
    console.print(f"errors: {len(problems)}, warnings: {len(warnings)}")
    if problems:
        advice = "Mend the rows, or leave the bad ones out: hotswap data convert SOURCE OUT.jsonl --drop-bad"
        console.print(advice, soft_wrap=True)


def _print_estimate(estimate: Estimate | None) -> None:
    if estimate is None:
        return
    low, high = (format_seconds(seconds) for seconds in (estimate.seconds_low, estimate.seconds_high))
    memory = format_bytes(estimate.memory_bytes)
    console.print(
        f"estimate for this machine, idle: {estimate.num_steps} steps in {low} to {high}, about {memory} of memory",
        soft_wrap=True,
    )


def _print_set(found: SetReport) -> None:
    console.print(f"{found.name}: {found.num_rows} {found.kind} rows; {found.recognised}", soft_wrap=True, markup=False)
    tokens = found.tokens
    if tokens is None:
        return
    console.print(f"  tokens: {tokens.total}, {tokens.loss_share:.1%} of them carry loss")
    spread = f"half of the rows have at most {tokens.median}, 95% at most {tokens.p95}"
    console.print(f"  tokens a row: {tokens.shortest} to {tokens.longest}; {spread}")
    console.print(f"  beginning-of-sequence tokens: {_list_counts(tokens.starts)}")
    console.print(f"  ends of turns that are learned: {_list_counts(tokens.ends)}")
    most = max(count for _, _, count in tokens.histogram)
    width = len(str(tokens.histogram[-1][1]))
    for first, last, count in tokens.histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        console.print(f"  {first:>{width}} to {last:>{width}} tokens {count:>6} {bar}")


def _list_counts(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{number} in each of {rows} rows" for number, rows in counts.items())
