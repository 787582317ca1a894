"""Shadows over HTTP, a real engine and database: what is copied, what becomes of it, and what it costs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from adapters.records import KeyLimits
from adapters.registry import Registry
from adapters.shadows import Shadow, ShadowService
from adapters.tables import ConversationRow, ShadowAnswerRow
from server import shadows as shadows_module
from server.engine_client import EngineClient
from server.messages import SubmitCommand
from server.shadows import ShadowKeeper
from tests.support.background import run_until
from tests.support.engine import RECIPES, Bench, Reference, Site, on_site

FIRST, SECOND, THIRD, *_ = RECIPES
CHAT = "/v1/chat/completions"
API = "/v1/shadows"


@pytest.fixture
def keeping_site(bench: Bench, registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """A server that keeps conversations."""
    site = Site.build(bench, registry, tmp_path, keep_conversations=True)
    yield site
    site.engine.close()


def _body(text: str = "hello there", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "legal", "messages": messages, "temperature": 0, "max_tokens": 5, **fields}


def _publish(site: Site) -> None:
    site.publish("legal", FIRST)
    site.publish("legal", SECOND, promote=False)


def _chat(
    site: Site, *bodies: dict[str, Any], share: float = 100, warm: bool = True, **options: Any
) -> list[httpx.Response]:
    """Start a shadow over HTTP, ask, and wait until the copies have ended."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        if warm:
            await http.post(CHAT, json=_body(model="legal@v2", max_tokens=1, store=False), **options)
        started = await http.post(API, json={"alias": "legal", "version": "v2", "share": share}, **options)
        assert started.status_code in (201, 409), started.text
        answers = []
        for body in bodies:
            answers.append(await http.post(CHAT, json=body, **options))
            await site.services.shadow_keeper.settle()
        return answers

    return on_site(site, scenario)


def _rows(site: Site) -> list[ShadowAnswerRow]:
    with site.registry.database.read() as session:
        return list(session.scalars(select(ShadowAnswerRow).order_by(ShadowAnswerRow.made_at)))


def _get(site: Site, path: str) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.get(path)

    return on_site(site, scenario)


def test_candidate_answers_a_copy_when_the_live_answer_has_ended(
    keeping_site: Site, reference_answers: Reference
) -> None:
    """Streams and whole answers; the user gets the alias's version, the row the candidate's own tokens."""
    _publish(keeping_site)
    whole, streamed = _chat(keeping_site, _body(), _body(stream=True))
    assert ["legal@v1"] * 2 == [response.headers["x-hotswap-version"] for response in (whole, streamed)]
    prompt = keeping_site.prompt("hello there")
    assert reference_answers.text(prompt, FIRST, 5) == whole.json()["choices"][0]["message"]["content"]
    rows = _rows(keeping_site)
    expected = reference_answers.text(prompt, SECOND, 5)
    assert [("answered", {"role": "assistant", "content": expected})] * 2 == [(row.outcome, row.answer) for row in rows]
    assert {(False, 5, 5)} == {(row.is_same, row.live_tokens, row.tokens) for row in rows}
    body = _get(keeping_site, f"{API}/{rows[0].shadow_id}").json()
    assert (2, 0, 0, 2) == tuple(body[f"num_{name}"] for name in ("answered", "dropped", "failed", "kept"))
    assert (0.0, 0.0, "legal@v2") == (body["same_share"]["mean"], body["token_difference"]["mean"], body["version"])


def test_text_is_kept_by_the_conversation_logs_rules_when_a_shadow_answers(site: Site) -> None:
    """Without the log there are numbers and no text; deleting a conversation takes the shadow's text along."""
    _publish(site)
    _chat(site, _body())
    assert [("answered", None)] == [(row.outcome, row.answer) for row in _rows(site)]


def test_shadows_text_goes_with_its_conversation_when_that_is_too_old(keeping_site: Site) -> None:
    """The numbers stay."""
    _publish(keeping_site)
    _chat(keeping_site, _body())
    with keeping_site.registry.database.write() as session:
        (kept,) = session.scalars(select(ConversationRow))
        kept.kept_at = kept.kept_at.replace(year=2020)
    keeping_site.services.conversations.sweep()
    assert [("answered", None, 5)] == [(row.outcome, row.answer, row.tokens) for row in _rows(keeping_site)]
    assert 0 == len(keeping_site.services.shadows.pairs("legal"))


@pytest.mark.parametrize(
    "fields",
    [{"store": False}, {"n": 2}, {"model": "legal@v1"}, {"model": "base"}, {"model": "legal@v2"}],
    ids=["declined", "several answers", "a version", "another model", "the candidate"],
)
def test_request_is_not_copied_when_it_is_no_sample_of_the_alias(fields: dict[str, Any], keeping_site: Site) -> None:
    """Neither where its owner declines, nor where there is nothing to compare."""
    _publish(keeping_site)
    (response,) = _chat(keeping_site, _body(**fields))
    assert (200, []) == (response.status_code, _rows(keeping_site))


def test_copies_cost_the_key_nothing_when_it_is_limited(keeping_site: Site) -> None:
    """The key is charged for what it asked for, and for no copy; no exposure tells of one."""
    _publish(keeping_site)
    limits = KeyLimits(tokens_per_minute=600, max_concurrent=1)
    _, secret = keeping_site.keys.create("web", scopes=["chat", "experiments"], limits=limits)
    headers = {"authorization": f"Bearer {secret}"}
    answers = _chat(keeping_site, _body(), _body(max_tokens=12), warm=False, headers=headers)

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.get("/v1/models", headers=headers)

    charged = sum(answer.json()["usage"]["total_tokens"] for answer in answers)
    left = int(on_site(keeping_site, scenario).headers["x-ratelimit-remaining-tokens"])
    assert left >= 600 - charged - 1  # it fills by the second; what it holds is told as a whole number
    assert ["dropped", "answered"] == [row.outcome for row in _rows(keeping_site)]
    assert [1, 1] == [row.number for row in keeping_site.exposures()]


def test_copy_is_dropped_when_the_engine_has_no_room(keeping_site: Site) -> None:
    """Here its version is in no slot: the row tells, and the next one is answered, since a slot was free to read it."""
    _publish(keeping_site)
    _chat(keeping_site, _body(), _body(), warm=False)
    first, second = _rows(keeping_site)
    assert ("dropped", "its version is in no slot", None) == (first.outcome, first.reason, first.answer)
    assert "answered" == second.outcome
    shadow = keeping_site.services.shadows.report("legal")
    assert (1, {"its version is in no slot": 1}) == (shadow.num_dropped, shadow.dropped_because)


def test_live_answers_are_the_same_when_a_shadow_runs(keeping_site: Site) -> None:
    """Many at once, with copies of all of them: every answer as without, and nobody is refused for the copies."""
    _publish(keeping_site)
    bodies = [_body(f"question {number}", max_tokens=4) for number in range(12)]

    def ask_all(share: float) -> list[Any]:
        async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
            await http.post(CHAT, json=_body(model="legal@v2", max_tokens=1, store=False))
            await http.post(API, json={"alias": "legal", "version": "v2", "share": share})
            responses = await asyncio.gather(*(http.post(CHAT, json=body) for body in bodies))
            await keeping_site.services.shadow_keeper.settle()
            return responses

        return [(response.status_code, response.json()["choices"]) for response in on_site(keeping_site, scenario)]

    without = ask_all(1e-9)
    keeping_site.services.shadows.stop("legal")
    assert without == ask_all(100)
    outcomes = {row.outcome for row in _rows(keeping_site)}
    assert (12, True) == (len(_rows(keeping_site)), outcomes <= {"answered", "dropped"})
    assert 0 == keeping_site.client.num_in_flight


def test_metrics_tell_shadows_apart_when_copies_are_answered(keeping_site: Site) -> None:
    """One counter of their own; the requests, the tokens and the answers of users are counted as without."""
    _publish(keeping_site)
    _chat(keeping_site, _body(), warm=False)
    _chat(keeping_site, _body(), warm=False)
    text = _get(keeping_site, "/metrics").text
    own = 'hotswap_shadow_answers_total{alias="legal",outcome="answered",version="legal@v2"} 1.0'
    assert own in text
    assert 'hotswap_requests_total{alias="legal",finish_reason="length",version="legal@v1"} 2.0' in text
    assert 'hotswap_requests_total{alias="legal",finish_reason="length",version="legal@v2"}' not in text
    assert "hotswap_running_shadows 0.0" in text


def test_shadow_is_forgotten_when_it_is_stopped(keeping_site: Site) -> None:
    """From the next request on."""
    _publish(keeping_site)
    _chat(keeping_site, _body())

    async def scenario(http: httpx.AsyncClient) -> tuple[dict[str, Any], int]:
        (listed,) = (await http.get(API)).json()["data"]
        stopped = await http.post(f"{API}/{listed['id']}/stop")
        await http.post(CHAT, json=_body())
        await keeping_site.services.shadow_keeper.settle()
        return stopped.json(), (await http.post(f"{API}/{listed['id']}/stop")).status_code

    stopped, again = on_site(keeping_site, scenario)
    assert ("stopped", 409, 1) == (stopped["state"], again, len(_rows(keeping_site)))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"share": 0}, 400, "share"),
        ({"share": 101}, 400, "share"),
        ({"share": "5"}, 400, "share"),
        ({"version": "2"}, 400, "version"),
        ({"version": "v9"}, 404, None),
        ({"alias": "nobody"}, 404, None),
        ({"rate": 1}, 400, "rate"),
    ],
)
def test_start_is_refused_when_the_body_is_wrong(
    fields: dict[str, Any], status: int, param: str | None, site: Site
) -> None:
    """The field is named, and nothing is started."""
    _publish(site)

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(API, json={"alias": "legal", "version": "v2", "share": 5, **fields})

    response = on_site(site, scenario)
    assert (status, param) == (response.status_code, response.json()["error"]["param"])
    assert [] == site.services.shadows.list()


def test_sampling_is_a_share_of_the_responses_when_many_come(site: Site) -> None:
    """Decided by the response's id alone; a binomial's spread around the share."""
    _publish(site)
    shadow = site.services.shadows.start("legal", "v2", share=5)
    taken = [shadow.samples(f"chatcmpl-{number}") for number in range(20_000)]
    assert abs(sum(taken) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    assert taken[:100] == [replace(shadow, state="stopped").samples(f"chatcmpl-{number}") for number in range(100)]
    assert all(replace(shadow, share=100.0).samples(f"chatcmpl-{number}") for number in range(100))


def test_copies_end_when_the_worker_is_lost(keeping_site: Site) -> None:
    """As requests do; a copy is dropped then, and waits for nobody."""
    _publish(keeping_site)
    client: EngineClient = keeping_site.client

    async def scenario(http: httpx.AsyncClient) -> None:
        await http.post(CHAT, json=_body(model="legal@v2", max_tokens=1, store=False))
        await http.post(API, json={"alias": "legal", "version": "v2", "share": 100})
        await http.post(CHAT, json=_body(max_tokens=60, ignore_eos=True))
        while not any(
            isinstance(command, SubmitCommand) and command.request.is_shadow
            for command in keeping_site.transport.commands
        ):
            await asyncio.sleep(0)
        client._give_up("the test says so")
        await keeping_site.services.shadow_keeper.settle()

    on_site(keeping_site, scenario)
    assert ["dropped"] == [row.outcome for row in _rows(keeping_site)]


def test_keeper_goes_on_when_shadows_can_t_be_read(keeping_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error is: its end would be the server's, which answers without knowing of shadows, too."""
    _publish(keeping_site)
    monkeypatch.setattr(shadows_module, "_CHECK_EVERY_S", 0.001)
    looks: list[int] = []

    class Failing(ShadowService):
        def list(self, *, is_running: bool = False, limit: int | None = None) -> list[Shadow]:
            looks.append(len(looks))
            if len(looks) == 2:
                raise OverflowError("a share that nobody expects")
            return super().list(is_running=is_running, limit=limit)

    keeper = ShadowKeeper(Failing(keeping_site.registry.database), keeping_site.client, keeping_site.services.metrics)

    asyncio.run(run_until(lambda: len(looks) >= 4, keeper.run()))
    assert [0, 1, 2, 3] == looks[:4]


def test_error_is_logged_when_a_copy_ends_by_one(keeping_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a copy, so nobody else would ever see it; the live answer is what it is."""
    _publish(keeping_site)

    def fail(self: ShadowService, answer: Any) -> None:
        raise OverflowError("a number that nobody expects")

    monkeypatch.setattr(ShadowService, "record", fail)
    with capture_logs() as logs:
        (response,) = _chat(keeping_site, _body())
    assert 200 == response.status_code
    (crash,) = [entry for entry in logs if entry["event"] == "shadow_crashed"]
    assert ("error", "a number that nobody expects") == (crash["log_level"], str(crash["exc_info"]))


def test_version_can_not_be_removed_when_it_is_a_running_shadow(site: Site) -> None:
    """Its copies would only fail."""
    from adapters.errors import ConflictError

    _publish(site)
    shadow: Shadow = site.services.shadows.start("legal", "v2", share=5)
    with pytest.raises(ConflictError, match=shadow.id):
        site.registry.remove("legal@v2")
    site.services.shadows.stop("legal")
    site.registry.remove("legal@v2")
    with pytest.raises(ConflictError):
        site.services.shadows.stop("legal")
