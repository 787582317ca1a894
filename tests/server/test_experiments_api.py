"""/v1/experiments over a real registry and database, with exposures from a real engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.engine import RECIPES, Site, on_site

FIRST, SECOND, *_ = RECIPES
API = "/v1/experiments"
ARMS = [{"name": "A", "version": "v1", "weight": 50}, {"name": "B", "version": "v2", "weight": 50}]


def _call(site: Site, method: str, path: str, **options: Any) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.request(method, path, **options)

    return on_site(site, scenario)


def _publish(site: Site, *aliases: str) -> None:
    for alias in aliases:
        site.publish(alias, FIRST)
        site.publish(alias, SECOND, promote=False)


def _start(site: Site, alias: str = "legal", **fields: Any) -> httpx.Response:
    return _call(site, "POST", API, json={"alias": alias, "arms": ARMS, **fields})


def test_experiment_splits_the_alias_until_it_is_stopped(site: Site) -> None:
    """Start, answer by an arm, report with feedback, stop, answer by the alias again."""
    _publish(site, "legal")
    started = _start(site, salt="s")
    body = started.json()
    assert (201, "running", ["legal@v1", "legal@v2"]) == (
        started.status_code, body["state"], [arm["version"] for arm in body["arms"]],
    )  # fmt: skip
    chat = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "user": "ann"}
    answer = _call(site, "POST", "/v1/chat/completions", json=chat)
    feedback = {"id": answer.json()["id"], "metric": "solved", "value": True}
    assert {"object": "feedback", "id": feedback["id"], "metric": "solved"} == (
        _call(site, "POST", "/v1/feedback", json=feedback).json()
    )
    report = _call(site, "GET", f"{API}/{body['id']}").json()["report"]
    (arm,) = [arm for arm in report if arm["num_exposures"]]
    assert (answer.headers["x-hotswap-arm"], 1, 0) == (arm["name"], arm["num_units"], arm["num_errors"])
    (solved,) = [item for item in arm["metrics"] if item["metric"] == "solved"]
    assert (1, 1.0) == (solved["num_outcomes"], solved["mean"])
    stopped = _call(site, "POST", f"{API}/{body['id']}/stop")
    assert ("stopped", True) == (stopped.json()["state"], stopped.json()["stopped_at"] >= body["created_at"])
    assert "alias" == _call(site, "POST", "/v1/chat/completions", json=chat).headers["x-hotswap-route"]
    assert 409 == _call(site, "POST", f"{API}/{body['id']}/stop").status_code


def test_list_gives_every_experiment_once_when_paged(site: Site) -> None:
    """The newest first, running or stopped."""
    _publish(site, "a", "b", "c")
    started = [_start(site, alias).json()["id"] for alias in ("a", "b", "c")]
    first = _call(site, "GET", f"{API}?limit=2").json()
    second = _call(site, "GET", f"{API}?limit=2&after={first['last_id']}").json()
    assert ([True, False], started[::-1]) == (
        [first["has_more"], second["has_more"]],
        [item["id"] for item in first["data"] + second["data"]],
    )


def test_start_is_409_when_another_experiment_runs_on_the_alias(site: Site) -> None:
    """One at a time an alias."""
    _publish(site, "legal")
    assert [201, 409] == [_start(site).status_code for _ in range(2)]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"arms": ARMS[:1]}, 400, "arms"),
        ({"arms": [ARMS[0]] * 2}, 400, "arms"),
        ({"arms": [ARMS[0], {**ARMS[1], "weight": 60}]}, 400, "arms"),
        ({"arms": [ARMS[0], {**ARMS[1], "weight": 0}]}, 400, "arms.1.weight"),
        ({"arms": [ARMS[0], {**ARMS[1], "weight": "50"}]}, 400, "arms.1.weight"),
        ({"arms": [ARMS[0], {**ARMS[1], "version": "2"}]}, 400, "arms.1.version"),
        ({"arms": ARMS * 9}, 400, "arms"),
        ({"alias": "LEGAL"}, 400, "alias"),
        ({"alias": "nobody"}, 404, None),
        ({"arms": [ARMS[0], {**ARMS[1], "version": "v9"}]}, 404, None),
        ({"salt": ""}, 400, "salt"),
        ({"metric": "x"}, 400, "metric"),
    ],
)
def test_start_is_refused_and_starts_nothing_when_the_body_is_wrong(
    fields: dict[str, Any], status: int, param: str | None, site: Site
) -> None:
    """The field is named, and the alias answers as before."""
    _publish(site, "legal")
    response = _start(site, **fields)
    assert (status, param) == (response.status_code, response.json()["error"]["param"])
    assert [] == site.experiments.list()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/legal", 400),
        ("GET", "/exp-000000000000", 404),
        ("POST", "/exp-000000000000/stop", 404),
        ("GET", "?after=exp-000000000000", 400),
        ("GET", "?after=x", 400),
        ("GET", "?limit=0", 400),
    ],
)
def test_call_is_refused_when_the_id_is_none(method: str, path: str, status: int, site: Site) -> None:
    """An id has one form, and stands for something."""
    response = _call(site, method, f"{API}{path}")
    assert status == response.status_code
    assert {"message", "type", "param", "code"} == set(response.json()["error"])
