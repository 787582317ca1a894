"""`hotswap audit`: who promoted, rolled back, removed, imported, split or made keys, and when."""

from __future__ import annotations

import json as json_text
from typing import Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, make_table, print_json

__all__ = ["audit"]


def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the latest acts.")] = 50,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the latest administrative acts, newest first."""
    from rich.markup import escape

    from adapters.audit import AuditLog

    entries = AuditLog(open_registry(home).database).list(limit=limit)
    if json:
        print_json(entries)
        return
    rows = [
        (
            f"{entry.acted_at:%Y-%m-%d %H:%M:%S}",
            entry.actor,
            entry.action.replace("_", " "),
            entry.subject,
            escape(json_text.dumps(entry.detail, ensure_ascii=False)),
            entry.request_id,
        )
        for entry in entries
    ]
    console.print(make_table(["time (UTC)", "who", "did", "to", "detail", "request"], rows))
