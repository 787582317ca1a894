"""What `hotswap data check` shows of a run's data: figures, warnings, errors, and what a run would take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from adapters.methods import ROW_KINDS, Method
from clients.cli.output import console, format_bytes, format_seconds

if TYPE_CHECKING:
    from training.estimate import Estimate
    from training.preflight import Preflight, SetReport

__all__ = ["MAX_PROBLEMS_SHOWN", "print_advice", "print_estimate", "print_method", "print_report"]

MAX_PROBLEMS_SHOWN = 20
_BAR_WIDTH = 40


def print_report(report: Preflight | None, problems: Sequence[str]) -> None:
    """Figures of each set, then all warnings, then the first errors and how many there are."""
    warnings = report.warnings if report else ()
    for found in report.sets if report else ():
        _print_set(found)
    for warning in warnings:
        console.print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        console.print(f"[red]error[/red]: {escape(problem)}", soft_wrap=True)
    if len(problems) > MAX_PROBLEMS_SHOWN:
        console.print(f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more errors")
    console.print(f"errors: {len(problems)}, warnings: {len(warnings)}")


def print_method(method: Method) -> None:
    """Which method was chosen by the rows, and which others take such rows."""
    others = [name for name, kinds in ROW_KINDS.items() if name != method and set(kinds) & set(ROW_KINDS[method])]
    more = f"; --method {' or '.join(others)} takes such rows, too" if others else ""
    console.print(f"method: {method}, the usual one for such rows{more}", soft_wrap=True)


def print_advice(names: Sequence[str], options: Sequence[str]) -> None:
    """How to be rid of rows that can't be used: a command a source, with the options that were given for it."""
    console.print(
        "Mend the rows as the errors say, give a higher --max-length where they are too long, or leave them out:",
        soft_wrap=True,
    )
    for name in dict.fromkeys(names):
        command = ["hotswap", "data", "convert", name, "OUT.jsonl", "--drop-bad", *options]
        console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)


def print_estimate(estimate: Estimate | None) -> None:
    """How long training takes here, and how much memory."""
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
        num_refused = found.num_rows - found.num_fit_rows
        console.print(f"  figures without rows that a run refuses ({num_refused}):", soft_wrap=True)
    spread = f"half of the rows have at most {tokens.median}, 95% at most {tokens.p95}"
    for figure in (
        f"tokens: {tokens.total}, {tokens.loss_share:.1%} of them carry loss",
        f"tokens a row: {tokens.shortest} to {tokens.longest}; {spread}",
        f"ends of turns that are learned: {_list_counts(tokens.ends)}",
    ):
        console.print(f"  {figure}", soft_wrap=True)
    if len(tokens.histogram) > 1:  # one bar says no more than the line above
        _print_histogram(tokens.histogram)


def _print_histogram(histogram: Sequence[tuple[int, int, int]]) -> None:
    most = max(count for _, _, count in histogram)
    width = len(str(histogram[-1][1]))
    for first, last, count in histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        console.print(f"  {first:>{width}} to {last:>{width}} tokens {count:>6} {bar}")


def _list_counts(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{number} in each of {rows} rows" for number, rows in counts.items())
