"""Many clients for some minutes, a third of whom leave in the middle and a tenth of whom send garbage.

    python -m benchmarks.abuse          200 clients for two minutes on the embedded base model

What it asks: is every accepted request answered to an end, is nothing answered with a 5xx but 503, and is all level
afterwards: requests in flight, memory, open files and sockets of the server's processes. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from adapters.settings import CoreSettings, resolve_home
from benchmarks.adapters8 import prepared_home
from benchmarks.processes import open_files, process_tree, resident_bytes
from clients.local_server import started_server

__all__ = ["Abuse", "Level", "Report", "Tally", "format_report", "is_level", "run_abuse"]

_NUM_ADAPTERS = 8
_LEAVING, _GARBAGE = 1 / 3, 1 / 10  # shares of the requests
_TIMEOUT_S = 120.0
_POLL_S = 0.5
# What a pool of connections to SQLite may still add that the short round did not fill: five, with three files each.
_POOLED_FILES = 15
_CHAT = "/v1/chat/completions"
_HELLO = [{"role": "user", "content": "Tell me about ships."}]
# Bodies that no server should take, with what each gets wrong.
_BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    json.dumps({"model": "base"}).encode(),
    json.dumps({"model": "base", "messages": []}).encode(),
    json.dumps({"model": "base", "messages": "hello"}).encode(),
    json.dumps({"model": "nobody", "messages": _HELLO}).encode(),
    json.dumps({"model": "../../etc/passwd", "messages": _HELLO}).encode(),
    json.dumps({"model": "base", "messages": _HELLO, "max_tokens": -1}).encode(),
    json.dumps({"model": "base", "messages": _HELLO, "temperature": 1e308}).encode(),
    json.dumps({"model": "base", "messages": _HELLO, "n": 10**9}).encode(),
    json.dumps({"model": "base", "messages": _HELLO, "unknown": True}).encode(),
    json.dumps({"model": "base", "messages": [{"role": "user", "content": "ship " * 20_000}]}).encode(),
    b'{"model": "base", "messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
)


@dataclass(frozen=True, slots=True)
class Abuse:
    """How much: clients at once, seconds, tokens of an answer at most, the seed of every choice.

    `rest_s` is how long the server may take to be level again; less is waited if it is so sooner.
    """

    clients: int = 200
    seconds: float = 120.0
    tokens: int = 32
    seed: int = 0
    rest_s: float = 60.0


@dataclass(slots=True)
class Tally:
    """What the clients saw. `endings` counts the streams that were read to their end by how they ended."""

    statuses: Counter[int] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    garbage: Counter[int] = field(default_factory=Counter)
    num_left: int = 0
    broken: Counter[str] = field(default_factory=Counter)  # connections that failed, by kind of error

    @property
    def num_server_errors(self) -> int:
        """Answers of 500 and above but 503, to good requests and to garbage."""
        both = self.statuses + self.garbage
        return sum(count for status, count in both.items() if status >= 500 and status != 503)


@dataclass(frozen=True, slots=True)
class Level:
    """What the server holds at one moment."""

    in_flight: float
    running: float
    waiting: float
    answered: float  # since the start
    num_files: int
    megabytes: float


@dataclass(frozen=True, slots=True)
class Report:
    """A run: what clients saw, and the server before and after it."""

    abuse: Abuse
    tally: Tally
    before: Level
    after: Level


def is_level(report: Report) -> bool:
    """Whether nothing is left of the requests: none in flight, none in the engine, and no files that grow with them."""
    return _is_as_before(report.after, report.before)


async def run_abuse(url: str, pids: Sequence[int], models: Sequence[str], abuse: Abuse) -> Report:
    """Let the clients loose on a running server, after a short round that grows its buffers."""
    await _let_loose(url, models, abuse, seconds=min(15.0, abuse.seconds), tally=Tally())
    before = await _rest(url, pids, abuse.rest_s, _is_idle)
    tally = Tally()
    await _let_loose(url, models, abuse, seconds=abuse.seconds, tally=tally)
    after = await _rest(url, pids, abuse.rest_s, lambda level: _is_as_before(level, before))
    return Report(abuse, tally, before, after)


async def _rest(url: str, pids: Sequence[int], rest_s: float, is_done: Callable[[Level], bool]) -> Level:
    """What the server holds once that is as it should be, or when it has had its time."""
    until = time.monotonic() + rest_s
    while True:
        level = await _measure(url, pids)
        if is_done(level) or time.monotonic() > until:
            return level
        await asyncio.sleep(_POLL_S)


def _is_as_before(level: Level, before: Level) -> bool:
    return _is_idle(level) and level.num_files <= before.num_files + _POOLED_FILES


def _is_idle(level: Level) -> bool:
    return level.in_flight == level.running == level.waiting == 0


async def _let_loose(url: str, models: Sequence[str], abuse: Abuse, *, seconds: float, tally: Tally) -> None:
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=abuse.clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_TIMEOUT_S) as http:

        async def client(number: int) -> None:
            chance = random.Random(abuse.seed * 1_000_003 + number)  # noqa: S311 - choices of a load, no secret
            while time.monotonic() < until:
                try:
                    await _one_request(http, models, abuse, chance, tally)
                except httpx.HTTPError as error:
                    tally.broken[type(error).__name__] += 1

        await asyncio.gather(*[client(number) for number in range(abuse.clients)])


async def _one_request(
    http: httpx.AsyncClient, models: Sequence[str], abuse: Abuse, chance: random.Random, tally: Tally
) -> None:
    kind = chance.random()
    if kind < _GARBAGE:
        headers = {"content-type": "application/json"}
        answer = await http.post(_CHAT, content=chance.choice(_BAD_BODIES), headers=headers)
        tally.garbage[answer.status_code] += 1
        return
    patience = chance.uniform(0, 3) if kind < _GARBAGE + _LEAVING else None
    body = {"model": chance.choice(models), "messages": _HELLO, "max_tokens": abuse.tokens, "stream": True}
    try:
        async with asyncio.timeout(patience):
            await _read_stream(http, body, tally)
    except TimeoutError:
        tally.num_left += 1


async def _read_stream(http: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> None:
    async with http.stream("POST", _CHAT, json=body) as answer:
        tally.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            await answer.aread()
            await asyncio.sleep(float(answer.headers.get("retry-after", 0)))
            return
        ending = "cut off"
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ending = "done"
            elif line.startswith('data: {"error"'):
                ending = "error event"
        tally.endings[ending] += 1


async def _measure(url: str, pids: Sequence[int]) -> Level:
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as http:
        text = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    totals: defaultdict[str, float] = defaultdict(float)
    for sample in samples:
        totals[sample.name] += sample.value
    return Level(
        in_flight=totals["hotswap_in_flight_requests"],
        running=totals["hotswap_running_requests"],
        waiting=totals["hotswap_waiting_requests"],
        answered=totals["hotswap_requests_total"],
        num_files=sum(open_files(pid) for pid in pids),
        megabytes=sum(resident_bytes(pid) for pid in pids) / 1e6,
    )


def format_report(report: Report) -> str:
    """The figures, as a table."""
    tally, before, after = report.tally, report.before, report.after
    rows = [
        ("requests by status", _counts(tally.statuses)),
        ("streams read to their end", _counts(tally.endings)),
        ("clients that left in the middle", str(tally.num_left)),
        ("garbage by status", _counts(tally.garbage)),
        ("5xx but 503", str(tally.num_server_errors)),
        ("connections that failed", _counts(tally.broken)),
        ("requests that the server accepted and ended", f"{after.answered - before.answered:.0f}"),
        ("in flight, running, waiting afterwards", f"{after.in_flight:.0f}, {after.running:.0f}, {after.waiting:.0f}"),
        ("open files and sockets of all processes", f"{before.num_files} before, {after.num_files} after"),
        ("resident memory of all processes", f"{before.megabytes:.0f} MB before, {after.megabytes:.0f} MB after"),
    ]
    head = f"{report.abuse.clients} clients for {report.abuse.seconds:.0f} s, answers of {report.abuse.tokens} tokens"
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.most_common()) or "none"


def main() -> None:
    """Start a server on a home of its own, abuse it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Abuse()
    parser.add_argument("--clients", type=int, default=usual.clients)
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--base", default=None)
    options = parser.parse_args()
    abuse = Abuse(options.clients, options.seconds, options.tokens, options.seed)
    core = CoreSettings.load(resolve_home(options.home), base=options.base)
    with prepared_home(core, _NUM_ADAPTERS) as home:
        log = home.core.home / "server.log"
        with started_server(home.environment, log, "--log-level", "warning") as server:
            models = ["base", *(adapter.alias for adapter in home.adapters)]
            report = asyncio.run(run_abuse(server.url, process_tree(server.pid), models, abuse))
    print(format_report(report))
    if report.tally.num_server_errors or report.tally.endings["cut off"] or not is_level(report):
        raise SystemExit("the server did not hold: see the table")


if __name__ == "__main__":
    main()
