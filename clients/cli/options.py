"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adapters.registry import Registry
    from adapters.settings import CoreSettings

__all__ = ["BaseOption", "DeviceOption", "HomeOption", "JsonOption", "UrlOption", "load_core", "open_registry"]

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", envvar="HOTSWAP_HOME", help="Home folder.", show_default="~/.hotswap"),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        envvar="HOTSWAP_BASE",
        help="Base model: the embedded name, a local folder or a hub id.",
        show_default="smollm2-135m",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", envvar="HOTSWAP_DEVICE", help="auto, cpu, cuda or cuda:N.", show_default="auto"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
UrlOption = Annotated[str, typer.Option("--url", envvar="HOTSWAP_URL", help="Where the server listens.")]


def load_core(home: Path | None, *, base: str | None = None, device: str | None = None) -> CoreSettings:
    """Resolve the core settings: flag, environment, file, default."""
    from adapters.settings import CoreSettings, resolve_home

    return CoreSettings.load(resolve_home(home), base=base, device=device)


def open_registry(home: Path | None) -> Registry:
    """Open the registry of a home folder, creating it where needed."""
    from adapters.database import open_database
    from adapters.registry import Registry
    from adapters.store import ArtifactStore

    core = load_core(home)
    core.home.mkdir(parents=True, exist_ok=True)
    return Registry(open_database(core.resolved_database_url), ArtifactStore(core.home / "store"))
