"""`hotswap bench`: the speed table of the engine on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, load_core

__all__ = ["bench"]


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows: mixed, peers, single, peft, floor, cold, slots, shell, memory. Repeat, or use commas."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=1024, help="New tokens a request.", show_default="64")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, max=99, help="Repeats.", show_default="3")] = None,
    quick: Annotated[
        bool, typer.Option(help="A few tokens of everything: shows that it runs, measures nothing.")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=URL of an OpenAI-compatible server that is running. Repeat.")
    ] = None,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=BASE,ADAPTER,...: the peer's names for them; lora:0 for llama.cpp's adapters."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure the engine: against the base alone, PEFT, its own floor and running peers, with random adapters."""
    core = load_core(home, base=base, device=device)
    import dataclasses

    from benchmarks.engine_table import BenchOptions, run_bench, select_rows
    from benchmarks.peers import parse_peers
    from benchmarks.scale import Scale

    # Ended from outside, it must stop its servers as it does on Ctrl+C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scale = Scale.quick() if quick else Scale()
    given = {name: value for name, value in (("tokens", tokens), ("repeats", repeats)) if value is not None}
    run_bench(
        BenchOptions(
            core,
            dataclasses.replace(scale, **given),
            select_rows(only or []),
            parse_peers(peer or [], peer_model or []),
            json_file,
        )
    )
