"""`hotswap base`: the base models on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, load_core
from clients.cli.output import console, format_bytes, print_json, print_table

__all__ = ["app"]

app = typer.Typer(help="Base models: list them, fetch one.", no_args_is_help=True)


@app.command("list")
def list_bases(home: HomeOption = None, json: JsonOption = False) -> None:
    """List embedded and fetched base models."""
    from adapters.base_files import list_bases as find

    core = load_core(home)
    found = find(core.home)
    if json:
        print_json([{"name": name, "folder": folder, "fetched": folder is not None} for name, folder in found])
        return
    rows = []
    for name, folder in found:
        size = sum(path.stat().st_size for path in folder.iterdir()) if folder else None
        rows.append((name, "yes" if folder else "no", format_bytes(size) if size else None, folder))
    print_table(["name", "fetched", "size", "folder"], rows, whole=["name", "folder"])


@app.command("pull")
def pull(
    name: Annotated[str | None, typer.Argument(help="Embedded name or hub id; default: the configured base.")] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Fetch a base model into the home folder."""
    from adapters.base_files import compute_fingerprint, pull_base

    core = load_core(home, base=name)
    folder = pull_base(core.base, core.home)
    fingerprint = compute_fingerprint(folder, quantisation=core.quantisation)
    if json:
        print_json({"name": core.base, "folder": folder, "fingerprint": fingerprint})
    else:
        console.print(f"{core.base} is in {folder} (fingerprint {fingerprint[:12]}, {core.quantisation})")
