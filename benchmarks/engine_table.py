"""`hotswap bench`: measures the engine on this machine and prints one table with its conditions.

Every ratio is measured in one run, variants alternating; only the recorded peers come from an earlier one, and say so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import ConfigurationError
from adapters.settings import CoreSettings
from benchmarks.adapters8 import RANK, BenchHome, prepared_home
from benchmarks.conditions import describe_machine, format_conditions
from benchmarks.http_rows import http_rows
from benchmarks.in_process import NUM_SLOTS
from benchmarks.over_http import Endpoint
from benchmarks.peers import RECORDED_CONDITIONS
from benchmarks.process_rows import engine_rows, shell_rows, worker_memory_row
from benchmarks.processes import has_proc
from benchmarks.scale import ROW_GROUPS, Scale
from benchmarks.table import Row, format_table, format_value, to_document

__all__ = ["BenchOptions", "run_bench", "select_rows"]

_HTTP_GROUPS = frozenset({"mixed", "peers", "single", "slots"})
_ENGINE_GROUPS = frozenset({"peft", "floor", "cold", "memory"})


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure, on which base model, and against whom. `json_path` gets every sample."""

    core: CoreSettings
    scale: Scale = field(default_factory=Scale)
    only: frozenset[str] = frozenset(ROW_GROUPS)
    peers: tuple[Endpoint, ...] = ()
    json_path: Path | None = None


def select_rows(names: Sequence[str]) -> frozenset[str]:
    """The groups of rows that are asked for; all of them if none is named.

    Raises:
        ConfigurationError: there is no such group.
    """
    wanted = [part for name in names for part in name.split(",")]
    if strangers := [name for name in wanted if name not in ROW_GROUPS]:
        raise ConfigurationError(f"there is no row {strangers[0]!r}; there are {', '.join(ROW_GROUPS)}")
    return frozenset(wanted or ROW_GROUPS)


def run_bench(options: BenchOptions) -> list[Row]:
    """Measure, show progress on standard error, and print the table; what is done is printed even if a part fails."""
    conditions = _conditions(options)
    rows: list[Row] = []
    try:
        for row in _measure(options):
            rows.append(row)
            print(f"{row.what}: {format_value(row.value, row.unit)}", file=sys.stderr, flush=True)
    finally:
        _publish(rows, conditions, options.json_path)
    return rows


def _measure(options: BenchOptions) -> Iterator[Row]:
    only, scale = options.only, options.scale
    if only & (_HTTP_GROUPS | _ENGINE_GROUPS):
        with prepared_home(options.core, _num_adapters(options)) as home:
            yield from _measure_home(home, options)
    if not has_proc():
        return
    if "memory" in only:
        yield worker_memory_row(options.core, scale)
    if "shell" in only:
        with prepared_home(options.core, 0) as home:
            yield from shell_rows(home, scale)


def _measure_home(home: BenchHome, options: BenchOptions) -> Iterator[Row]:
    if options.only & _HTTP_GROUPS:
        yield from http_rows(home, options.scale, options.only, options.peers)
    if options.only & _ENGINE_GROUPS:
        yield from engine_rows(home, options.scale, options.only)


def _num_adapters(options: BenchOptions) -> int:
    crowd = 2 * NUM_SLOTS if "slots" in options.only else NUM_SLOTS
    return max(crowd, options.scale.cold_loads if "cold" in options.only else 0)


def _conditions(options: BenchOptions) -> dict[str, Any]:
    scale = options.scale
    conditions = describe_machine(options.core) | {
        "adapters": f"rank {RANK} on all linear layers, random values; slots of rank {RANK}, {NUM_SLOTS} of them",
        "new tokens a request": scale.tokens,
        "repeats": f"{scale.repeats}, variants alternating; a ratio is the median of the repeats' ratios",
        "load": f"streamed, closed loop, {scale.rounds} requests a client, greedy, every prompt different",
    }
    if options.only & {"peers", "single"}:
        conditions["recorded peers"] = RECORDED_CONDITIONS
    return conditions


def _publish(rows: Sequence[Row], conditions: dict[str, Any], json_path: Path | None) -> None:
    print(f"{format_table(rows)}\n\n{format_conditions(conditions)}")
    if json_path is not None:
        document = to_document(rows, conditions)
        json_path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
