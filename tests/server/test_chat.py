"""The life of a chat request below HTTP: binding, rendering, sampling parameters, and the exposure at its end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import InvalidNameError, PromptTooLongError
from adapters.registry import Registry
from server.callers import Caller
from server.calls import Call
from server.schemas import ChatRequest
from tests.support.engine import RECIPES, Bench, Site, on_site
from tests.support.tiny import CHATML

FIRST, SECOND, *_ = RECIPES


def _accept(site: Site, **fields: Any) -> Call:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
    services = site.app.state.services
    call: Call = asyncio.run(
        services.chat.accept(ChatRequest.model_validate(body), request_id="id1", caller=Caller.local())
    )
    return call


def test_call_is_bound_to_the_version_when_the_alias_moves_afterwards(site: Site) -> None:
    """The digest is fixed at admission."""
    one = site.publish("legal", FIRST)
    call = _accept(site, model="legal")
    site.publish("legal", SECOND)
    assert one.version.digest == call.generation.digest
    assert call.binding.version_label == "legal@v1"
    assert _accept(site, model="legal").binding.version_label == "legal@v2"


def test_call_has_the_rendered_prompt_when_messages_are_given(site: Site) -> None:
    """The tokens are the chat template's, up to where the assistant is to speak."""
    call = _accept(site)
    assert site.prompt("hi") == call.generation.prompt
    assert call.response_id == "chatcmpl-id1"


def test_prompt_is_the_systems_when_a_developer_speaks(site: Site) -> None:
    """No base model knows the newer name; parts are one text, and null fields of the SDK's messages are nothing."""
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    known = _accept(site, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    newer = _accept(
        site,
        messages=[
            {"role": "developer", "content": parts, "name": None},
            {"role": "user", "content": "hi", "refusal": None, "function_call": None, "audio": None},
        ],
    )
    assert known.generation.prompt == newer.generation.prompt


def test_prompt_has_the_name_when_the_template_shows_names(bench: Bench, registry: Registry, tmp_path: Path) -> None:
    """What to make of a name is the template's business; one that shows none drops it."""
    template = CHATML.replace("{{ message['role'] }}", "{{ message['role'] }}{{ message.get('name', '') }}")
    site = Site.build(bench, registry, tmp_path, chat_template=template)
    text = site.app.state.services.chat.prompt_text(
        _accept(site, messages=[{"role": "user", "name": "ann", "content": "hi"}]).generation.prompt
    )
    site.engine.close()
    assert text.startswith("<|im_start|>userann\nhi<|im_end|>")


@pytest.mark.parametrize("model", ["nobody", "base@v1", "No Such", "../etc", "legal@v9", "legal@deadbeef"])
def test_call_is_refused_when_the_model_is_unknown(model: str, site: Site) -> None:
    """Every way to name nothing is one error, and never the base model."""
    site.publish("legal", FIRST)
    with pytest.raises(InvalidNameError):
        _accept(site, model=model)


def test_call_is_refused_when_the_prompt_fills_the_context(site: Site) -> None:
    """One token of room is enough; none is not."""
    overhead = len(site.prompt(""))
    room = site.settings.max_context - overhead
    last = _accept(site, messages=[{"role": "user", "content": "a" * (room - 1)}])
    assert last.generation.sampling.max_tokens == 1
    with pytest.raises(PromptTooLongError, match=f"takes {site.settings.max_context} tokens"):
        _accept(site, messages=[{"role": "user", "content": "a" * room}])


def test_sampling_is_the_requests_when_it_gives_all(site: Site) -> None:
    """Every field reaches the engine as it was sent."""
    params = _accept(site, temperature=0, top_p=0.5, seed=7, stop="END", max_tokens=9).generation.sampling
    assert (params.temperature, params.top_p, params.seed, params.stop, params.max_tokens) == (0, 0.5, 7, ("END",), 9)


def test_answer_length_is_bounded_when_none_or_too_much_is_asked(site: Site) -> None:
    """The server's default, or what the context leaves."""
    assert site.settings.max_tokens == _accept(site).generation.sampling.max_tokens
    left = site.settings.max_context - len(site.prompt("hi"))
    assert left == _accept(site, max_tokens=100_000).generation.sampling.max_tokens


def test_unit_is_a_hash_when_a_user_is_named(site: Site) -> None:
    """The database can tell users apart and doesn't learn who they are."""
    unit = _accept(site, user="ann@example.com").unit
    assert unit.source == "user"
    assert "ann" not in unit.key
    assert unit == _accept(site, user="ann@example.com").unit
    assert unit != _accept(site, user="bob@example.com").unit


def test_exposure_is_written_when_the_last_event_is_seen(site: Site) -> None:
    """Whoever has read the answer's end can send feedback for it at once."""
    site.publish("legal", FIRST)

    async def scenario(http: httpx.AsyncClient) -> None:
        chat = site.app.state.services.chat
        body = ChatRequest.model_validate({"model": "legal", "messages": [{"role": "user", "content": "hi"}]})
        call = await chat.accept(body, request_id="id1", caller=Caller.local())
        async for event in chat.generate(call):
            assert (event.finish_reason is not None) == bool(site.exposures())

    on_site(site, scenario)
    (row,) = site.exposures()
    assert (row.response_id, row.alias, row.number, row.route) == ("chatcmpl-id1", "legal", 1, "alias")
    assert row.completion_tokens > 0
    assert row.ttft_ms is not None
    assert 0 <= row.ttft_ms <= row.total_ms
