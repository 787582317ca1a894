"""Pins and unloading over /v1/adapters: which versions are in the engine's slots, and stay there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.registry import Registry
from server.messages import PinCommand, UnloadCommand
from tests.support.adapters_api import API, HELLO, call
from tests.support.engine import RECIPES, Bench, Site, on_site, wait_for_loads

FIRST, SECOND, *_ = RECIPES


def _places(site: Site) -> dict[str, bool]:
    """The versions in slots by their digest, and whether they are pinned."""
    return {entry.digest: entry.is_pinned for entry in site.engine.residency.report() if entry.slot is not None}


def _settle(site: Site) -> None:
    while site.engine.residency.is_loading:
        wait_for_loads(site.engine)
        site.engine.step()


def test_pin_brings_a_version_into_a_slot_and_keeps_it_when_the_alias_moves(site: Site) -> None:
    """The pin of an alias follows it; that of a version stays; both are listed."""
    one, two = site.publish("legal", FIRST).version, site.publish("legal", SECOND, promote=False).version
    pinned = call(site, "POST", "/legal/pin").json()
    _settle(site)
    assert ({"id": "legal", "object": "adapter.pins", "pinned": ["legal"]}, {one.digest: True}) == (
        pinned, _places(site),
    )  # fmt: skip
    call(site, "POST", "/legal/promote", json={"version": "v2"})
    assert ["legal", "legal@v1"] == call(site, "POST", "/legal/pin", json={"version": "v1"}).json()["pinned"]
    _settle(site)
    assert {one.digest: True, two.digest: True} == _places(site)
    assert ["legal@v1"] == call(site, "POST", "/legal/unpin", json={}).json()["pinned"]
    assert {one.digest: True, two.digest: False} == _places(site)
    assert ["legal@v1"] == call(site, "GET", "").json()["data"][0]["pinned"]


def test_pins_are_told_again_when_another_worker_speaks(site: Site, bench: Bench) -> None:
    """A worker that died forgot them; the next one hears them without anybody asking. Once each, not every second."""
    digest = site.publish("legal", FIRST).version.digest
    keeper = site.app.state.services.pins

    async def scenario(http: httpx.AsyncClient) -> list[Any]:
        await http.post(f"{API}/legal/pin")
        await keeper.reconcile()
        site.transport.restart(site.engine, epoch="epoch-2")
        while site.client.status is None or site.client.status.epoch != "epoch-2":
            await asyncio.sleep(0)
        await keeper.reconcile()
        await keeper.reconcile()
        return site.transport.commands

    assert [PinCommand((digest,)), PinCommand((digest,))] == on_site(site, scenario)


def test_pin_is_409_when_no_slot_would_be_left(site: Site) -> None:
    """Of four slots one is for all others; what was refused is not kept."""
    for number, recipe in enumerate(RECIPES):
        site.publish(f"a{number}", recipe)
    answers = [call(site, "POST", f"/a{number}/pin") for number in range(4)]
    assert [200, 200, 200, 409] == [answer.status_code for answer in answers]
    assert [["a2"], []] == [call(site, "GET", f"/a{number}").json()["pinned"] for number in (2, 3)]


@pytest.mark.parametrize("act", ["pin", "unpin", "unload"])
@pytest.mark.parametrize("body", [{"version": "2"}, {"versions": "v1"}, [], "v1"])
def test_pin_is_400_when_the_body_is_wrong(act: str, body: Any, site: Site) -> None:
    """An unknown field is never taken for the whole alias."""
    site.publish("legal", FIRST)
    assert 400 == call(site, "POST", f"/legal/{act}", json=body).status_code
    assert [] == site.transport.commands


def test_unload_frees_the_slot_when_the_version_is_idle(site: Site) -> None:
    """The version answers again when it is asked for."""
    digest = site.publish("legal", FIRST).version.digest
    call(site, "POST", "/legal/pin")
    _settle(site)
    refused = call(site, "POST", "/legal/unload", json={"version": "v1"})
    assert (409, {digest: True}) == (refused.status_code, _places(site))
    call(site, "POST", "/legal/unpin")
    done = call(site, "POST", "/legal/unload")
    assert (202, {"id": "legal@v1", "object": "adapter.unload", "digest": digest}) == (done.status_code, done.json())
    assert ({}, UnloadCommand(digest)) == (_places(site), site.transport.commands[-1])


def test_unload_waits_for_the_running_request_when_there_is_one(site: Site, open_chat: Callable[..., Any]) -> None:
    """The slot drains: the answer is the one without the unload, then the slot is empty."""
    digest = site.publish("legal", FIRST).version.digest
    alone, _ = open_chat(unload=False)
    answer, places = open_chat(unload=True)
    assert alone == answer
    assert ["draining"] == places
    assert {} == _places(site)
    assert digest not in site.engine.residency.resident


@pytest.fixture
def open_chat(site: Site) -> Callable[..., tuple[str, list[str]]]:
    """Chat with `legal`, unload it after the first step if asked to; returns the text, and where it was meanwhile."""

    def chat(*, unload: bool) -> tuple[str, list[str]]:
        body = {"model": "legal", "messages": [HELLO], "max_tokens": 10, "temperature": 0, "ignore_eos": True}

        async def scenario(http: httpx.AsyncClient) -> tuple[str, list[str]]:
            answering = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            while not site.engine.num_running:
                await asyncio.sleep(0)
            site.transport.permits = 1
            places = []
            if unload:
                await http.post(f"{API}/legal/unload")
                site.transport.permits = 2
                while site.transport.permits:
                    await asyncio.sleep(0)
                places = [(await http.get(f"{API}/legal")).json()["current"]["residency"]["place"]]
            site.transport.permits = None
            return (await answering).json()["choices"][0]["message"]["content"], places

        return on_site(site, scenario)

    return chat


def test_unload_is_503_when_there_is_no_engine(site: Site) -> None:
    """There is nobody to tell."""
    site.publish("legal", FIRST)

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(f"{API}/legal/unload")

    assert 503 == on_site(site, scenario, is_up=False).status_code


def test_unpin_is_409_when_the_settings_pin_the_alias(bench: Bench, registry: Registry, tmp_path: Path) -> None:
    """The setting says so for good; the answer names it, and the version is in the list of pins."""
    (tmp_path / "hotswap.toml").write_text('[serve]\npinned = ["legal"]\n')
    site = Site.build(bench, registry, tmp_path)
    site.publish("legal", FIRST)
    refused = call(site, "POST", "/legal/unpin")
    unload = call(site, "POST", "/legal/unload")
    site.engine.close()
    assert (409, 409) == (refused.status_code, unload.status_code)
    assert "serve.pinned" in refused.json()["error"]["message"]
    assert ["legal"] == call(site, "GET", "/legal").json()["pinned"]
