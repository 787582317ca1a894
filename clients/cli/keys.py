"""`hotswap keys`: API keys for the server. Works on the home folder; a running server follows within a request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, error_console, make_table, print_json

if TYPE_CHECKING:
    from adapters.keys import KeyService
    from adapters.records import ApiKey

__all__ = ["app"]

app = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for; for people.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="chat, feedback, train, adapters, experiments or admin; may be repeated.", show_default="chat"
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="An alias that it may use, or base; may be repeated.", show_default="all"),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="90m, 12h, 30d or 8w.", show_default="never")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens a minute, prompts and answers.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Most requests at once.")] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print its secret, this once: KEY=$(hotswap keys create web --scope chat)."""
    from adapters.keys import parse_duration, parse_scope
    from adapters.records import KeyLimits

    key, secret = _open(home).create(
        name,
        scopes=[parse_scope(item) for item in scope or ["chat"]],
        aliases=alias or None,  # Typer gives an empty list for a flag that was not given
        expires_in=None if expires is None else parse_duration(expires),
        limits=KeyLimits(requests_per_minute, tokens_per_minute, max_concurrent),
    )
    if json:
        print_json({"key": key, "secret": secret})
        return
    error_console.print(
        f"{key.id} ({key.name}): {_describe(key)}. Its secret is kept nowhere, so keep it now:", markup=False
    )
    console.print(secret, markup=False, soft_wrap=True)


@app.command("list")
def list_keys(home: HomeOption = None, json: JsonOption = False) -> None:
    """List all keys, the expired and the revoked too; never their secrets."""
    keys = _open(home).list()
    if json:
        print_json(keys)
        return
    if not keys:
        console.print("no keys yet: the server answers this machine alone; make one with: hotswap keys create NAME")
        return
    from rich.markup import escape

    columns = ["id", "name", "state", "may", "created", "expires", "last used"]
    moments = [(key.created_at, key.expires_at, key.last_used_at) for key in keys]
    rows = [
        (
            key.id,
            escape(key.name),
            _state(key),
            _describe(key),
            *[moment and f"{moment:%Y-%m-%d %H:%M}" for moment in times],
        )
        for key, times in zip(keys, moments, strict=True)
    ]
    console.print(make_table(columns, rows))


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, for example key-1f2e3d4c5b6a.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """End a key for good, from the next request on."""
    key = _open(home).revoke(key_id)
    if json:
        print_json(key)
    else:
        console.print(f"{key.id} ({key.name}) is revoked", markup=False)


def _open(home: Path | None) -> KeyService:
    from adapters.keys import KeyService

    return KeyService(open_registry(home).database)


def _describe(key: ApiKey) -> str:
    parts = [", ".join(key.scopes)]
    if key.aliases is not None:
        parts.append(f"on {', '.join(key.aliases)}")
    limits = key.limits
    for value, unit in (
        (limits.requests_per_minute, "requests a minute"),
        (limits.tokens_per_minute, "tokens a minute"),
        (limits.max_concurrent, "at once"),
    ):
        if value is not None:
            parts.append(f"{value} {unit}")
    return "; ".join(parts)


def _state(key: ApiKey) -> str:
    from datetime import UTC, datetime

    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.is_valid(datetime.now(UTC)) else "expired"
