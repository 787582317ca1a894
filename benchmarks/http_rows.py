"""The rows that are measured over HTTP, on one server that runs for all of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.adapters8 import BenchHome
from benchmarks.in_process import NUM_SLOTS
from benchmarks.measure import alternate, paired_ratio
from benchmarks.over_http import Choice, Endpoint, Load, find_options, run_closed_loop, shuffled
from benchmarks.peers import RECORDED, RecordedPeer
from benchmarks.scale import Scale
from benchmarks.table import Row
from clients.load import LoadSummary, percentile
from clients.local_server import running_server

__all__ = ["http_rows"]

_CLIENTS = (8, 32)
_NUM_CROWDED = 2 * NUM_SLOTS
_CROWDED_CLIENTS = 8

Summaries = dict[str, list[LoadSummary]]


def http_rows(home: BenchHome, scale: Scale, only: frozenset[str], peers: Sequence[Endpoint]) -> Iterator[Row]:
    """Serve the home, compare, and yield each row as it is known.

    Raises:
        ApiError: a request failed, here or at a peer.
    """
    flags = ("--log-level", "warning", "--slots", str(NUM_SLOTS), "--max-batch", str(max(_CLIENTS)))
    with running_server(home.environment, home.core.home / "server.log", *flags) as url:
        choices = tuple(Choice(adapter.alias) for adapter in home.adapters)
        own = _with_options(Endpoint("hotswap", url, Choice("base"), choices[:NUM_SLOTS]))
        others = [_with_options(peer) for peer in peers]
        _warm_up([own, *others])
        if only & {"mixed", "single"}:
            yield from _single_rows(_compare(own, others, scale, 1), own, others, only)
        for clients in _CLIENTS if only & {"mixed", "peers"} else ():
            yield from _mixed_rows(_compare(own, others, scale, clients), clients, others, only)
        if "slots" in only:
            yield _slots_row(own, choices[:_NUM_CROWDED], scale)


def _with_options(endpoint: Endpoint) -> Endpoint:
    return dataclasses.replace(endpoint, options=find_options(endpoint))


def _warm_up(endpoints: Sequence[Endpoint]) -> None:
    """Have every adapter loaded, and every buffer grown that a first batch grows."""
    for endpoint in endpoints:
        choices = (endpoint.base, *endpoint.adapters)
        run_closed_loop(endpoint, Load(choices, len(choices), len(choices), num_tokens=2))


def _compare(own: Endpoint, others: Sequence[Endpoint], scale: Scale, clients: int) -> Summaries:
    """Base alone, our adapters and each peer's adapters under the same load; a single client asks for one adapter."""
    count = scale.rounds * max(clients, 2)

    def loaded(endpoint: Endpoint, choices: Sequence[Choice]) -> Callable[[], LoadSummary]:
        asked = choices[:1] if clients == 1 else choices
        return lambda: run_closed_loop(endpoint, Load(asked, clients, count, scale.tokens))

    variants = {"base": loaded(own, [own.base]), "adapters": loaded(own, own.adapters)}
    variants |= {f"peer {peer.name}": loaded(peer, peer.adapters) for peer in others}
    return alternate(variants, scale.repeats)


def _single_rows(
    summaries: Summaries, own: Endpoint, others: Sequence[Endpoint], only: frozenset[str]
) -> Iterator[Row]:
    if "mixed" in only:
        yield _against_base("mixed-1", "one adapter against base alone, one stream", summaries)
    if "single" in only:
        yield from _against_peers("one adapter, one stream", summaries, 1, others)


def _mixed_rows(summaries: Summaries, clients: int, others: Sequence[Endpoint], only: frozenset[str]) -> Iterator[Row]:
    if "mixed" in only:
        yield _against_base(f"mixed-{clients}", f"8 adapters mixed against base alone, {clients} at once", summaries)
    if "peers" in only:
        yield from _against_peers(f"8 adapters mixed, {clients} at once", summaries, clients, others)


def _against_base(key: str, what: str, summaries: Summaries) -> Row:
    adapters, base = _speeds(summaries["adapters"]), _speeds(summaries["base"])
    detail = (
        f"{statistics.median(adapters):.0f} against {statistics.median(base):.0f} tokens/s; time to first token "
        f"p50/p95 {_describe_ttft(summaries['adapters'])} against {_describe_ttft(summaries['base'])}"
    )
    samples = {"adapters tokens/s": adapters, "base tokens/s": base}
    return Row(key, what, paired_ratio(adapters, base), "x", detail, samples)


def _against_peers(what: str, summaries: Summaries, clients: int, others: Sequence[Endpoint]) -> Iterator[Row]:
    adapters = _speeds(summaries["adapters"])
    for peer in RECORDED:
        yield _against_recorded(what, adapters, clients, peer)
    for endpoint in others:
        theirs = summaries[f"peer {endpoint.name}"]
        speeds = _speeds(theirs)
        detail = (
            f"{statistics.median(adapters):.0f} against {statistics.median(speeds):.0f} tokens/s, same run; time to "
            f"first token p50/p95 {_describe_ttft(summaries['adapters'])} against {_describe_ttft(theirs)}"
        )
        samples = {"ours tokens/s": adapters, f"{endpoint.name} tokens/s": speeds}
        ratio = paired_ratio(adapters, speeds)
        yield Row(f"live-{endpoint.name}-{clients}", f"{what}, against {endpoint.name}", ratio, "x", detail, samples)


def _against_recorded(what: str, adapters: Sequence[float], clients: int, peer: RecordedPeer) -> Row:
    ours, theirs = statistics.median(adapters), peer.tokens_per_second[clients]
    detail = f"{ours:.0f} tokens/s here, {theirs:.0f} recorded elsewhere"
    what = f"{what}, against {peer.name}, recorded in another run"
    return Row(f"{peer.key}-{clients}", what, ours / theirs, "x", detail, {"ours tokens/s": adapters})


def _slots_row(own: Endpoint, choices: Sequence[Choice], scale: Scale) -> Row:
    count = scale.rounds * len(choices)
    few, many = (shuffled(part, count, seed=0) for part in (choices[:NUM_SLOTS], choices))

    def run(order: Sequence[Choice]) -> LoadSummary:
        _warm_up([own])  # the eight are in the slots, whoever was there before
        return run_closed_loop(own, Load(order, _CROWDED_CLIENTS, count, scale.tokens))

    summaries = alternate({"8": lambda: run(few), "16": lambda: run(many)}, scale.repeats)
    medians = {name: [percentile(s.ttft_s, 0.5) * 1000 for s in found] for name, found in summaries.items()}
    detail = (
        f"p50 {statistics.median(medians['16']):.0f} against {statistics.median(medians['8']):.0f} ms, p50/p95 of all "
        f"{_describe_ttft(summaries['16'])} against {_describe_ttft(summaries['8'])}; 8 at once, in random order"
    )
    what = "16 adapters over 8 slots against 8 over 8: p50 time to first token"
    samples = {f"{name} adapters ms": values for name, values in medians.items()}
    return Row("slots", what, paired_ratio(medians["16"], medians["8"]), "x", detail, samples)


def _speeds(summaries: Sequence[LoadSummary]) -> list[float]:
    return [summary.tokens_per_second for summary in summaries]


def _describe_ttft(summaries: Sequence[LoadSummary]) -> str:
    times = [seconds * 1000 for summary in summaries for seconds in summary.ttft_s]
    return f"{percentile(times, 0.5):.0f}/{percentile(times, 0.95):.0f} ms"
