"""`hotswap serve`: says what it is about to serve, then serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, load_core, open_registry
from clients.cli.output import error_console

if TYPE_CHECKING:
    from adapters.settings import CoreSettings
    from server.config import ServeSettings

__all__ = ["serve"]

_MAX_ALIASES_SHOWN = 12


def serve(
    host: Annotated[str | None, typer.Option(help="127.0.0.1, 0.0.0.0 or ::.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port.", show_default="8000")] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters on the device at once.", show_default="8")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests computed at once.", show_default="32")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Prompt and answer together, in tokens.", show_default="2048")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default length of answers.", show_default="512")] = None,
    max_prefill_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens computed beside one decode step.", show_default="256")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests in flight before new ones get 429.", show_default="256")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", show_default="2000000")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
) -> None:
    """Serve the base model and every published adapter behind an OpenAI-compatible API."""
    core = load_core(home, base=base, device=device)
    from server.config import ServeSettings

    settings = ServeSettings.load(
        core.home,
        host=host,
        port=port,
        slots=slots,
        max_batch=max_batch,
        max_context=max_context,
        max_tokens=max_tokens,
        max_prefill_tokens=max_prefill_tokens,
        max_waiting=max_waiting,
        max_body_bytes=max_body_bytes,
        log_level=log_level,
    )
    _announce(core, settings)
    from server.app import serve as run_server

    run_server(core, settings)


def _announce(core: CoreSettings, settings: ServeSettings) -> None:
    registry = open_registry(core.home)
    names = [alias.current.label for alias in registry.aliases()]
    registry.database.close()
    shown = ", ".join(names[:_MAX_ALIASES_SHOWN]) + (" ..." if len(names) > _MAX_ALIASES_SHOWN else "")
    url = f"http://{'127.0.0.1' if settings.host != '::' else '[::1]'}:{settings.port}"
    error_console.print(f"Hotswap on {url}/v1 (home {core.home})")
    error_console.print(f"  base model  {core.base}, {core.quantisation}, device {core.device}")
    error_console.print(f"  adapters    {shown or 'none yet: hotswap train NAME --data FILE.jsonl'}")
    if settings.host != "127.0.0.1":
        error_console.print("  [bold]open[/bold]        no API keys yet: whoever reaches this port may use it")
    error_console.print(f'  try         hotswap chat {names[0].split("@")[0] if names else "base"} "Hello" --url {url}')
    error_console.print("Loading the base model; GET /ready answers 200 when it is up. Ctrl+C stops.")
