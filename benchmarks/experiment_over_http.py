"""Two experiments as a new user would run them, over HTTP alone: one with a true difference, one with none.

    python -m benchmarks.experiment_over_http [--users 1000] [--control 0.4] [--treatment 0.55] [--seed 1]

The server's real processes answer, around a toy engine that computes nothing; users are simulated, each asks once and
says whether the answer helped. Verdicts are read along the way, as often as anybody would look. Nothing is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters.base_files import pull_base
from adapters.database import open_database
from adapters.imports import import_folder
from adapters.registry import Registry
from adapters.settings import CoreSettings, resolve_home
from adapters.store import ArtifactStore
from benchmarks.adapters8 import BenchHome, prepared_home, save_adapters
from clients.local_server import started_server

__all__ = ["Scenario", "run_scenario"]

_CONCURRENCY = 8
_NUM_LOOKS = 4
_METRIC = "helped"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated: each arm's share of users who are helped."""

    title: str
    shares: dict[str, float]
    num_users: int
    seed: int


async def run_scenario(http: httpx.AsyncClient, alias: str, scenario: Scenario) -> dict[str, Any]:
    """Create an experiment, let its users come, print the verdict at each look, stop it; returns the last report."""
    body = {
        "alias": alias,
        "arms": [{"name": "A", "version": "v1", "weight": 50}, {"name": "B", "version": "v2", "weight": 50}],
        "salt": f"{scenario.title} {scenario.seed}",
        "metric": {"name": _METRIC, "direction": "increase", "kind": "share"},
        "guardrails": [
            {"metric": "error_rate", "direction": "decrease", "margin": 0.05},
            {"metric": "total_ms", "direction": "decrease", "margin": 0.5, "is_relative": True},
        ],
        "smallest_effect": 0.05,
        "planned_units": scenario.num_users,
    }
    experiment = (await _send(http, "POST", "/v1/experiments", body))["id"]
    chance = random.Random(scenario.seed)  # noqa: S311 - a simulation
    moods = [chance.random() for _ in range(scenario.num_users)]
    print(f"\n{scenario.title}: {_describe(scenario.shares)}\n")
    per_look = -(-scenario.num_users // _NUM_LOOKS)
    for start in range(0, scenario.num_users, per_look):
        users = range(start, min(start + per_look, scenario.num_users))
        await _let_come(http, alias, scenario, [(f"{scenario.title}-{user}", moods[user]) for user in users])
        report = await _send(http, "GET", f"/v1/experiments/{experiment}")
        print(f"after {users[-1] + 1:5,} users: {report['verdict']['kind']:12} {report['verdict']['sentence']}")
    await _send(http, "POST", f"/v1/experiments/{experiment}/stop")
    return await _send(http, "GET", f"/v1/experiments/{experiment}")


async def _let_come(http: httpx.AsyncClient, alias: str, scenario: Scenario, users: list[tuple[str, float]]) -> None:
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def come(user: str, mood: float) -> None:
        async with gate:
            chat = {"model": alias, "messages": [{"role": "user", "content": "Help!"}], "max_tokens": 4, "user": user}
            response = await http.post("/v1/chat/completions", json=chat)
            _check(response)
            helped = mood < scenario.shares[response.headers["x-hotswap-arm"]]
            feedback = {"id": response.json()["id"], "metric": _METRIC, "value": helped}
            await _send(http, "POST", "/v1/feedback", feedback)

    await asyncio.gather(*(come(user, mood) for user, mood in users))


async def _send(http: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    response = await http.request(method, path, json=body)
    _check(response)
    found: dict[str, Any] = response.json()
    return found


def _check(response: httpx.Response) -> None:
    if response.is_error:
        raise SystemExit(f"{response.request.method} {response.url.path}: {response.status_code} {response.text}")


def _describe(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} of {arm}'s users are helped" for arm, share in shares.items())


def _publish_second_version(home: BenchHome) -> str:
    """Give the only alias of a home a second version, without moving it; returns the alias."""
    alias = home.adapters[0].alias
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(open_database(home.core.resolved_database_url)) as database,
    ):
        registry = Registry(database, ArtifactStore(home.core.home / "store"))
        source = save_adapters(Path(folder), pull_base(home.core.base, home.core.home), 2)[1]
        import_folder(source, alias, core=home.core, registry=registry)
        registry.rollback(alias)
    return alias


async def _run_all(url: str, alias: str, scenarios: list[Scenario]) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        return [(await run_scenario(http, alias, scenario))["id"] for scenario in scenarios]


def main() -> None:
    """Run both, and show each as `hotswap experiments show` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--control", type=float, default=0.4)
    parser.add_argument("--treatment", type=float, default=0.55)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    scenarios = [
        Scenario("a true difference", {"A": options.control, "B": options.treatment}, options.users, options.seed),
        Scenario("no difference", {"A": options.control, "B": options.control}, options.users, options.seed),
    ]
    with prepared_home(CoreSettings.load(resolve_home()), 1) as home:
        alias = _publish_second_version(home)
        command = (sys.executable, "-m", "benchmarks.shell")
        with started_server(home.environment, home.core.home / "server.log", command=command) as server:
            found = asyncio.run(_run_all(server.url, alias, scenarios))
        for experiment in found:
            print("\n" + "=" * 100, flush=True)
            show = [sys.executable, "-m", "clients.cli", "experiments", "show", experiment]
            subprocess.run(show, env=home.environment | {"COLUMNS": "100", "PATH": os.environ["PATH"]}, check=True)


if __name__ == "__main__":
    main()
