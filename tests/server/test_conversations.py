"""Which conversations the API keeps, over a real engine and database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from adapters.registry import Registry
from adapters.tables import ConversationRow, ExposureRow, utc_now
from tests.support.background import run_until
from tests.support.engine import RECIPES, Bench, Exchange, Site, on_site
from tests.support.tiny import CHATML_WITH_TOOLS

FIRST, *_ = RECIPES
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]


@pytest.fixture
def keeping_site(bench: Bench, registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """A server whose operator has asked for conversations."""
    site = Site.build(bench, registry, tmp_path, keep_conversations=True)
    yield site
    site.engine.close()


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "legal", "messages": MESSAGES, "temperature": 0, "max_tokens": 4, **fields}


def _post(site: Site, *bodies: dict[str, Any], path: str = CHAT) -> list[httpx.Response]:
    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post(path, json=body) for body in bodies]

    return on_site(site, scenario)


def _kept(site: Site) -> list[ConversationRow]:
    with site.registry.database.read() as session:
        return list(session.scalars(select(ConversationRow).order_by(ConversationRow.kept_at)))


def test_conversation_is_kept_when_the_operator_asked_for_it(keeping_site: Site) -> None:
    """Messages and the answer by the response's id, streamed or not; the same prompt has the same name."""
    keeping_site.publish("legal", FIRST)
    whole, streamed = _post(keeping_site, _body(), _body(stream=True))
    first, second = _kept(keeping_site)
    assert (whole.json()["id"], MESSAGES, []) == (first.response_id, first.messages, first.tools)
    assert [whole.json()["choices"][0]["message"]] == first.answers == second.answers
    assert second.response_id in streamed.text
    assert first.prompt_sha256 == second.prompt_sha256


def test_every_answer_is_kept_when_several_were_asked_for(keeping_site: Site) -> None:
    """In the order of their index."""
    keeping_site.publish("legal", FIRST)
    (response,) = _post(keeping_site, _body(n=3, temperature=1, seed=5))
    (row,) = _kept(keeping_site)
    assert [choice["message"] for choice in response.json()["choices"]] == row.answers


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_kept_when_the_request_declines(stream: bool, keeping_site: Site) -> None:
    """`store: false` holds whatever the operator wants; the exposure without any text is written as ever."""
    keeping_site.publish("legal", FIRST)
    (response,) = _post(keeping_site, _body(store=False, stream=stream))
    assert (200, [], 1) == (response.status_code, _kept(keeping_site), len(keeping_site.exposures()))


def test_nothing_is_kept_when_nobody_asked_for_it(site: Site) -> None:
    """The default; and a request that insists is told."""
    site.publish("legal", FIRST)
    plain, null, insisting = _post(site, _body(), _body(store=None), _body(store=True))
    assert [200, 200, 400] == [response.status_code for response in (plain, null, insisting)]
    assert ("store", True) == (
        insisting.json()["error"]["param"],
        "this server keeps no conversations" in insisting.json()["error"]["message"],
    )
    assert [] == _kept(site)


def test_store_is_taken_when_the_server_keeps_conversations(keeping_site: Site) -> None:
    """To insist on what is done anyway changes nothing."""
    keeping_site.publish("legal", FIRST)
    assert [200] == [response.status_code for response in _post(keeping_site, _body(store=True))]
    assert 1 == len(_kept(keeping_site))


def test_completion_is_not_kept_when_it_is_no_conversation(keeping_site: Site) -> None:
    """Text without messages is no row of chat data."""
    body = {"model": "base", "prompt": "once", "max_tokens": 2}
    assert [200] == [response.status_code for response in _post(keeping_site, body, path="/v1/completions")]
    assert [] == _kept(keeping_site)


def test_broken_answer_is_not_kept_when_the_client_leaves(keeping_site: Site) -> None:
    """Half an answer teaches nothing."""
    keeping_site.publish("legal", FIRST)

    async def scenario(http: httpx.AsyncClient) -> None:
        keeping_site.transport.permits = 6
        brief = [{"role": "user", "content": "x"}]
        exchange = Exchange(keeping_site.app, CHAT, _body(stream=True, max_tokens=12, messages=brief))
        await exchange.start()
        await exchange.chunk()
        await exchange.hang_up()

    on_site(keeping_site, scenario)
    assert ["cancelled"] == [row.finish_reason for row in keeping_site.exposures()]
    assert [] == _kept(keeping_site)


def test_calls_are_kept_as_calls_when_the_model_makes_one(
    own_bench: Callable[..., Bench], registry: Registry, tmp_path: Path
) -> None:
    """As the client got them, with the tools that they are of."""
    site = Site.build(
        own_bench(max_context=512), registry, tmp_path, max_context=512, chat_template=CHATML_WITH_TOOLS,
        keep_conversations=True,
    )  # fmt: skip
    site.transport.script = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "time"}}]
    (response,) = _post(site, _body(model="base", tools=tools, max_tokens=120))
    (row,) = _kept(site)
    assert ([response.json()["choices"][0]["message"]], tools) == (row.answers, row.tools)
    assert "time" == row.answers[0]["tool_calls"][0]["function"]["name"]
    site.engine.close()


def test_answer_comes_all_the_same_when_its_conversation_can_not_be_written(keeping_site: Site) -> None:
    """The log is no part of the answer."""
    keeping_site.publish("legal", FIRST)
    with keeping_site.registry.database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE conversations")
    assert [200] == [response.status_code for response in _post(keeping_site, _body())]
    assert 1 == len(keeping_site.exposures())


def test_old_conversations_go_when_the_server_runs(keeping_site: Site) -> None:
    """The background task deletes by the settings; what is younger stays."""
    keeping_site.publish("legal", FIRST)
    _post(keeping_site, _body(), _body())
    old, young = _kept(keeping_site)
    with keeping_site.registry.database.write() as session:
        moment = utc_now() - timedelta(days=keeping_site.settings.conversation_days, minutes=1)
        row = ConversationRow.response_id == old.response_id
        session.execute(update(ConversationRow).where(row).values(kept_at=moment))

    asyncio.run(run_until(lambda: len(_kept(keeping_site)) == 1, keeping_site.services.conversations.run()))
    assert [young.response_id] == [row.response_id for row in _kept(keeping_site)]
    with keeping_site.registry.database.read() as session:
        assert 2 == len(session.scalars(select(ExposureRow)).all())
