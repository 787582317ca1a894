"""What /metrics says, read with Prometheus' own parser, over a real engine in this process; and its documentation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from adapters.manifest import ADAPTER_WEIGHTS_FILE
from server.engine.core import EngineTimings, LoadTiming, StepTiming
from server.messages import EngineMessage, EngineStatus
from server.metrics import Metrics
from tests.support.engine import RECIPES, Bench, Exchange, Site, on_site

FIRST, SECOND, THIRD, *_ = RECIPES
CHAT = "/v1/chat/completions"
PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
LEGAL = {"alias": "legal", "version": "legal@v1"}
BASE = {"alias": "base", "version": "base"}


class Scrape:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """One series' value; None if there is no such series."""
        return self._values.get((name, frozenset(labels.items())))

    def total(self, name: str) -> float:
        """The sum over all series of one name."""
        return sum(value for (series, _), value in self._values.items() if series == name)

    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All series that may never go back."""
        ends = ("_total", "_count", "_sum", "_bucket")
        return {key: value for key, value in self._values.items() if key[0].endswith(ends)}


def _body(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6, **fields}


async def _scrape(http: httpx.AsyncClient) -> Scrape:
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(response.text)


def _after(site: Site, *bodies: dict[str, Any], is_up: bool = True) -> tuple[list[httpx.Response], Scrape]:
    """Send requests one after another, then read the metrics."""

    async def scenario(http: httpx.AsyncClient) -> tuple[list[httpx.Response], Scrape]:
        responses = [await http.post(CHAT, json=body) for body in bodies]
        return responses, await _scrape(http)

    return on_site(site, scenario, is_up=is_up)


def _num_chunks(site: Site) -> int:
    """Steps that the prompt takes with the bench's prefill budget of 16 tokens."""
    return -(-len(site.prompt("hello there")) // 16)


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_counted_under_alias_and_version_when_they_end(stream: bool, site: Site) -> None:
    """Requests by finish reason, tokens in and out, and one value of each time; the base has its own series."""
    site.publish("legal", FIRST)
    bodies = [_body("legal"), _body("legal@v1"), _body("base")]
    (whole, *_), before = _after(site, *bodies)
    usage, reason = whole.json()["usage"], whole.json()["choices"][0]["finish_reason"]

    _, scrape = _after(site, *(body | {"stream": stream} for body in bodies))

    assert 4 == scrape.value("hotswap_requests_total", **LEGAL, finish_reason=reason)
    assert 6 == scrape.total("hotswap_requests_total")
    for kind, field in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        assert 4 * usage[field] == scrape.value("gen_ai_client_token_usage_sum", **LEGAL, gen_ai_token_type=kind)
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        assert 4 == scrape.value(f"gen_ai_server_{name}_seconds_count", **LEGAL)
        assert 2 == scrape.value(f"gen_ai_server_{name}_seconds_count", **BASE)
    assert 4 == scrape.value("hotswap_queue_seconds_count", **LEGAL)
    assert 4 * (usage["completion_tokens"] - 1) == scrape.value("hotswap_inter_token_seconds_count", **LEGAL)
    assert 1 == before.value("hotswap_requests_total", **BASE, finish_reason=reason)


def test_times_add_up_when_an_answer_has_ended(site: Site) -> None:
    """Time to the first token and the gaps behind it are within the duration; the mean per token is the gaps' mean."""
    (response,), scrape = _after(site, _body("base"))
    num_gaps = response.json()["usage"]["completion_tokens"] - 1
    first = scrape.value("gen_ai_server_time_to_first_token_seconds_sum", **BASE)
    gaps = scrape.value("hotswap_inter_token_seconds_sum", **BASE)
    mean = scrape.value("gen_ai_server_time_per_output_token_seconds_sum", **BASE)
    whole = scrape.value("gen_ai_server_request_duration_seconds_sum", **BASE)
    assert first is not None
    assert gaps is not None
    assert whole is not None
    assert 0 < first + gaps <= whole
    assert mean == pytest.approx(gaps / num_gaps)


def test_errors_are_counted_by_code_when_requests_fail(site: Site) -> None:
    """Before a version is bound the labels are empty; afterwards they name it; a route that is not there counts too."""
    digest = site.publish("legal", FIRST).version.digest
    weights = site.registry.store.folder(digest) / ADAPTER_WEIGHTS_FILE
    weights.chmod(0o600)
    weights.write_bytes(b"damaged")
    _, scrape = _after(site, _body("legal"), _body("nobody"), _body("base", guess=1), _body("base"))

    def count(code: str, **labels: str) -> float | None:
        return scrape.value("hotswap_errors_total", **({"alias": "", "version": ""} | labels), code=code)

    assert [1, 1, 1] == [count("adapter_rejected", **LEGAL), count("model_not_found"), count("unknown_field")]
    assert 3 == scrape.total("hotswap_errors_total")
    assert 1 == scrape.value("hotswap_requests_total", **LEGAL, finish_reason="adapter_failed")
    assert 1 == scrape.value("hotswap_adapter_load_seconds_count", **LEGAL, outcome="failed")

    async def scenario(http: httpx.AsyncClient) -> Scrape:
        await http.get("/nowhere")
        return await _scrape(http)

    assert 1 == on_site(site, scenario).value("hotswap_errors_total", alias="", version="", code="http_404")


def test_deadline_is_counted_when_an_answer_is_late(site: Site) -> None:
    """As a finish reason and as an error."""

    async def scenario(http: httpx.AsyncClient) -> Scrape:
        await http.post(CHAT, json=_body("base"), headers={"x-hotswap-timeout-s": "1e-9"})
        return await _scrape(http)

    scrape = on_site(site, scenario)
    assert 1 == scrape.value("hotswap_requests_total", **BASE, finish_reason="deadline")
    assert 1 == scrape.value("hotswap_errors_total", **BASE, code="deadline_exceeded")
    assert None is scrape.value("gen_ai_server_time_to_first_token_seconds_count", **BASE)


def test_error_is_counted_when_a_stream_breaks_off(site: Site) -> None:
    """Its status was 200, and it is an error all the same; so is a request that is refused for want of an engine."""

    async def scenario(http: httpx.AsyncClient) -> Scrape:
        site.transport.permits = 6
        exchange = Exchange(site.app, CHAT, _body("base", stream=True))
        await exchange.start()
        await exchange.chunk()
        site.client._give_up("the engine died")
        assert b"engine_unavailable" in await exchange.rest()
        return await _scrape(http)

    scrape = on_site(site, scenario)
    assert 1 == scrape.value("hotswap_errors_total", **BASE, code="engine_unavailable")
    assert 1 == scrape.value("hotswap_requests_total", **BASE, finish_reason="error")
    site.client._give_up("the engine died")
    _, scrape = _after(site, _body("base"), is_up=False)
    assert 2 == scrape.value("hotswap_errors_total", **BASE, code="engine_unavailable")
    assert 1 == scrape.value("hotswap_requests_total", **BASE, finish_reason="error")
    assert 1 == scrape.total("hotswap_requests_total"), "what was refused was not accepted"


def test_unknown_models_add_no_series_when_clients_invent_names(site: Site) -> None:
    """A hundred names that nobody published: the same series as one."""
    _, few = _after(site, _body("nobody"))
    _, many = _after(site, *(_body(f"nobody-{index}") for index in range(100)))
    assert few.counters().keys() == many.counters().keys()
    assert 101 == many.value("hotswap_errors_total", alias="", version="", code="model_not_found")


# The engine ----------------------------------------------------------------------------------------------------------


def test_gauges_tell_the_engines_state_when_requests_run_and_wait(site: Site) -> None:
    """Batch, queue, slots, cache and what is in flight; all back to rest in the end, save what stays resident."""
    site.publish("legal", FIRST)
    rows, num_blocks = site.engine.runner.cache.num_rows, site.engine.cache_room[1]
    num_requests = rows + 2
    cost = len(site.prompt("hello there")) + 6
    free: list[int] = []

    async def scenario(http: httpx.AsyncClient) -> tuple[Scrape, Scrape]:
        await http.post(CHAT, json=_body("legal"))
        site.transport.permits = 0
        posts = [asyncio.ensure_future(http.post(CHAT, json=_body("legal"))) for _ in range(num_requests)]
        while site.engine.num_waiting < num_requests:
            await asyncio.sleep(0)
        # The first token brings the first message, and with it the first word of who runs.
        site.transport.permits = _num_chunks(site)
        while site.client.status is None or not site.client.status.num_running:
            await asyncio.sleep(0)
        busy = await _scrape(http)
        free.append(site.engine.cache_room[0])
        site.transport.permits = None
        await asyncio.gather(*posts)
        return busy, await _scrape(http)

    busy, idle = on_site(site, scenario)

    def state(scrape: Scrape) -> list[float | None]:
        names = ("running_requests", "waiting_requests", "waiting_tokens", "cache_blocks_free", "in_flight_requests")
        return [scrape.value(f"hotswap_{name}") for name in (*names, "in_flight_tokens")]

    assert [rows, 2, 2 * cost, *free, num_requests, num_requests * cost] == state(busy)
    assert free[0] <= num_blocks - rows
    assert [0, 0, 0, num_blocks, 0, 0] == state(idle)
    for scrape in (busy, idle):
        assert [num_blocks, site.engine.num_slots, 1, 1, 1] == [
            scrape.value("hotswap_cache_blocks"),
            scrape.value("hotswap_slots"),
            scrape.value("hotswap_slots_used"),
            scrape.value("hotswap_adapter_resident", **LEGAL),
            scrape.value("hotswap_engine_up"),
        ]


def test_gauges_have_no_value_when_there_is_no_worker(site: Site) -> None:
    """Only that it is down; an old figure would look like a healthy engine. The families stay."""
    _, down = _after(site, is_up=False)
    assert (0, None, None) == (
        down.value("hotswap_engine_up"),
        down.value("hotswap_slots"),
        down.value("hotswap_running_requests"),
    )
    _, up = _after(site)
    assert up.families.keys() == down.families.keys()


def test_steps_are_told_apart_when_they_have_prefill(site: Site) -> None:
    """One value a step, by whether it computed a prompt."""
    (response,), scrape = _after(site, _body("base"))
    num_tokens = response.json()["usage"]["completion_tokens"]
    name = "hotswap_step_duration_seconds_count"
    assert _num_chunks(site) == scrape.value(name, has_prefill="true")
    assert num_tokens - 1 == scrape.value(name, has_prefill="false")


def test_load_is_named_when_no_request_has_asked_for_the_version(site: Site) -> None:
    """What the worker fetches at its start is known by the registry only; the next scrape asks there."""
    digest = site.publish("legal", FIRST).version.digest
    site.engine.prefetch([digest])

    async def scenario(http: httpx.AsyncClient) -> Scrape:
        await http.post(CHAT, json=_body("base"))
        return await _scrape(http)

    scrape = on_site(site, scenario)
    assert 1 == scrape.value("hotswap_adapter_load_seconds_count", **LEGAL, outcome="loaded")
    assert 1 == scrape.value("hotswap_adapter_resident", **LEGAL)


def test_counters_never_go_back_when_the_worker_is_restarted(site: Site, bench: Bench) -> None:
    """The new worker begins at nothing and has other versions resident; only gauges show it."""
    site.publish("legal", FIRST)
    first_engine = site.engine

    async def scenario(http: httpx.AsyncClient) -> list[Scrape]:
        await http.post(CHAT, json=_body("legal"))
        scrapes = [await _scrape(http), await _scrape(http)]
        site.client._give_up("the engine died")
        scrapes.append(await _scrape(http))
        site.engine = bench.engine(tokenizer=bench.base.tokenizer)
        site.transport.restart(site.engine, epoch="epoch-2")
        while site.client.status is None:
            await asyncio.sleep(0)
        await http.post(CHAT, json=_body("base"))
        scrapes.append(await _scrape(http))
        return scrapes

    scrapes = on_site(site, scenario)
    first_engine.close()
    for former, latter in pairwise(scrapes):
        after = latter.counters()
        assert [] == [key for key, value in former.counters().items() if after[key] < value]
    assert scrapes[0].counters() == scrapes[1].counters(), "idling changes nothing"
    assert [0, 0, 0, 1] == [scrape.value("hotswap_engine_restarts_total") for scrape in scrapes]
    assert scrapes[-1].total("hotswap_step_duration_seconds_count") > scrapes[0].total(
        "hotswap_step_duration_seconds_count"
    )
    assert [1, 1, None, None] == [scrape.value("hotswap_adapter_resident", **LEGAL) for scrape in scrapes]


def test_timings_are_added_up_when_workers_come_and_go() -> None:
    """Each message brings what is not counted yet; a load of a version without a name is kept until it has one."""
    metrics = Metrics()
    timings = EngineTimings((StepTiming(0.01, False),) * 3, (LoadTiming("f" * 64, 0.2, True),))
    for epoch in ("one", "one", "two", "three"):
        status = EngineStatus(epoch, 1, 0, 0, ())
        metrics.note_message(EngineMessage(status, (), timings))
        metrics.note_message(EngineMessage(status, ()))
    assert metrics.lacks_names(())
    metrics.name_versions([])
    scrape = Scrape(metrics.render().decode())
    assert 12 == scrape.value("hotswap_step_duration_seconds_count", has_prefill="false")
    assert 2 == scrape.value("hotswap_engine_restarts_total")
    unknown = {"alias": "unknown", "version": "unknown", "outcome": "loaded"}
    assert 4 == scrape.value("hotswap_adapter_load_seconds_count", **unknown)
    assert not metrics.lacks_names(())


def test_metrics_are_apart_when_there_are_two_sites() -> None:
    """Nothing is kept in the library's process-wide registry."""
    one, other = Metrics(), Metrics()
    one.count_error("overloaded", None)
    assert b"overloaded" not in other.render()
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith(("hotswap", "gen_ai"))]


# The page ------------------------------------------------------------------------------------------------------------


def _rows() -> Iterator[tuple[str, str, frozenset[str], str]]:
    """Name, type, labels and unit of each metric in the page."""
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| `(hotswap|gen_ai)_", line):
            name, kind, labels, unit, _ = (cell.strip() for cell in line.strip("|").split("|"))
            yield name.strip("`"), kind, frozenset(re.findall(r"`(\w+)`", labels)), unit


def _everything(site: Site) -> Callable[[httpx.AsyncClient], Awaitable[Scrape]]:
    async def scenario(http: httpx.AsyncClient) -> Scrape:
        site.services.shadows.start("legal", "v2", share=100)
        await site.services.shadow_keeper.reconcile()
        for model in ("legal", "nobody"):
            await http.post(CHAT, json=_body(model))
        await site.services.shadow_keeper.settle()
        return await _scrape(http)

    return scenario


def test_page_lists_every_metric_when_compared_with_the_registry(site: Site) -> None:
    """Names, types and labels are the same on both sides; every row has a unit; nothing is listed twice."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND, promote=False)
    families = on_site(site, _everything(site)).families
    found = set()
    for family in families.values():
        assert family.samples, f"{family.name} was not met in this test, so its labels are not known"
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found.add((name, family.type, frozenset(family.samples[0].labels) - {"le"}))
    rows = list(_rows())
    assert len(rows) > 15
    assert found == {row[:3] for row in rows}
    assert len(rows) == len({row[0] for row in rows})
    assert all(row[3] for row in rows)
