"""`hotswap serve`: says what it is about to serve, then serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clients.cli.options import BaseOption, DeviceOption, HomeOption, load_core, open_registry
from clients.cli.output import error_console
from clients.cli.settings_flags import with_settings
from server.config import ServeSettings

if TYPE_CHECKING:
    from adapters.records import ApiKey
    from adapters.settings import CoreSettings

__all__ = ["serve"]

_MAX_ALIASES_SHOWN = 12
_MAX_KEYS_SHOWN = 8


@with_settings(ServeSettings)
def serve(flags: dict[str, Any], home: HomeOption = None, base: BaseOption = None, device: DeviceOption = None) -> None:
    """Serve the base model and every published adapter behind an OpenAI-compatible API."""
    core = load_core(home, base=base, device=device)
    settings = ServeSettings.load(core.home, **flags)
    _announce(core, settings)
    from server.app import serve as run_server

    run_server(core, settings)


def _announce(core: CoreSettings, settings: ServeSettings) -> None:
    """Say what is about to be served; what would keep the server from starting is said instead."""
    from adapters.keys import KeyService
    from server.config import check_bind, check_port
    from server.home_lock import check_home_free

    check_home_free(core.home)
    check_port(settings)
    registry = open_registry(core.home)
    names = [alias.current.label for alias in registry.aliases()]
    keys = KeyService(registry.database).list()
    registry.database.close()
    check_bind(settings, keys)
    shown = ", ".join(names[:_MAX_ALIASES_SHOWN]) + (" ..." if len(names) > _MAX_ALIASES_SHOWN else "")
    url = settings.address
    where = "" if settings.is_loopback else f", listening on {settings.host}: every interface"
    lines = [
        f"Hotswap on {url}/v1 (home {core.home}){where}",
        f"  base model  {core.base}, {core.quantisation}, device {core.device}",
        f"  adapters    {shown or 'none yet: hotswap train NAME --data FILE.jsonl'}",
        f"  jobs        {'trained here, one at a time' if settings.jobs else 'not trained here'}",
        f"  API keys    {_describe_keys(keys)}",
        f'  try         hotswap chat {names[0].split("@")[0] if names else "base"} "Hello" --url {url}',
        *(["              (with HOTSWAP_API_KEY set to a key's secret)"] if keys else []),
        "Loading the base model. Until that is done connections are refused; then the log says engine_ready, and",
        "GET /ready answers 200. Ctrl+C stops.",
    ]
    for line in lines:
        error_console.print(line, markup=False, soft_wrap=True)


def _describe_keys(keys: list[ApiKey]) -> str:
    from datetime import UTC, datetime

    if not keys:
        return "none: open to this machine alone; make one with: hotswap keys create NAME"
    names = [f"{key.name} ({', '.join(key.scopes)})" for key in keys if key.is_valid(datetime.now(UTC))]
    shown = ", ".join(names[:_MAX_KEYS_SHOWN]) + (" ..." if len(names) > _MAX_KEYS_SHOWN else "")
    return shown or "all expired or revoked, so nobody is let in; make one with: hotswap keys create NAME"
