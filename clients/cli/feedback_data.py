"""`hotswap data from-feedback`: rated answers of kept conversations as rows of training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from clients.cli.options import BaseOption, HomeOption, load_core, open_registry
from clients.cli.output import console

if TYPE_CHECKING:
    from adapters.conversations import ConversationLog
    from adapters.settings import CoreSettings
    from training.feedback_rows import FeedbackRows

__all__ = ["from_feedback"]


def from_feedback(
    alias: Annotated[str, typer.Argument(help="Whose answers: an alias, or base.")],
    metric: Annotated[str, typer.Option("--metric", help="The metric of the feedback that says what is good.")],
    output: Annotated[Path, typer.Option("--output", metavar="ROWS.jsonl", help="Where to write the rows.")],
    kind: Annotated[
        Literal["chat", "preference"],
        typer.Option(help="chat: good answers, for sft; preference: pairs of answers to one prompt, for dpo."),
    ] = "chat",
    threshold: Annotated[
        float | None, typer.Option(help="The value from which on an answer is good; of trues and falses it is true.")
    ] = None,
    direction: Annotated[
        Literal["increase", "decrease"], typer.Option(help="Whether higher values are better, or lower ones.")
    ] = "increase",
    edits: Annotated[
        str | None,
        typer.Option("--edits", metavar="METRIC", help="Feedback whose comment is the answer as it should have been."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file if it exists.")] = False,
    home: HomeOption = None,
    base: BaseOption = None,
) -> None:
    """Make training data of feedback: hotswap data from-feedback support --metric helpful --output rows.jsonl."""
    from adapters.conversations import ConversationLog
    from training.formats import write_documents

    log = ConversationLog(open_registry(home).database)
    rows = _collect(log, alias, metric, kind, threshold, direction == "increase", edits)
    if rows.documents:
        write_documents(rows.documents, output, overwrite=force, is_private=True)  # users wrote them
    for reason, count in rows.left_out.most_common():
        console.print(f"left out: {count}, {reason}", markup=False, soft_wrap=True)
    if not rows.documents:
        from adapters.errors import NotFoundError

        raise NotFoundError(f"no {kind} row came of the feedback {metric!r} on {alias!r}; nothing was written")
    console.print(f"{len(rows.documents)} {kind} rows written to {output}", markup=False, soft_wrap=True)
    _report(output, kind, load_core(home, base=base))


def _collect(
    log: ConversationLog,
    alias: str,
    metric: str,
    kind: str,
    threshold: float | None,
    higher_is_better: bool,
    edits: str | None,
) -> FeedbackRows:
    from adapters.errors import NotFoundError
    from training.feedback_rows import GoodValue, choose_threshold, edited_rows, good_rows, preference_rows

    rated = log.rated(alias, metric)
    edited = log.rated(alias, edits) if edits is not None else []
    if not rated and not edited:
        found = ", ".join(f"{name} ({count})" for name, count in log.metrics(alias).items()) or "none"
        raise NotFoundError(
            f"there is no feedback {metric!r} on kept conversations of {alias!r}; there is: {found}. Conversations are "
            "kept with hotswap serve --keep-conversations"
        )
    if kind == "preference":
        rows = preference_rows(rated, GoodValue(threshold, higher_is_better))
    else:
        rows = good_rows(rated, choose_threshold(rated, threshold, higher_is_better=higher_is_better))
    more = edited_rows(edited, as_preferences=kind == "preference")
    rows.documents += more.documents
    rows.left_out += more.left_out
    return rows


def _report(path: Path, kind: str, core: CoreSettings) -> None:
    """What the check before a run says of the rows: duplicates, personal data, lengths."""
    from adapters.base_files import pull_base
    from adapters.base_model import load_tokenizer
    from training.config import TrainSettings
    from training.formats import read_dataset
    from training.preflight import inspect_data

    method = "dpo" if kind == "preference" else "sft"
    report = inspect_data(
        read_dataset(path),
        None,
        tokenizer=load_tokenizer(pull_base(core.base, core.home)),
        settings=TrainSettings.load(core.home, method=method),
    )
    for problem in report.train.problems:
        console.print(f"[red]error[/red]: {escape(problem)}", soft_wrap=True)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)
    console.print(f"errors: {len(report.train.problems)}, warnings: {len(report.warnings)}")
