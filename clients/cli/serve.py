"""`hotswap serve`: says what it is about to serve, then serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, load_core, open_registry
from clients.cli.output import error_console

if TYPE_CHECKING:
    from adapters.records import ApiKey
    from adapters.settings import CoreSettings
    from server.config import ServeSettings

__all__ = ["serve"]

_MAX_ALIASES_SHOWN = 12
_MAX_KEYS_SHOWN = 8


def serve(
    host: Annotated[
        str | None, typer.Option(help="127.0.0.1, or with an API key 0.0.0.0 or ::.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port.", show_default="8000")] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters on the device at once.", show_default="8")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests computed at once.", show_default="32")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Prompt and answer together, in tokens.", show_default="2048")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default length of answers.", show_default="512")] = None,
    max_prefill_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens computed in one step.", show_default="256")
    ] = None,
    max_stall_ms: Annotated[
        int | None, typer.Option(help="How long a prompt may hold up running streams at a time.", show_default="200")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the KV cache holds.", show_default="32768")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Processor threads of the engine.", show_default="cores - 1")
    ] = None,
    native_kernels: Annotated[
        bool | None, typer.Option(help="Compile inner loops for this CPU.", show_default="yes")
    ] = None,
    capture_decode: Annotated[
        bool | None,
        typer.Option(help="Capture decode steps as CUDA graphs; without effect on a CPU.", show_default="yes"),
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests in flight before new ones get 429.", show_default="256")
    ] = None,
    max_queued_tokens: Annotated[
        int | None, typer.Option(help="Tokens in flight before new requests get 429.", show_default="200000")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Seconds an answer may take.", show_default="600")] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Seconds that running answers get after SIGTERM.", show_default="30")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", show_default="2000000")] = None,
    max_adapter_bytes: Annotated[
        int | None, typer.Option(help="Largest upload of an adapter.", show_default="1000000000")
    ] = None,
    host_cache_mb: Annotated[
        int | None, typer.Option(help="Host memory for adapters that lost their slot; 0 is off.", show_default="1024")
    ] = None,
    pinned: Annotated[
        list[str] | None, typer.Option(help="Alias that is loaded at the start and keeps its slot; may be repeated.")
    ] = None,
    jobs: Annotated[bool | None, typer.Option(help="Train fine-tuning jobs.", show_default="yes")] = None,
    job_threads: Annotated[int | None, typer.Option(help="Processor threads of a job.", show_default="1")] = None,
    max_queued_jobs: Annotated[
        int | None, typer.Option(help="Jobs that wait before new ones get 429.", show_default="100")
    ] = None,
    max_file_bytes: Annotated[
        int | None, typer.Option(help="Largest file that may be uploaded.", show_default="100000000")
    ] = None,
    traces: Annotated[
        bool | None, typer.Option(help="Send OpenTelemetry spans, one an answer.", show_default="no")
    ] = None,
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
        max_stall_ms=max_stall_ms,
        cache_tokens=cache_tokens,
        threads=threads,
        native_kernels=native_kernels,
        capture_decode=capture_decode,
        max_waiting=max_waiting,
        max_queued_tokens=max_queued_tokens,
        timeout_s=timeout_s,
        drain_s=drain_s,
        max_body_bytes=max_body_bytes,
        max_adapter_bytes=max_adapter_bytes,
        host_cache_mb=host_cache_mb,
        pinned=pinned or None,  # Typer gives an empty list for a flag that was not given
        jobs=jobs,
        job_threads=job_threads,
        max_queued_jobs=max_queued_jobs,
        max_file_bytes=max_file_bytes,
        traces=traces,
        log_level=log_level,
    )
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
    error_console.print(f"Hotswap on {url}/v1 (home {core.home}){where}", markup=False)
    error_console.print(f"  base model  {core.base}, {core.quantisation}, device {core.device}")
    error_console.print(f"  adapters    {shown or 'none yet: hotswap train NAME --data FILE.jsonl'}")
    error_console.print(f"  jobs        {'trained here, one at a time' if settings.jobs else 'not trained here'}")
    error_console.print(f"  API keys    {_describe_keys(keys)}", markup=False)
    error_console.print(f'  try         hotswap chat {names[0].split("@")[0] if names else "base"} "Hello" --url {url}')
    if keys:
        error_console.print("              (with HOTSWAP_API_KEY set to a key's secret)")
    error_console.print("Loading the base model; GET /ready answers 200 when it is up. Ctrl+C stops.")


def _describe_keys(keys: list[ApiKey]) -> str:
    from datetime import UTC, datetime

    if not keys:
        return "none: open to this machine alone; make one with: hotswap keys create NAME"
    names = [f"{key.name} ({', '.join(key.scopes)})" for key in keys if key.is_valid(datetime.now(UTC))]
    shown = ", ".join(names[:_MAX_KEYS_SHOWN]) + (" ..." if len(names) > _MAX_KEYS_SHOWN else "")
    return shown or "all expired or revoked, so nobody is let in; make one with: hotswap keys create NAME"
