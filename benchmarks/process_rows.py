"""The rows that are measured without HTTP, and those about processes: PEFT, floor, cold loads, memory, shell."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from adapters.settings import CoreSettings
from benchmarks.adapters8 import BenchHome, prepared_home
from benchmarks.floor import (
    bandwidth_floor_ms,
    compute_floor_ms,
    linear_floor_ms,
    measure_bandwidth,
    measure_compute_rate,
)
from benchmarks.in_process import NUM_SLOTS, InProcess, opened_engine, story_prompt
from benchmarks.measure import alternate, paired_ratio
from benchmarks.memory import measure_worker_growth
from benchmarks.peft_reference import PeftReference
from benchmarks.scale import Scale
from benchmarks.shell import ShellCost, running_toy_server
from benchmarks.table import Row
from clients.load import percentile

__all__ = ["engine_rows", "shell_rows", "worker_memory_row"]

_SHELL_CLIENTS = 32
_SHELL_ROUNDS = 4
_PACED_STEP_MS = 50.0


def engine_rows(home: BenchHome, scale: Scale, only: frozenset[str]) -> Iterator[Row]:
    """Build the engine on a home in this process and yield each row as it is known."""
    with opened_engine(home.core) as bench:
        digests = [adapter.digest for adapter in home.adapters[:NUM_SLOTS]]
        bench.tokens_per_second(digests, 2)  # loads every adapter
        if "peft" in only:
            yield from _peft_rows(bench, home, scale)
        if "floor" in only:
            yield from _floor_rows(bench, digests, scale)
        if "memory" in only:
            yield _memory_row(bench, home)
        if "cold" in only:
            yield _cold_row(bench, home, scale)


def shell_rows(home: BenchHome, scale: Scale) -> Iterator[Row]:
    """What the server costs per streamed token around an engine that costs nothing."""
    what = "processor time of the server's processes per streamed token, toy engine, 32 at once"
    flat_out = _shell_costs(home, scale, step_ms=0)
    paced = _shell_costs(home, scale, step_ms=_PACED_STEP_MS)
    for key, condition, costs in (("shell", "instant steps", flat_out), ("shell-paced", "steps of 50 ms", paced)):
        times = [cost.cpu_ms for cost in costs]
        detail = f"{condition}; user and kernel mode, API, worker and queue processes; the client's is left out"
        yield Row(key, f"{what}, {condition}", statistics.median(times), "ms", detail, {"ms": times})
    times = [cost.wall_ms for cost in flat_out]
    detail = f"{1000 / statistics.median(times):.0f} tokens/s, the load generator on the same cores"
    what = "time per streamed token at saturation, toy engine, 32 at once"
    yield Row("shell-wall", what, statistics.median(times), "ms", detail, {"ms": times})


def worker_memory_row(core: CoreSettings, scale: Scale) -> Row:
    """How much larger the engine worker of a real server is with eight adapters."""
    with prepared_home(core, 0) as home:
        growth, files = measure_worker_growth(home, NUM_SLOTS, num_tokens=scale.tokens)
    detail = (
        f"{_megabytes(growth)} against {_megabytes(files)}; resident memory of a server with 8 slots less that of one "
        "with 1 slot and no adapters"
    )
    what = "growth of the whole engine worker by eight adapters, against the sum of their files"
    return Row("memory-worker", what, growth / files, "x", detail, {"bytes": [growth, files]})


def _peft_rows(bench: InProcess, home: BenchHome, scale: Scale) -> Iterator[Row]:
    adapters = home.adapters[:NUM_SLOTS]
    digests = [adapter.digest for adapter in adapters]
    peft = PeftReference(home.core, [adapter.folder for adapter in adapters])

    def prompts() -> list[tuple[int, ...]]:
        return [bench.render(story_prompt()) for _ in digests]

    peft.mixed_tokens_per_second(prompts(), 2)
    variants = {
        "ours": lambda: bench.tokens_per_second(digests, scale.tokens),
        "mixed": lambda: peft.mixed_tokens_per_second(prompts(), scale.tokens),
        "switching": lambda: peft.switching_tokens_per_second(prompts(), scale.tokens),
    }
    speeds = alternate(variants, scale.repeats)
    for name, way in (("mixed", "`generate(adapter_names=...)`"), ("switching", "one at a time with `set_adapter`")):
        detail = (
            f"{statistics.median(speeds['ours']):.0f} against {statistics.median(speeds[name]):.1f} tokens/s; "
            "adapters as PEFT loads them"
        )
        what = f"8 adapters in 8 rows in process, against PEFT {way}"
        samples = {"ours tokens/s": speeds["ours"], "PEFT tokens/s": speeds[name]}
        yield Row(f"peft-{name}", what, paired_ratio(speeds["ours"], speeds[name]), "x", detail, samples)


def _floor_rows(bench: InProcess, digests: list[str], scale: Scale) -> Iterator[Row]:
    rows = len(digests)
    variants = {
        "mixed": lambda: bench.decode_step_ms(digests, scale.steps),
        "base": lambda: bench.decode_step_ms([None] * rows, scale.steps),
        "floor": lambda: linear_floor_ms(bench.linears, num_rows=rows, num_passes=scale.steps, dtype=bench.dtype),
    }
    times = alternate(variants, scale.repeats)
    limits = _describe_limits(bench, rows)
    for name, what in (("mixed", "8 adapters mixed"), ("base", "base alone")):
        detail = (
            f"{statistics.median(times[name]):.1f} ms a step of {rows} rows, its {len(bench.linears)} linear products "
            f"alone {statistics.median(times['floor']):.1f} ms; {limits}"
        )
        samples = {"step ms": times[name], "linear layers ms": times["floor"]}
        ratio = paired_ratio(times[name], times["floor"])
        yield Row(f"floor-{name}", f"decode step, {what}, against its linear layers", ratio, "x", detail, samples)


def _describe_limits(bench: InProcess, rows: int) -> str:
    device = bench.base.device
    bandwidth, rate = measure_bandwidth(device), measure_compute_rate(device, bench.dtype)
    return (
        f"reading the weights once at {bandwidth / 1e9:.0f} GB/s would take "
        f"{bandwidth_floor_ms(bench.linears, bandwidth):.2f} ms, their arithmetic at {rate / 1e12:.2f} TFLOP/s "
        f"{compute_floor_ms(bench.linears, rows, rate):.2f} ms"
    )


def _memory_row(bench: InProcess, home: BenchHome) -> Row:
    slots, files = bench.engine.runner.slots.num_bytes, sum(adapter.num_bytes for adapter in home.adapters[:NUM_SLOTS])
    detail = f"{_megabytes(slots)} of slot buffers, 8 slots of rank 8, against {_megabytes(files)} of float32 files"
    what = "eight adapters resident, against the sum of their files"
    return Row("memory", what, slots / files, "x", detail, {"bytes": [slots, files]})


def _cold_row(bench: InProcess, home: BenchHome, scale: Scale) -> Row:
    chosen = home.adapters[-scale.cold_loads :]
    times = [bench.cold_load_ms(adapter.digest, 1 + n % NUM_SLOTS) for n, adapter in enumerate(chosen)]
    detail = (
        f"p95 {percentile(times, 0.95):.0f} ms, {len(times)} versions of {_megabytes(chosen[0].num_bytes)}, each once; "
        "hash, validate, cast, copy into a slot; files in the system's page cache"
    )
    return Row(
        "cold", "cold adapter: from the store to ready, p50", percentile(times, 0.5), "ms", detail, {"ms": times}
    )


def _shell_costs(home: BenchHome, scale: Scale, *, step_ms: float) -> list[ShellCost]:
    num_requests = _SHELL_CLIENTS * min(_SHELL_ROUNDS, 2 * scale.rounds)
    with running_toy_server(home, step_ms=step_ms) as toy:
        return [
            toy.measure(concurrency=_SHELL_CLIENTS, num_requests=num_requests, num_tokens=scale.tokens)
            for _ in range(scale.repeats)
        ]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
