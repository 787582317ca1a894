"""The base model by its own name; the other names are the registry's and are tested with it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from adapters.registry import Registry
from server.model_names import resolve_model
from tests.support.engine import RECIPES, Site, on_site
from tests.support.versions import publish_text

FIRST, *_ = RECIPES
HUB_ID = "some-org/Some-Model-1B"


def _ask(site: Site, model: str, **options: Any) -> list[httpx.Response]:
    """Chat with a model, a completion by it, and its entry in the list of models."""
    messages = [{"role": "user", "content": "hello"}]

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        sampling = {"model": model, "temperature": 0, "max_tokens": 5}
        return [
            await http.post("/v1/chat/completions", json={**sampling, "messages": messages}, **options),
            await http.post("/v1/completions", json={**sampling, "prompt": "hello"}, **options),
            await http.get(f"/v1/models/{model}", **options),
        ]

    return on_site(site, scenario)


def test_base_model_answers_when_it_is_called_by_its_own_name(site: Site) -> None:
    """The same as for `base`, in chat, completions and models."""
    by_name, by_base = _ask(site, "tiny"), _ask(site, "base")
    assert [200] * 6 == [response.status_code for response in (*by_name, *by_base)]
    for found, expected in zip(by_name[:2], by_base[:2], strict=True):
        assert expected.json()["choices"] == found.json()["choices"]
        assert "base" == found.headers["x-hotswap-version"]
    assert ("tiny", "base") == (by_name[2].json()["id"], by_name[2].json()["parent"])


def test_alias_answers_when_it_has_the_base_models_own_name(site: Site) -> None:
    """Somebody published under just this name; the list has it once."""
    site.publish("tiny", FIRST)
    chat, completion, model = _ask(site, "tiny")
    assert ["tiny@v1"] * 2 == [response.headers["x-hotswap-version"] for response in (chat, completion)]
    assert "tiny@v1" == model.json()["parent"]
    listed = on_site(site, lambda http: http.get("/v1/models")).json()["data"]
    assert ["base", "tiny", "tiny@v1"] == [model["id"] for model in listed]


def test_base_models_own_name_is_absent_when_the_key_may_not_use_the_base(site: Site) -> None:
    """A key for aliases alone gets 404 by either name, in the words for a name that is nobody's."""
    site.publish("legal", FIRST)
    _, secret = site.keys.create("web", scopes=["chat"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}
    for own, absent in zip(_ask(site, "tiny", headers=headers), _ask(site, "none", headers=headers), strict=True):
        assert 404 == own.status_code
        assert absent.json()["error"]["message"].replace("'none'", "'tiny'") == own.json()["error"]["message"]
    listed = on_site(site, lambda http: http.get("/v1/models", headers=headers)).json()["data"]
    assert ["legal", "legal@v1"] == [model["id"] for model in listed]


@pytest.mark.parametrize("name", ["base", HUB_ID])
def test_base_is_resolved_when_its_name_is_a_hubs(name: str, registry: Registry) -> None:
    """A slash is no letter of an alias."""
    publish_text(registry, "one")
    found = resolve_model(registry, name, unit="u", base_name=HUB_ID)
    assert ("base", "base", None) == (found.alias, found.route, found.digest)


def test_model_is_found_when_its_name_has_a_slash(site: Site) -> None:
    """In the path of /v1/models, as a client sends it and encoded."""
    for path in ("a/b", "a%2Fb"):
        response = on_site(site, lambda http, path=path: http.get(f"/v1/models/{path}"))  # type: ignore[misc]
        assert (404, "model_not_found") == (response.status_code, response.json()["error"]["code"])
