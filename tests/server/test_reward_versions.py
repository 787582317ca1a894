"""Reward models beside chat versions: listed, shown, and never asked for an answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from adapters.manifest import REWARD_HEAD_FILE
from tests.support.engine import Site, on_site
from tests.support.tiny import make_manifest


def _publish_judge(site: Site, folder: Path) -> None:
    source = shutil.copytree(next(iter(site.adapters.values())), folder / "judge")
    size = site.base.model.config.hidden_size
    save_file({"score.weight": torch.ones(1, size)}, source / REWARD_HEAD_FILE)
    manifest = make_manifest(site.base.reference).model_copy(update={"kind": "reward"})
    site.registry.publish(source, manifest, alias="judge")


def test_chat_with_a_reward_model_is_a_400_when_it_is_asked_for(site: Site, tmp_path: Path) -> None:
    """By its alias and by its version, streamed or not; the answer says what it is."""
    _publish_judge(site, tmp_path)
    messages = [{"role": "user", "content": "hello"}]

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{"model": name, "messages": messages, "stream": name == "judge"} for name in ("judge", "judge@v1")]
        return [await http.post("/v1/chat/completions", json=body) for body in bodies]

    for response in on_site(site, scenario):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "model")
        assert error["message"].startswith("judge@v1 is a reward model: it scores answers for training and writes none")


def test_reward_model_is_no_arm_when_an_experiment_is_asked_for(site: Site, tmp_path: Path) -> None:
    """The 400 names the version; its object says its kind."""
    _publish_judge(site, tmp_path)
    arms = [{"name": name, "version": "v1", "weight": 50} for name in ("a", "b")]

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await http.post("/v1/experiments", json={"alias": "judge", "arms": arms}),
            await http.get("/v1/adapters/judge/versions/v1"),
        ]

    refused, shown = on_site(site, scenario)
    assert refused.status_code == 400
    assert "judge@v1 is a reward model, which answers nobody" in refused.json()["error"]["message"]
    assert shown.json()["kind"] == "reward"
