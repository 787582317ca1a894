"""`hotswap keys`: API keys for the server. Works on the home folder; a running server follows within a request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, error_console, format_moment, print_json, print_table

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
    from adapters.keys import KeyService, parse_duration, parse_scope
    from adapters.records import BASE_MODEL_NAME, KeyLimits

    registry = open_registry(home)
    key, secret = KeyService(registry.database).create(
        name,
        scopes=[parse_scope(item) for item in scope or ["chat"]],
        aliases=alias or None,  # Typer gives an empty list for a flag that was not given
        expires_in=None if expires is None else parse_duration(expires),
        limits=KeyLimits(requests_per_minute, tokens_per_minute, max_concurrent),
    )
    known = {BASE_MODEL_NAME, *(alias.name for alias in registry.aliases())}
    if absent := [name for name in key.aliases or () if name not in known]:
        error_console.print(
            f"there is no adapter {', '.join(absent)} yet: the key may use it once it is published. A name that is "
            f"mistyped is best mended by another key: hotswap keys revoke {key.id}",
            markup=False,
            soft_wrap=True,
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

    rows = [
        (key.id, escape(key.name), _describe(key), _state(key), key.last_used_at and format_moment(key.last_used_at))
        for key in keys
    ]
    print_table(["id", "name", "may", "valid", "last used"], rows, whole=["id", "valid", "last used"])


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
    if key.expires_at is None:
        return "always"
    return f"until {format_moment(key.expires_at)}" if key.is_valid(datetime.now(UTC)) else "expired"
