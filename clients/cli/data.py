"""`hotswap data`: convert, show and check training data before anything is trained on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import DataError
from adapters.methods import METHOD_OF_KIND, ROW_KINDS, Method
from clients.cli.data_report import MAX_PROBLEMS_SHOWN, print_advice, print_estimate, print_method, print_report
from clients.cli.data_sources import check_share, summarise
from clients.cli.options import (
    BaseOption,
    DeviceOption,
    EncodingOption,
    HomeOption,
    JoinTurnsOption,
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
from clients.cli.output import console, error_console, print_json
from clients.cli.settings_flags import with_settings
from training.config import TrainSettings

if TYPE_CHECKING:
    from adapters.chat_rows import RowKind
    from adapters.chat_template import RenderedRow
    from adapters.row_places import RowPlace
    from adapters.settings import CoreSettings
    from training.estimate import Estimate
    from training.formats import Dataset, ReadRows
    from training.preflight import Preflight

__all__ = ["app"]

app = typer.Typer(help="Training data: convert any shape to rows, show their tokens, check them.", no_args_is_help=True)
_SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A file (JSONL, JSON, CSV, TSV, Parquet), a folder, or a hub id.")
]
_BY_ROWS = "by the rows"


@app.command("convert")
def convert(
    source: _SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where to write the rows, one a line.")],
    mapping: MapOption = None,
    roles: RolesOption = None,
    join_turns: JoinTurnsOption = False,
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
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out rows that equal an earlier one, and say which.")
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
    from training.formats import check_writable, read_rows, write_dataset

    check_writable(out, overwrite=force)  # told before minutes are spent on reading
    found = read_rows(source, read_options(mapping, split, subset, encoding, roles, join_turns=join_turns))
    if not drop_bad or not found.rows:
        data = _all_good(found)
        _say(summarise(data))
    else:
        _say(summarise(found.good_rows()))
        flags = {"method": method, "max_length": max_length}
        data = _drop_unfit(found, load_core(home, base=base), {k: v for k, v in flags.items() if v is not None})
    if drop_duplicates:
        data = _drop_duplicates(data)
    num_rows = write_dataset(data.rows, out, overwrite=force)
    console.print(f"{num_rows} {data.kind} rows written to {out}", markup=False)


def _all_good(found: ReadRows) -> Dataset:
    """The rows of a source that has no bad ones; of another the error says how to do without them.

    Raises:
        DataError: rows are bad.
    """
    try:
        return found.as_dataset()
    except DataError as error:
        if found.rows:
            error.add_note(
                f"mend these rows; --drop-bad leaves them out ({found.num_bad}), {len(found.rows)} can be read"
            )
        raise


def _drop_unfit(found: ReadRows, core: CoreSettings, flags: Mapping[str, Any]) -> Dataset:
    """The rows that a run with these flags would take; says which are left out, and how many."""
    from adapters.row_places import group_problems
    from training.preflight import find_unfit_rows

    data = found.good_rows()
    settings, _ = _choose_settings(data.kind, core.home, flags)
    unfit = find_unfit_rows(data, tokenizer=_load_tokenizer(core), settings=settings)
    problems = [*found.problems, *group_problems(unfit, data.name)]
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        _say(f"left out: {problem}")
    if len(problems) > MAX_PROBLEMS_SHOWN:
        _say(f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more problems")
    places = {problem.place for problem in unfit}
    kept = tuple(numbered for numbered in data.rows if numbered.place not in places)
    if problems:
        _say(f"rows left out: {found.num_bad + len(data.rows) - len(kept)}, kept: {len(kept)}")
    if not kept:
        raise DataError([f"{data.name}: no row is left to be written"])
    return replace(data, rows=kept)


def _drop_duplicates(data: Dataset) -> Dataset:
    """The rows without those that equal an earlier one; says which are left out, and how many."""
    from adapters.row_places import list_places
    from training.duplicates import find_repeated

    repeated = find_repeated([numbered.row for numbered in data.rows])
    if not repeated:
        return data
    _say(f"left out: {data.name}: {list_places(data.rows[index].place for index in repeated)}: equal an earlier row")
    dropped = set(repeated)
    kept = tuple(numbered for index, numbered in enumerate(data.rows) if index not in dropped)
    _say(f"duplicates left out: {len(repeated)}, kept: {len(kept)}")
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
    join_turns: JoinTurnsOption = False,
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

    options = read_options(mapping, split, subset, encoding, roles, join_turns=join_turns)
    found = read_rows(source, options)
    dataset = found.good_rows() if found.rows else found.as_dataset()
    tokenizer = _load_tokenizer(load_core(home, base=base))
    _say(summarise(dataset))
    shown = [
        (numbered.place, tokens)
        for numbered in dataset.rows[:rows]
        for result in render_row(tokenizer, numbered.row)
        for tokens in token_rows(result)
    ]
    if json:
        print_json([_as_document(place, tokens, tokenizer) for place, tokens in shown])
    else:
        _print_rows(shown, tokenizer)
    if found.num_bad:
        command = shlex.join(["hotswap", "data", "check", source, *reading_flags(options)])
        _say(f"rows that can't be read: {found.num_bad}; what is wrong with them: {command}")


def _print_rows(rows: Sequence[tuple[RowPlace, RenderedRow]], tokenizer: Any) -> None:
    for place, tokens in rows:
        counts = f"{len(tokens.input_ids)} tokens, {sum(tokens.loss_mask)} of them carry loss"
        console.print(f"{place.within('')}: {counts}", style="bold", markup=False, soft_wrap=True)
        _print_tokens(tokens, tokenizer)


@app.command("check")
@with_settings(TrainSettings)
def check(
    source: _SourceArgument,
    flags: dict[str, Any],
    validation: Annotated[str | None, typer.Option("--validation", help="Validation data, as SOURCE.")] = None,
    mapping: MapOption = None,
    roles: RolesOption = None,
    join_turns: JoinTurnsOption = False,
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
    check_share(source, validation, flags.get("validation_share"))
    options = read_options(mapping, split, subset, encoding, roles, join_turns=join_turns)
    found = [read_rows(source, options)]
    if validation is not None:
        found.append(read_rows(validation, replace(options, split=validation_split)))
    settings, is_usual = _choose_settings(found[0].kind, core.home, flags)
    report, estimate = _inspect(found, core, settings)
    problems = [problem for data in found for problem in data.problems]
    problems += [problem for data in (report.sets if report else ()) for problem in data.problems]
    if json:
        _print_document(settings.method, problems, report, estimate)
    else:
        if is_usual:
            print_method(settings.method)
        print_report(report, problems)
        if unfit := _find_unfit_sources(found, report):
            own = {f"--{name.replace('_', '-')}": flags.get(name) for name in ("method", "max_length")}
            given = [part for name, value in own.items() if value for part in (name, str(value))]
            print_advice(unfit, [*reading_flags(options), *given])
        print_estimate(estimate)
    if problems:
        raise typer.Exit(1)


def _print_document(method: Method, problems: list[str], report: Preflight | None, estimate: Estimate | None) -> None:
    warnings = report.warnings if report else []
    found = {"problems": problems, "warnings": warnings, "report": report, "estimate": estimate}
    print_json({"method": method, **found})


def _find_unfit_sources(found: Sequence[ReadRows], report: Preflight | None) -> list[str]:
    """Names of sources with rows that can't be used, and with others beside them."""
    unread = [data.name for data in found if data.problems and data.rows]
    if len(found) == 1:  # rows that are held out are of the one source, too
        return [found[0].name] if unread or (report and report.unfit_sets) else []
    return [*unread, *(data.name for data in (report.unfit_sets if report else ()))]


def _inspect(
    found: list[ReadRows], core: CoreSettings, settings: TrainSettings
) -> tuple[Preflight | None, Estimate | None]:
    """What the rows that could be read look like, and what training on them takes; None without rows."""
    from adapters.base_files import pull_base
    from training.estimate import estimate_run
    from training.preflight import inspect_data

    if not found[0].rows:
        return None, None
    train, validation = _divide([data.good_rows() for data in found if data.rows], settings.validation_share)
    report = inspect_data(train, validation, tokenizer=_load_tokenizer(core), settings=settings)
    if report.train.tokens is None or train.kind not in ROW_KINDS[settings.method]:
        return report, None
    folder = pull_base(core.base, core.home)
    return report, estimate_run(report.train.tokens, report.train.num_fit_rows, folder, core=core, settings=settings)


def _divide(sets: Sequence[Dataset], share: float | None) -> tuple[Dataset, Dataset | None]:
    """The rows of a run by their use; of one source as `validation_share` has it, which is said."""
    from training.held_out import choose_validation

    division = choose_validation(sets[0], sets[1] if len(sets) > 1 else None, share)
    if len(sets) == 1 and share is not None:
        _say(f"{sets[0].name}: {division.counts} are held out for validation")
    if division.warning and (len(sets) > 1 or share is not None):
        _say(f"warning: {division.warning}")
    return division.train, division.validation


def _load_tokenizer(core: CoreSettings) -> Any:
    from adapters.base_files import pull_base
    from adapters.base_model import load_tokenizer

    return load_tokenizer(pull_base(core.base, core.home))


def _say(text: str) -> None:
    error_console.print(text, markup=False, soft_wrap=True)


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


def _as_document(place: RowPlace, row: RenderedRow, tokenizer: Any) -> dict[str, Any]:
    where = {place.unit: place.number, **({"file": place.file} if place.file else {})}
    spans = [{"loss": carries_loss, "text": text} for carries_loss, text in _spans(row, tokenizer)]
    return {**where, "input_ids": row.input_ids, "loss_mask": row.loss_mask, "spans": spans}
