"""What the command line prints: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from adapters.gate_report import GateReport
    from adapters.records import NumberedVersion

__all__ = [
    "console",
    "error_console",
    "format_bytes",
    "format_confidence",
    "format_loss",
    "format_moment",
    "format_seconds",
    "make_table",
    "print_gate",
    "print_json",
    "print_live",
    "print_table",
]

_CELL_EDGES = 3  # a space on either side, and the line in front

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output; records become objects, moments ISO 8601."""
    sys.stdout.write(json.dumps(document, default=_plain, indent=2, ensure_ascii=False) + "\n")


def make_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    whole: Collection[str] = (),
) -> Table:
    """A table with one column a name; cells are shown as text, None as a dash. The columns in `whole` never wrap."""
    table = Table(title=title, title_justify="left", header_style="bold")
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        words = [column] if column in whole else column.split()
        content = [row[number] for row in cells] if column in whole else []
        width = max(map(len, [*words, *content]), default=0)
        table.add_column(column, overflow="fold", no_wrap=column in whole, min_width=width)
    for row in cells:
        table.add_row(*row)
    return table


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    whole: Collection[str] = (),
) -> None:
    """Print a table for people, wider than the terminal if `whole` columns need it: ids are there to be copied."""
    table = make_table(columns, rows, title=title, whole=whole)
    least = sum((column.min_width or 0) + _CELL_EDGES for column in table.columns) + 1
    if least > console.width:  # rich would take as much from every column, and leave nothing of a narrow one
        table.width = least
    console.print(table, crop=False)


def format_moment(moment: datetime) -> str:
    """A moment in UTC, short: 11-21 17:50 in this year, otherwise the date."""
    return f"{moment:%m-%d %H:%M}" if moment.year == datetime.now(UTC).year else f"{moment:%Y-%m-%d}"


def format_bytes(count: float) -> str:
    """A size for people: 19.6 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def format_seconds(seconds: float) -> str:
    """A time for people: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_confidence(confidence: float) -> str:
    """A confidence for people, whose digits count where it is close to 1: 99.5 %."""
    return f"{confidence * 100:.4g} %"


def format_loss(loss: float | None) -> str | None:
    """A loss in nats a token to three digits."""
    return None if loss is None else f"{loss:.3f}"


def print_live(live: NumberedVersion) -> None:
    """Say that an alias stands for this version, and how to try it; an experiment may answer with others."""
    if live.version.kind == "reward":  # it judges answers and gives none
        told = f"{live.alias} stands for {live.label} now. Try: hotswap train --reward {live.alias} --method rloo ..."
    else:
        told = f'{live.alias} answers with {live.label} now. Try: hotswap chat {live.alias} "..."'
        told += " (with hotswap serve running)"
    console.print(told, markup=False, soft_wrap=True)


def print_gate(report: GateReport) -> None:
    """What the gate found, check by check, what usually mends it, and what all that amounts to."""
    cures = [f". What usually mends it: {check.cure}" if check.cure else "" for check in report.checks]
    rows = [
        (check.name, check.outcome, f"{check.sentence}{cure}") for check, cure in zip(report.checks, cures, strict=True)
    ]
    console.print(make_table(["check", "outcome", f"the gate: {report.verdict}"], rows))


def _plain(value: Any) -> Any:
    if hasattr(value, "verdict") and hasattr(value, "model_dump"):  # a gate's report
        return {"verdict": value.verdict, "reason": value.reason, **value.model_dump()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        document = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"label": value.label, **document} if hasattr(value, "label") else document
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
