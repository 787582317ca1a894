"""`hotswap adapters`: versions and aliases. Works on the home folder; a running server follows within a request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import NotFoundError
from clients.cli.options import BaseOption, HomeOption, JsonOption, load_core, open_registry
from clients.cli.output import console, format_bytes, format_loss, make_table, print_gate, print_json

if TYPE_CHECKING:
    from adapters.registry import Registry

__all__ = ["app"]

app = typer.Typer(help="Adapters: list, show, promote, roll back, import, export, remove.", no_args_is_help=True)
_AliasArgument = Annotated[str, typer.Argument(help="An alias, for example legal.")]
_NameArgument = Annotated[str, typer.Argument(help="An alias (legal) or a version (legal@v1).")]


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
    rows = []
    for alias in aliases:
        version = alias.current.version
        metrics = version.metrics
        rows.append(
            (
                alias.name,
                f"v{alias.current.number} of {alias.num_versions}",
                version.rank,
                format_bytes(version.size_bytes),
                format_loss(metrics.get("validation_loss_before")),
                format_loss(metrics.get("validation_loss_after")),
                alias.experiment_id,
                version.digest[:12],
            )
        )
    columns = ["alias", "version", "rank", "size", "loss before", "loss after", "experiment", "digest"]
    console.print(make_table(columns, rows))


@app.command("show")
def show(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Show a version's manifest, and the alias's versions and history."""
    registry = open_registry(home)
    found = registry.find(name)
    live = _live_number(registry, found.alias)
    manifest = registry.store.verify(found.version.digest)
    history = registry.history(found.alias)
    versions = registry.versions(found.alias)
    if json:
        document = {"version": found, "live": live, "manifest": manifest.model_dump()}
        print_json(document | {"versions": versions, "history": history})
        return
    rows: list[tuple[str, Any]] = [
        ("digest", found.version.digest),
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
    console.print(make_table(["", found.label], rows))
    if manifest.gate is not None:
        print_gate(manifest.gate)
    numbers = [f"v{v.number}{' (live)' if v.number == live else ''}" for v in versions]
    console.print(f"versions: {', '.join(numbers)}")
    for change in history:
        source = f"v{change.from_number} -> " if change.from_number else ""
        console.print(f"  {change.changed_at:%Y-%m-%d %H:%M:%S} {change.action} {source}v{change.to_number}")


@app.command("promote")
def promote(
    version: Annotated[str, typer.Argument(help="The version to point to, for example legal@v2.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Point an alias to one of its versions; new requests get it at once."""
    alias = open_registry(home).promote(version)
    _print_alias(alias.name, alias.current.label, alias, as_json=json)


@app.command("rollback")
def rollback(alias: _AliasArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Point an alias back to where it was before its last publish or promote."""
    moved = open_registry(home).rollback(alias)
    _print_alias(alias, moved.current.label, moved, as_json=json)


@app.command("import")
def import_adapter(
    folder: Annotated[Path, typer.Argument(help="A LoRA adapter in PEFT's layout.")],
    alias: Annotated[str, typer.Option("--alias", help="Name to publish under.")],
    promote: Annotated[bool, typer.Option(help="Let the alias point to it.")] = True,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Check a LoRA adapter made elsewhere and publish it.

    Where the folder has a Hotswap manifest, its base model must be the configured one. A folder without is taken to be
    made for the configured base model: shapes are checked, its origin can't be.
    """
    from adapters.imports import import_folder

    core = load_core(home, base=base)
    published, is_live = import_folder(folder, alias, core=core, registry=open_registry(home), promote=promote)
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


@app.command("remove")
def remove(
    name: _NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a version (legal@v1), or an alias with all its versions (legal)."""
    registry = open_registry(home)
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


def _print_alias(name: str, label: str, document: object, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        console.print(f"{name} answers with {label} now")
