"""`model: "auto"` over the real routes: headers, rules, keys, experiments, exposures, and POST /v1/route."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import pytest

from adapters.routing.rules import parse_rules
from server.routing import keep_router
from tests.support.engine import RECIPES, Site, on_site
from tests.support.routing import ABOUT_BREAD, ABOUT_LEASE, ABOUT_NOTHING, LEGAL, PROMPTS

FIRST, SECOND, THIRD, *_ = RECIPES


@pytest.fixture
def routed(site: Site) -> Site:
    """A site with two aliases whose router is trained."""
    site.publish("legal", FIRST, prompts=PROMPTS["legal"])
    site.publish("cooking", SECOND, prompts=PROMPTS["cooking"])
    site.services.routing.reconcile()
    return site


def _chat(*turns: str, **more: Any) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(turns):
        messages += [{"role": "assistant", "content": "I see."}] if number else []
        messages.append({"role": "user", "content": turn})
    return {"model": "auto", "messages": messages, "max_tokens": 2, "temperature": 0, **more}


def _post(
    site: Site, body: dict[str, Any], path: str = "/v1/chat/completions", key: str | None = None
) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(path, json=body, headers=headers)

    return on_site(site, scenario)


def _told(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 200, response.text
    return response.headers["x-hotswap-version"], response.headers["x-hotswap-route"]


def test_auto_is_answered_by_the_alias_when_the_router_is_sure(routed: Site) -> None:
    """Headers say how and how sure; the body keeps the name that was asked for; the exposure has both."""
    response = _post(routed, _chat(ABOUT_LEASE))
    assert ("legal@v1", "router") == _told(response)
    assert "auto" == response.json()["model"]
    (exposure,) = routed.exposures()
    assert ("legal", "router", 1) == (exposure.alias, exposure.route, exposure.number)
    assert f"{exposure.confidence:.3f}" == response.headers["x-hotswap-confidence"]
    assert 0.5 <= float(response.headers["x-hotswap-confidence"]) <= 1


def test_auto_is_answered_by_the_base_model_when_the_router_abstains(routed: Site) -> None:
    """Said in the header and in the exposure, with the confidence of the likeliest."""
    response = _post(routed, _chat(ABOUT_NOTHING))
    assert ("base", "abstained") == _told(response)
    (exposure,) = routed.exposures()
    assert ("base", "abstained", None) == (exposure.alias, exposure.route, exposure.digest)
    assert exposure.confidence is not None
    assert exposure.confidence < 0.5


def test_explicit_name_wins_when_the_router_would_choose_another(routed: Site) -> None:
    """No router, no rule, no confidence."""
    routed.services.routing.set_rules(parse_rules({"rules": [{"alias": "cooking", "matches": "."}]}))
    response = _post(routed, _chat(ABOUT_BREAD, model="legal"))
    assert ("legal@v1", "alias") == _told(response)
    assert "x-hotswap-confidence" not in response.headers


def test_system_prompt_decides_nothing_when_it_is_about_another_topic(routed: Site) -> None:
    """Templates stand there, not questions."""
    body = _chat(ABOUT_LEASE)
    body["messages"].insert(0, {"role": "system", "content": "bake bread dough"})
    assert ("legal@v1", "router") == _told(_post(routed, body))


def test_conversation_stays_with_its_alias_when_a_turn_says_little(routed: Site) -> None:
    """Nothing is kept between requests: the whole conversation comes with each."""
    assert ("legal@v1", "router") == _told(_post(routed, _chat(ABOUT_LEASE, "ok")))
    assert ("cooking@v1", "router") == _told(_post(routed, _chat(ABOUT_LEASE, "bread dough oven")))


def test_rules_look_at_metadata_key_and_last_message_when_auto_is_asked(routed: Site) -> None:
    """In their order, before the router."""
    key, secret = routed.keys.create("web", scopes=["chat"])
    rules = [
        {"name": "by team", "alias": "cooking", "metadata": {"team": "kitchen"}},
        {"name": "by word", "alias": "base", "matches": "(?i)secret"},
        {"name": "by key", "alias": "cooking", "key": key.id},
    ]
    routed.services.routing.set_rules(parse_rules({"rules": rules}))
    _, other = routed.keys.create("other", scopes=["chat"])
    found = [
        _told(_post(routed, _chat(ABOUT_LEASE, metadata={"team": "kitchen"}), key=other)),
        _told(_post(routed, _chat(ABOUT_LEASE, "a Secret"), key=other)),
        _told(_post(routed, _chat("a secret", ABOUT_LEASE), key=secret)),
        _told(_post(routed, _chat(ABOUT_LEASE), key=other)),
    ]
    assert [("cooking@v1", "rule"), ("base", "rule"), ("cooking@v1", "rule"), ("legal@v1", "router")] == found


def test_key_gets_its_own_aliases_alone_when_it_asks_for_auto(routed: Site) -> None:
    """Where only the base model is left and the key may not use it, the request is refused, not answered by chance."""
    _, secret = routed.keys.create("kitchen", scopes=["chat"], aliases=["cooking"])
    assert ("cooking@v1", "router") == _told(_post(routed, _chat(ABOUT_BREAD), key=secret))
    refused = _post(routed, _chat(ABOUT_LEASE), key=secret)
    assert (404, "model_not_found") == (refused.status_code, refused.json()["error"]["code"])
    assert "may not use the base model" in refused.json()["error"]["message"]


def test_experiment_splits_the_alias_when_the_router_has_chosen_it(routed: Site) -> None:
    """The arm is assigned as ever; the route says how the alias was found."""
    routed.publish("legal", THIRD, promote=False)
    experiment = routed.experiments.create("legal", [("A", "v1", 1.0), ("B", "v2", 99.0)], salt="s")
    arms = {_post(routed, _chat(ABOUT_LEASE, user=f"u{number}")).headers["x-hotswap-arm"] for number in range(4)}
    assert "B" in arms
    assert {("router", experiment.id)} == {(row.route, row.experiment_id) for row in routed.exposures()}


def test_completions_are_routed_when_auto_is_asked(routed: Site) -> None:
    """By the text of their prompts, given as text or as tokens."""
    tokens = routed.base.tokenizer.encode(ABOUT_BREAD)
    for prompt, expected in (
        (ABOUT_LEASE, "legal@v1"),
        ([ABOUT_LEASE, ABOUT_LEASE], "legal@v1"),
        (tokens, "cooking@v1"),
    ):
        body = {"model": "auto", "prompt": prompt, "max_tokens": 2}
        assert (expected, "router") == _told(_post(routed, body, "/v1/completions"))


def test_promoted_version_is_routed_to_when_the_server_goes_on(routed: Site) -> None:
    """The task beside the routes trains by itself; no restart, and what fails is tried again."""
    routed.publish("music", THIRD, prompts=PROMPTS["music"])

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        keeping = asyncio.create_task(keep_router(routed.services.routing))
        while routed.services.routing.snapshot.number != 2:
            await asyncio.sleep(0.01)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        return await http.post("/v1/chat/completions", json=_chat("which chords for this guitar melody"))

    assert ("music@v1", "router") == _told(on_site(routed, scenario))


def _listed(site: Site, key: str | None = None) -> list[str]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return [model["id"] for model in on_site(site, lambda http: http.get("/v1/models", headers=headers)).json()["data"]]


def test_auto_is_listed_when_something_can_be_routed(site: Site) -> None:
    """By a rule or by what was learned; programs let their users choose among what the list holds."""
    site.publish("legal", FIRST, prompts=PROMPTS["legal"])
    site.services.routing.reconcile()
    assert "auto" not in _listed(site)
    site.services.routing.set_rules(parse_rules({"rules": [{"alias": "absent", "matches": "."}]}))
    assert "auto" not in _listed(site)
    site.services.routing.set_rules(parse_rules({"rules": [{"alias": "legal", "matches": "."}]}))
    assert ["base", "tiny", "auto", "legal", "legal@v1"] == _listed(site)
    site.services.routing.set_rules(())
    site.publish("cooking", SECOND, prompts=PROMPTS["cooking"])
    site.services.routing.reconcile()
    assert "auto" in _listed(site)
    found = on_site(site, lambda http: http.get("/v1/models/auto")).json()
    assert ("auto", None) == (found["id"], found["parent"])


def test_auto_is_listed_for_a_key_when_it_may_use_what_can_be_chosen(routed: Site) -> None:
    """An alias that the router knows; not for a key of another alias alone."""
    routed.publish("private", THIRD)
    _, cook = routed.keys.create("cook", scopes=["chat"], aliases=["cooking"])
    _, other = routed.keys.create("other", scopes=["chat"], aliases=["private", "base"])
    assert ["auto", "cooking", "cooking@v1"] == _listed(routed, cook)
    assert "auto" not in _listed(routed, other)


# POST /v1/route ------------------------------------------------------------------------------------------------------


def test_route_explains_when_asked(routed: Site) -> None:
    """Probabilities, threshold, the nearest prompts; nothing is generated, so no exposure is written."""
    body = _post(routed, {"input": LEGAL[0]}, "/v1/route").json()
    assert ("legal", "router", 0.5, 1, None) == tuple(
        body[n] for n in ("alias", "route", "threshold", "router", "rule")
    )
    assert ["legal", "cooking"] == [item["alias"] for item in body["probabilities"]]
    assert {"alias": "legal", "text": LEGAL[0], "similarity": pytest.approx(1.0, abs=1e-4)} == body["nearest"][0]
    assert [] == routed.exposures()
    assert 0 == len([command for command in routed.transport.commands if type(command).__name__ == "SubmitCommand"])


def test_route_reads_a_conversation_when_given_messages(routed: Site) -> None:
    """And metadata for the rules."""
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": ABOUT_BREAD}]
    assert "cooking" == _post(routed, {"messages": messages}, "/v1/route").json()["alias"]
    rules = {"rules": [{"name": "team", "alias": "legal", "metadata": {"team": "law"}}]}
    routed.services.routing.set_rules(parse_rules(rules))
    body = _post(routed, {"messages": messages, "metadata": {"team": "law"}}, "/v1/route").json()
    assert ("legal", "rule", "team", []) == tuple(body[n] for n in ("alias", "route", "rule", "probabilities"))


def test_nearest_prompts_are_hidden_when_a_key_may_only_chat(routed: Site) -> None:
    """They are training data."""
    _, chat = routed.keys.create("web", scopes=["chat"])
    _, trusted = routed.keys.create("team", scopes=["chat", "adapters"])
    assert _post(routed, {"input": LEGAL[0]}, "/v1/route", chat).json()["nearest"] is None
    assert LEGAL[0] == _post(routed, {"input": LEGAL[0]}, "/v1/route", trusted).json()["nearest"][0]["text"]


@pytest.mark.parametrize("body", [{}, {"input": "a", "messages": [{"role": "user", "content": "b"}]}, {"text": "a"}])
def test_route_refuses_a_body_when_it_is_not_one_text(body: dict[str, Any], routed: Site) -> None:
    """Either a text or messages, and nothing unknown."""
    assert 400 == _post(routed, body, "/v1/route").status_code
