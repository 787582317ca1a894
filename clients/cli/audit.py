"""`hotswap audit`: who promoted, rolled back, removed, imported, split or made keys, and when."""

from __future__ import annotations

import json as json_text
from typing import Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, print_json

__all__ = ["audit"]


def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the latest acts.")] = 50,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the latest administrative acts, newest first: when (UTC), who, what, to what, details, HTTP request."""
    from adapters.audit import AuditLog

    entries = AuditLog(open_registry(home).database).list(limit=limit)
    if json:
        print_json(entries)
        return
    for entry in entries:
        detail = json_text.dumps(entry.detail, ensure_ascii=False) if entry.detail else ""
        act = f"{entry.actor} {entry.action.replace('_', ' ')} {entry.subject} {detail} {entry.request_id or ''}"
        # A line an act: ids stay whole, however narrow the terminal is.
        line = f"{entry.acted_at:%Y-%m-%d %H:%M:%S}  {act.rstrip()}"
        console.print(line, markup=False, soft_wrap=True)
