"""`hotswap data`: convert, show and check training data before anything is trained on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from adapters.errors import DataError
from adapters.methods import METHOD_OF_KIND, ROW_KINDS, Method
from clients.cli.options import (
    BaseOption,
    DeviceOption,
    EncodingOption,
    HomeOption,
    JsonOption,
    MapOption,
    RolesOption,
    SplitOption,
    SubsetOption,
    ValidationSplitOption,
    load_core,
    read_options,
    reading_flags,
)
from clients.cli.output import console, error_console, format_bytes, format_seconds, print_json
from clients.cli.settings_flags import with_settings
from training.config import TrainSettings

if TYPE_CHECKING:
    from adapters.chat_rows import RowKind
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
_BY_ROWS = "by the rows"


@app.command("convert")
def convert(
    source: _SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where to write the rows, one a line.")],
    mapping: MapOption = None,
    roles: RolesOption = None,
    split: SplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over OUT if it exists.")] = False,
    drop_bad: Annotated[
        bool,
        typer.Option(
            "--drop-bad", help="Leave out rows that can't be read, or not be trained on (too long), and say which."
        ),
    ] = False,
    method: Annotated[
        str | None, typer.Option("--method", help="With --drop-bad: which method's needs count.", show_default=_BY_ROWS)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="With --drop-bad: longest row in tokens.", show_default="1024")
    ] = None,
    home: HomeOption = None,
    base: BaseOption = None,
) -> None:
    """Write the rows of SOURCE as JSON lines that can be trained on and uploaded."""
    from training.formats import read_rows, write_dataset

    found = read_rows(source, read_options(mapping, split, subset, encoding, roles))
    if not drop_bad or not found.rows:
        data = found.as_dataset()
        _say(_summary(data))
    else:
        _say(_summary(found.good_rows()))
        flags = {"method": method, "max_length": max_length}
        data = _drop_unfit(found, load_core(home, base=base), {k: v for k, v in flags.items() if v is not None})
    num_rows = write_dataset(data.rows, out, overwrite=force)
    console.print(f"{num_rows} {data.kind} rows written to {out}", markup=False)


def _drop_unfit(found: ReadRows, core: CoreSettings, flags: Mapping[str, Any]) -> Dataset:
    """The rows that a run with these flags would take; says which are left out, and how many."""
    from training.preflight import find_unfit_rows

    data = found.good_rows()
    settings, _ = _choose_settings(data.kind, core.home, flags)
    unfit = find_unfit_rows(data, tokenizer=_load_tokenizer(core), settings=settings)
    problems = [*found.problems, *(f"{data.name}:{line}: {problem}" for line, problem in unfit)]
    for problem in problems[:_MAX_LINES]:
        _say(f"left out: {problem}")
    if len(problems) > _MAX_LINES:
        _say(f"... and {len(problems) - _MAX_LINES} more problems")
    lines = {line for line, _ in unfit}
    kept = tuple(numbered for numbered in data.rows if numbered.line not in lines)
    if problems:
        _say(f"rows left out: {found.num_bad + len(data.rows) - len(kept)}, kept: {len(kept)}")
    if not kept:
        raise DataError([f"{data.name}: no row is left to be written"])
    return replace(data, rows=kept)


def _choose_settings(kind: RowKind | None, home: Path, flags: Mapping[str, Any]) -> tuple[TrainSettings, bool]:
    """A run's settings, and whether its method is only the usual one for such rows: nobody has named one."""
    if kind is None or "method" in flags or "method" in TrainSettings.load(home).model_fields_set:
        return TrainSettings.load(home, **flags), False
    return TrainSettings.load(home, **flags, method=METHOD_OF_KIND[kind]), True


@app.command("show")
def show(
    source: _SourceArgument,
    rows: Annotated[int, typer.Option("--rows", min=1, max=1000, help="How many rows.")] = 3,
    mapping: MapOption = None,
    roles: RolesOption = None,
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

    options = read_options(mapping, split, subset, encoding, roles)
    found = read_rows(source, options)
    dataset = found.good_rows() if found.rows else found.as_dataset()
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
    else:
        _print_rows(shown, tokenizer)
    if found.num_bad:
        command = shlex.join(["hotswap", "data", "check", source, *reading_flags(options)])
        _say(f"rows that can't be read: {found.num_bad}; what is wrong with them: {command}")


def _print_rows(rows: Sequence[tuple[int, RenderedRow]], tokenizer: Any) -> None:
    for line, tokens in rows:
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
    roles: RolesOption = None,
    split: SplitOption = None,
    validation_split: ValidationSplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Look at training data as a run with these settings would: errors, warnings, figures. Trains nothing.

    Without --method, by the method that is usual for such rows.
    """
    from training.formats import read_rows

    core = load_core(home, base=base, device=device)
    found = [read_rows(source, read_options(mapping, split, subset, encoding, roles))]
    if validation is not None:
        found.append(read_rows(validation, read_options(mapping, validation_split, subset, encoding, roles)))
    settings, is_usual = _choose_settings(found[0].kind, core.home, flags)
    report, estimate = _inspect(found, core, settings)
    problems = [problem for data in found for problem in data.problems]
    problems += [problem for data in (report.sets if report else ()) for problem in data.problems]
    if json:
        warnings = report.warnings if report else []
        print_json(
            {
                "method": settings.method,
                "problems": problems,
                "warnings": warnings,
                "report": report,
                "estimate": estimate,
            }
        )
    else:
        if is_usual:
            _print_method(settings.method)
        _print_report(report, problems)
        unfit = [data.name for data in found if data.problems and data.rows]
        if unfit := [*unfit, *(data.name for data in (report.unfit_sets if report else ()))]:
            given = {
                "map": ",".join(mapping or ()),
                "roles": ",".join(roles or ()),
                "split": split,
                "subset": subset,
                "encoding": encoding,
            }
            given |= {name: flags.get(name) for name in ("method", "max_length")}
            _print_advice(unfit, given)
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
    if report.train.tokens is None or train.kind not in ROW_KINDS[settings.method]:
        return report, None
    folder = pull_base(core.base, core.home)
    return report, estimate_run(report.train.tokens, report.train.num_fit_rows, folder, core=core, settings=settings)


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


def _print_method(method: Method) -> None:
    others = [name for name, kinds in ROW_KINDS.items() if name != method and set(kinds) & set(ROW_KINDS[method])]
    more = f"; --method {' or '.join(others)} takes such rows, too" if others else ""
    console.print(f"method: {method}, the usual one for such rows{more}", soft_wrap=True)


def _print_advice(names: list[str], given: Mapping[str, Any]) -> None:
    """How to be rid of rows that can't be used: a command with the options that were given here."""
    console.print("Mend the rows, give a higher --max-length where they are too long, or leave them out:")
    options = [part for name, value in given.items() if value for part in (f"--{name.replace('_', '-')}", str(value))]
    for name in dict.fromkeys(names):
        command = ["hotswap", "data", "convert", name, "OUT.jsonl", "--drop-bad", *options]
        console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)


def _print_estimate(estimate: Estimate | None) -> None:
    if estimate is None:
        return
    what = f"{estimate.num_steps} steps"
    if estimate.not_estimated is None:
        low, high = (format_seconds(seconds or 0) for seconds in (estimate.seconds_low, estimate.seconds_high))
        least, most = (format_bytes(size or 0) for size in (estimate.memory_bytes_low, estimate.memory_bytes_high))
        what += f" in {low} to {high}, {least} to {most} of memory"
    else:
        what += f"; time and memory are not estimated: {estimate.not_estimated}"
    console.print(f"estimate for this machine, idle: {what}", soft_wrap=True)


def _print_set(found: SetReport) -> None:
    console.print(f"{found.name}: {found.num_rows} {found.kind} rows; {found.recognised}", soft_wrap=True, markup=False)
    tokens = found.tokens
    if tokens is None:
        return
    if found.num_fit_rows < found.num_rows:
        console.print(f"  figures without rows that a run refuses ({found.num_rows - found.num_fit_rows}):")
    console.print(f"  tokens: {tokens.total}, {tokens.loss_share:.1%} of them carry loss")
    spread = f"half of the rows have at most {tokens.median}, 95% at most {tokens.p95}"
    console.print(f"  tokens a row: {tokens.shortest} to {tokens.longest}; {spread}")
    console.print(f"  ends of turns that are learned: {_list_counts(tokens.ends)}")
    most = max(count for _, _, count in tokens.histogram)
    width = len(str(tokens.histogram[-1][1]))
    for first, last, count in tokens.histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        console.print(f"  {first:>{width}} to {last:>{width}} tokens {count:>6} {bar}")


def _list_counts(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{number} in each of {rows} rows" for number, rows in counts.items())
