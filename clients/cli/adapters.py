"""`hotswap adapters`: versions and aliases. Works on the home folder; a running server follows within a request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import NotFoundError
from adapters.records import version_name
from clients.cli.options import BaseOption, HomeOption, JsonOption, load_core, open_registry
from clients.cli.output import console, format_bytes, format_loss, print_gate, print_json, print_table
from clients.cli.route import warn_unknown_to_router

if TYPE_CHECKING:
    from adapters.pins import PinService
    from adapters.registry import Registry

__all__ = ["app"]

app = typer.Typer(
    help="Adapters: list, show, promote, roll back, import, export, pin, unpin, remove.", no_args_is_help=True
)
_AliasArgument = Annotated[str, typer.Argument(help="An alias, for example legal.")]
_NameArgument = Annotated[str, typer.Argument(help="An alias (legal) or a version (legal@v1).")]
_VersionArgument = Annotated[str | None, typer.Argument(help="v1, if NAME is the alias alone.", show_default=False)]


@app.command("list")
def list_adapters(home: HomeOption = None, json: JsonOption = False) -> None:
    """List the aliases and what they point to."""
    registry = open_registry(home)
    aliases, unpromoted = registry.aliases(), registry.unpromoted()
    if json:
        print_json(aliases)
        return
    for name in unpromoted:
        label = registry.versions(name)[-1].label
        console.print(f"{name}: no version has been promoted; the newest is {label} (hotswap adapters promote {label})")
    if not aliases and unpromoted:
        return
    if not aliases:
        console.print("no adapters yet; make one with: hotswap train NAME --data FILE.jsonl")
        return
    rows = [
        (
            alias.current.label,
            alias.num_versions,
            alias.current.version.rank,
            format_bytes(alias.current.version.size_bytes),
            _format_losses(alias.current.version.metrics),
            alias.experiment_id,
        )
        for alias in aliases
    ]
    columns = ["adapter", "versions", "rank", "size", "loss", "experiment"]
    print_table(columns, rows, whole=["adapter", "experiment"])


@app.command("show")
def show(
    name: _NameArgument, version: _VersionArgument = None, home: HomeOption = None, json: JsonOption = False
) -> None:
    """Show a version's manifest, and the alias's versions and history."""
    registry = open_registry(home)
    found = registry.find(version_name(name, version))
    live = _live_number(registry, found.alias)
    manifest = registry.store.verify(found.version.digest)
    history = registry.history(found.alias)
    versions = registry.versions(found.alias)
    if json:
        document = {"version": found, "live": live, "manifest": manifest.model_dump()}
        print_json(document | {"versions": versions, "history": history})
        return
    rows: list[tuple[str, Any]] = [
        ("base model", f"{manifest.base.name} ({manifest.base.quantisation}), {manifest.base.fingerprint[:12]}"),
        ("source", manifest.source),
        ("kind", "reward model: it scores answers and writes none" if manifest.kind == "reward" else "chat"),
        *([("method", manifest.method)] if manifest.method else []),
        *([("gone on from", manifest.parent[:12])] if manifest.parent else []),
        ("rank, alpha", f"{manifest.rank}, {manifest.alpha:g}"),
        ("targets", ", ".join(manifest.target_modules)),
        ("size", format_bytes(found.version.size_bytes)),
        *[
            (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value)
            for name, value in manifest.metrics.items()
        ],
        ("gate", manifest.gate.reason if manifest.gate else None),
        ("files", "intact (every hash checked)"),
    ]
    print_table(["", found.label], rows)
    console.print(f"digest: {found.version.digest}", soft_wrap=True)
    if manifest.gate is not None:
        print_gate(manifest.gate)
    labels = [f"{v.label}{' (live)' if v.number == live else ''}" for v in versions]
    console.print(f"versions: {', '.join(labels)}", soft_wrap=True)
    for change in history:
        source = f"{change.alias}@v{change.from_number} -> " if change.from_number else ""
        moved = f"{change.action} {source}{change.alias}@v{change.to_number}"
        console.print(f"  {change.changed_at:%Y-%m-%d %H:%M:%S} {moved}", soft_wrap=True)


@app.command("promote")
def promote(
    name: Annotated[str, typer.Argument(help="The version to point to (legal@v2), or its alias with VERSION.")],
    version: _VersionArgument = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Point an alias to one of its versions; new requests get it at once."""
    registry = open_registry(home)
    alias = registry.promote(version_name(name, version))
    _print_alias(alias.name, alias.current.label, alias, as_json=json)
    if not json:
        warn_unknown_to_router(registry, alias.name)
    report = registry.gate_report(alias.current.label)
    if report is not None and report.verdict == "failed" and not json:
        console.print(f"{alias.current.label} was promoted all the same: {report.reason}", markup=False, soft_wrap=True)


@app.command("rollback")
def rollback(alias: _AliasArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Point an alias back to where it was before its last publish or promote."""
    moved = open_registry(home).rollback(alias)
    _print_alias(alias, moved.current.label, moved, as_json=json)


@app.command("import")
def import_adapter(
    source: Annotated[
        Path, typer.Argument(help="A LoRA adapter in PEFT's layout: a folder, or the archive of an export.")
    ],
    alias: Annotated[str, typer.Option("--alias", help="Name to publish under.")],
    promote: Annotated[bool, typer.Option(help="Let the alias point to it.")] = True,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Check a LoRA adapter made elsewhere and publish it.

    Where it has a Hotswap manifest, its base model must be the configured one. Without one it is taken to be made for
    the configured base model: shapes are checked, its origin can't be.
    """
    from adapters.imports import import_archive, import_folder

    core = load_core(home, base=base)
    import_it = import_archive if source.is_file() else import_folder
    published, is_live = import_it(source, alias, core=core, registry=open_registry(home), promote=promote)
    if json:
        print_json({"version": published, "is_live": is_live})
    else:
        console.print(f"imported as {published.label}" + ("" if is_live else "; the alias did not move"))


@app.command("export")
def export(
    name: _NameArgument,
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Copy a version to a new folder: PEFT's layout and the manifest."""
    from adapters.imports import export_version

    registry = open_registry(home)
    found = registry.find(name)
    export_version(registry, found, target)
    if json:
        print_json({"version": found, "folder": target})
    else:
        console.print(f"{found.label} is in {target}")


@app.command("pin")
def pin(
    name: _NameArgument, version: _VersionArgument = None, home: HomeOption = None, json: JsonOption = False
) -> None:
    """Keep a version in a slot, also after a restart; an alias's pin follows it. A running server does so at once."""
    from adapters.pins import PinService
    from server.config import ServeSettings

    core = load_core(home)
    settings = ServeSettings.load(core.home)
    pins = PinService(open_registry(home).database)
    pinned = version_name(name, version)
    pins.pin(pinned, max_versions=settings.slots - 1, always=settings.pinned)
    _print_pins(f"{pinned} is pinned", pins, as_json=json)


@app.command("unpin")
def unpin(
    name: _NameArgument, version: _VersionArgument = None, home: HomeOption = None, json: JsonOption = False
) -> None:
    """Undo a pin of just this name. What the setting serve.pinned names stays pinned."""
    from adapters.pins import PinService

    pins = PinService(open_registry(home).database)
    unpinned = version_name(name, version)
    pins.unpin(unpinned)
    _print_pins(f"{unpinned} is not pinned any more", pins, as_json=json)


@app.command("remove")
def remove(
    name: _NameArgument,
    version: _VersionArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a version (legal@v1), or an alias with all its versions (legal)."""
    registry, name = open_registry(home), version_name(name, version)
    if not yes:
        typer.confirm(f"Delete {name} and its files for good?", abort=True, err=True)
    removed = registry.remove(name)
    if json:
        print_json({"removed": removed})
    else:
        console.print(f"removed {', '.join(removed)}")


def _live_number(registry: Registry, alias: str) -> int | None:
    """Which version an alias points to; None while none has been promoted."""
    try:
        return registry.alias(alias).current.number
    except NotFoundError:
        return None


def _print_pins(text: str, pins: PinService, *, as_json: bool) -> None:
    names = sorted(pins.names())
    if as_json:
        print_json({"pinned": names})
    else:
        console.print(f"{text}; pinned: {', '.join(names) or 'none'}", soft_wrap=True)


def _format_losses(metrics: Mapping[str, Any]) -> str | None:
    before, after = metrics.get("validation_loss_before"), metrics.get("validation_loss_after")
    return None if after is None else f"{format_loss(before) or '?'} -> {format_loss(after)}"


def _print_alias(name: str, label: str, document: object, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        console.print(f"{name} answers with {label} now")
