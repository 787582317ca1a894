"""/v1/experiments over a real registry and database, with exposures from a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from adapters.errors import DatabaseBusyError
from adapters.experiments import ExperimentService
from adapters.manifest import BaseReference
from adapters.records import Experiment, KeyLimits
from adapters.tables import ExposureRow, FeedbackRow, utc_now
from server import chat as chat_module
from server.prompts import chat_prompt
from tests.support.engine import RECIPES, Exchange, Site, on_site

FIRST, SECOND, *_ = RECIPES
API = "/v1/experiments"
CHAT = "/v1/chat/completions"
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


def _chat(site: Site, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}
    return _call(site, "POST", CHAT, json=body, headers=headers)


def test_experiment_goes_its_way_when_driven_over_http(site: Site) -> None:
    """Draft, start, weights, undo, stop; every act is in the log, and the states can be asked for."""
    _publish(site, "legal")
    plan: dict[str, Any] = {
        "metric": {"name": "solved", "direction": "increase"},
        "guardrails": [{"metric": "error_rate", "direction": "decrease", "margin": 0.01}],
        "smallest_effect": 0.05,
        "ends_at": 4_000_000_000,
    }
    draft = _start(site, draft=True, traffic=50, **plan).json()
    assert ("draft", 50, 1, None, 4_000_000_000) == (
        draft["state"], draft["traffic"], draft["stage"], draft["starts_at"], draft["ends_at"],
    )  # fmt: skip
    assert {**plan["metric"], "kind": "number"} == draft["metric"]
    assert [{**plan["guardrails"][0], "is_relative": False, "kind": "number"}] == draft["guardrails"]
    path = f"{API}/{draft['id']}"
    assert [draft["id"]] == [item["id"] for item in _call(site, "GET", f"{API}?state=draft").json()["data"]]
    started = _call(site, "POST", f"{path}/start").json()
    assert ("running", True) == (started["state"], started["starts_at"] >= draft["created_at"])
    shares = {"arms": [{"name": "A", "weight": 90}, {"name": "B", "weight": 10}], "traffic": 80}
    changed = _call(site, "POST", f"{path}/weights", json=shares).json()
    assert (2, 80, [90, 10]) == (changed["stage"], changed["traffic"], [arm["weight"] for arm in changed["arms"]])
    undone = _call(site, "POST", f"{path}/undo").json()
    assert (3, 50, [50, 50]) == (undone["stage"], undone["traffic"], [arm["weight"] for arm in undone["arms"]])
    assert 409 == _call(site, "POST", f"{path}/undo").status_code
    assert "stopped" == _call(site, "POST", f"{path}/stop").json()["state"]
    first = _call(site, "GET", f"{path}/decisions?limit=3").json()
    rest = _call(site, "GET", f"{path}/decisions?after={first['last_id']}").json()
    decisions = first["data"] + rest["data"]
    assert [("create", 1), ("start", 1), ("change_weights", 2), ("undo", 3), ("stop", 3)] == [
        (item["action"], item["stage"]) for item in decisions
    ]
    assert {"local"} == {item["by"] for item in decisions}
    assert decisions[2]["id"] == decisions[3]["numbers"]["undoes"]


def test_holdout_is_set_and_shown_when_asked_over_http(site: Site) -> None:
    """A unit in it is answered by the alias, and the route says so; not while an experiment runs."""
    _publish(site, "legal")
    path = "/v1/adapters/legal/holdout"
    assert 0 == _call(site, "GET", path).json()["percent"]
    assert 50 == _call(site, "PUT", path, json={"percent": 50}).json()["percent"]
    _start(site)
    routes = {_chat(site, user=f"user-{index}").headers["x-hotswap-route"] for index in range(8)}
    assert {"holdout", "experiment"} == routes
    assert {"holdout", "experiment"} == {row.route for row in site.exposures()}
    assert 409 == _call(site, "PUT", path, json={"percent": 0}).status_code
    assert 400 == _call(site, "PUT", path, json={"percent": 51}).status_code
    assert 404 == _call(site, "GET", "/v1/adapters/nobody/holdout").status_code


def test_unit_is_the_user_the_header_or_the_conversation_when_asked(site: Site) -> None:
    """In this order; a name is one unit wherever it stands, a conversation stays one while it grows; all are hashes."""
    beginning = [{"role": "system", "content": "s"}, {"role": "user", "content": "ann@example.com"}]
    longer = [*beginning, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    header = {"x-hotswap-unit": "ann@example.com"}
    _chat(site, model="base", user="ann@example.com", headers={"x-hotswap-unit": "bob"})
    _chat(site, model="base", headers=header)
    for messages in (beginning, longer, beginning[:1]):
        _chat(site, model="base", messages=messages)
    for prompt in ("x", ["x", "y"], [1, 2]):
        body = {"model": "base", "prompt": prompt, "max_tokens": 1}
        assert 200 == _call(site, "POST", "/v1/completions", json=body).status_code
    rows = site.exposures()
    assert ["user", "header", *["conversation"] * 6] == [row.unit_source for row in rows]
    ann, again, first, second, system, text, texts, tokens = [row.unit for row in rows]
    assert "71d4f55f72fa128dfb468a1a3901507c" == ann == again  # as docs/experiments.md publishes it
    assert first == second
    assert text == texts
    assert 5 == len({ann, first, system, text, tokens})


def test_unit_is_the_same_when_a_name_is_not_ascii(site: Site) -> None:
    """A header is bytes: those of UTF-8 are the name's, as in the body."""
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    _chat(site, model="base", user="用户")
    _call(site, "POST", CHAT, json=body, headers={b"x-hotswap-unit": "用户".encode()})
    assert ["0d0e1a86b3aa787709b00329fcd32b5b"] * 2 == [row.unit for row in site.exposures()]


@pytest.mark.parametrize("name", ["x-hotswap-unit", "x-hotswap-arm"])
def test_chat_is_refused_when_a_header_is_too_long(name: str, site: Site) -> None:
    """The header is named."""
    for value in ("", "x" * 257):
        refused = _chat(site, model="base", headers={name: value})
        assert (400, name) == (refused.status_code, refused.json()["error"]["param"])


def test_arm_is_the_testers_when_the_header_names_it(site: Site) -> None:
    """It answers, its exposure is marked, and it counts nowhere, nor does feedback on it."""
    _publish(site, "legal")
    started = _start(site).json()
    for arm, version in (("A", "legal@v1"), ("B", "legal@v2")):
        for user in ("ann", "bob", "eve"):
            answer = _chat(site, user=user, headers={"x-hotswap-arm": arm})
            assert (arm, version) == (answer.headers["x-hotswap-arm"], answer.headers["x-hotswap-version"])
            assert "forced" == answer.headers["x-hotswap-route"]
    _call(site, "POST", "/v1/feedback", json={"id": answer.json()["id"], "metric": "solved", "value": 1})
    assert [(True, "experiment")] * 6 == [(row.forced, row.route) for row in site.exposures()]
    assert {"A": [], "B": []} == site.experiments.outcomes(started["id"], 1)
    report = _call(site, "GET", f"{API}/{started['id']}").json()["report"]
    assert [0, 0] == [arm["num_exposures"] for arm in report]
    refused = _chat(site, headers={"x-hotswap-arm": "C"})
    assert (400, "x-hotswap-arm") == (refused.status_code, refused.json()["error"]["param"])


@pytest.mark.parametrize("stream", [False, True])
def test_answer_names_the_arm_when_its_version_fails(stream: bool, site: Site) -> None:
    """In the headers of good answers, so that clients see which version it was."""
    other = BaseReference(name="other", fingerprint="e" * 64, quantisation="none")
    site.publish("legal", FIRST)
    site.publish("legal", SECOND, reference=other, promote=False)
    started = _start(site).json()
    failed = _chat(site, headers={"x-hotswap-arm": "B"}, stream=stream)
    assert 500 == failed.status_code
    assert {"x-hotswap-arm": "B", "x-hotswap-version": "legal@v2", "x-hotswap-experiment": started["id"]} == {
        name: failed.headers[name] for name in ("x-hotswap-arm", "x-hotswap-version", "x-hotswap-experiment")
    }


def test_notes_say_what_may_be_a_slip_when_an_experiment_is_made_or_changed(site: Site) -> None:
    """A name that is nearly a built-in one; whom a new stage leaves out."""
    _publish(site, "legal")
    made = _start(site, metric={"name": "error_rat"}, planned_units=500).json()
    (slip,) = made["notes"]
    assert "did you mean 'error_rate'?" in slip
    for user in ("ann", "bob", "ann"):
        _chat(site, user=user)
    _chat(site, user="tester", headers={"x-hotswap-arm": "B"})
    path = f"{API}/{made['id']}"
    assert [slip] == _call(site, "GET", path).json()["notes"]
    shares = {"arms": [{"name": "A", "weight": 90}, {"name": "B", "weight": 10}]}
    for stage, answer in (
        (2, _call(site, "POST", f"{path}/weights", json=shares)),
        (3, _call(site, "POST", f"{path}/undo")),
    ):
        first, note = answer.json()["notes"]
        assert slip == first
        assert f"The verdict reads stage {stage} alone" in note
        assert "what users did in earlier stages (2 users) takes no part in it" in note


def test_change_is_answered_when_nobody_can_be_counted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The act is done: an error would have its client undo one more."""
    _publish(site, "legal")
    made = _start(site).json()

    def refuse(_service: ExperimentService, _experiment: Experiment) -> str:
        raise DatabaseBusyError("others hold the database")

    monkeypatch.setattr(ExperimentService, "note_on_stage", refuse)
    shares = {"arms": [{"name": "A", "weight": 90}, {"name": "B", "weight": 10}]}
    answer = _call(site, "POST", f"{API}/{made['id']}/weights", json=shares)
    assert (200, made["notes"], 2) == (answer.status_code, answer.json()["notes"], answer.json()["stage"])


def test_arm_is_nobodys_to_choose_when_the_key_lacks_the_scope(site: Site) -> None:
    """An application's key may chat; only a key for experiments may overrule the assignment."""
    _publish(site, "legal")
    _start(site)
    _, plain = site.keys.create("web", scopes=["chat"])
    _, tester = site.keys.create("tester", scopes=["chat", "experiments"])
    statuses = [
        _chat(site, headers={"x-hotswap-arm": "B", "authorization": f"Bearer {secret}"}).status_code
        for secret in (plain, tester)
    ]
    assert [403, 200] == statuses


def test_exposure_is_written_when_a_request_fails_behind_its_assignment(site: Site) -> None:
    """Whoever was assigned counts: a prompt too long, a key without tokens. Not without an experiment."""
    _publish(site, "legal")
    far_too_long = [{"role": "user", "content": "x" * 1000}]
    assert 400 == _chat(site, messages=far_too_long).status_code
    assert [] == site.exposures()
    started = _start(site).json()
    _, secret = site.keys.create("web", scopes=["chat"], limits=KeyLimits(tokens_per_minute=1))
    assert (
        400 == _chat(site, messages=far_too_long, user="ann", headers={"authorization": f"Bearer {secret}"}).status_code
    )
    statuses = [_chat(site, user="ann", headers={"authorization": f"Bearer {secret}"}).status_code for _ in range(2)]
    assert [200, 429] == statuses
    rows = site.exposures()
    assert [None, "length", None] == [row.finish_reason for row in rows]
    assert [True, False, True] == [row.error is not None for row in rows]
    assert 1 == len({(row.experiment_id, row.arm, row.stage, row.unit) for row in rows})
    (unit,) = [unit for units in site.experiments.outcomes(started["id"], 1).values() for unit in units]
    assert [True, False, True] == [request.is_error for request in unit.requests]


@pytest.mark.parametrize("leaves", ["hangs up", "is cancelled"])
def test_exposure_is_written_once_when_the_client_leaves_while_its_prompt_is_rendered(
    leaves: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assigned is assigned, whether the server notices at once or when the prompt is there."""
    _publish(site, "legal")
    _start(site)
    is_rendering, may_render = threading.Event(), threading.Event()

    def render(*arguments: Any) -> tuple[int, ...]:
        is_rendering.set()
        assert may_render.wait(30)
        return chat_prompt(*arguments)

    monkeypatch.setattr(chat_module, "chat_prompt", render)

    async def scenario(_http: httpx.AsyncClient) -> None:
        exchange = Exchange(site.app, CHAT, {"model": "legal", "messages": [{"role": "user", "content": "x"}]})
        while not is_rendering.is_set():
            await asyncio.sleep(0.001)
        if leaves == "is cancelled":
            exchange._task.cancel()
            await asyncio.sleep(0)
        exchange._incoming.put_nowait({"type": "http.disconnect"})
        may_render.set()
        with contextlib.suppress(asyncio.CancelledError):
            await exchange._task
        while not site.exposures() or site.client.num_in_flight:
            await asyncio.sleep(0.001)

    on_site(site, scenario)
    assert [("cancelled", None, True)] == [
        (row.finish_reason, row.error, row.experiment_id is not None) for row in site.exposures()
    ]


def test_feedback_is_taken_when_the_answer_is_still_streamed(site: Site) -> None:
    """A thumb in the midst of an answer counts, the last one; it is stored with the exposure, once."""
    _publish(site, "legal")
    site.transport.permits = 3

    async def scenario(http: httpx.AsyncClient) -> list[int]:
        chat = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
        exchange = Exchange(site.app, CHAT, chat)
        await exchange.start()
        first = await exchange.chunk()
        response = json.loads(first.removeprefix(b"data: "))["id"]
        statuses = []
        for value in (False, True):
            body = {"id": response, "metric": "solved", "value": value, "comment": "early"}
            statuses.append((await http.post("/v1/feedback", json=body)).status_code)
        built_in = {"id": response, "metric": "error_rate", "value": 0}
        statuses.append((await http.post("/v1/feedback", json=built_in)).status_code)
        assert site.exposures() == []
        many = [{"id": response, "metric": f"m{number}", "value": 1} for number in range(32)]
        statuses += {(await http.post("/v1/feedback", json=body)).status_code for body in many[:31]}
        statuses.append((await http.post("/v1/feedback", json=many[31])).status_code)
        site.transport.permits = None
        await exchange.rest()
        late = {"id": response, "metric": "m0", "value": 4}
        statuses.append((await http.post("/v1/feedback", json=late)).status_code)
        statuses.append((await http.post("/v1/feedback", json={**late, "id": "chatcmpl-nobody"})).status_code)
        return statuses

    assert [200, 200, 400, 200, 409, 200, 404] == on_site(site, scenario)
    with site.registry.database.read() as session:
        rows = session.scalars(
            select(FeedbackRow).where(FeedbackRow.metric.in_(("m0", "solved"))).order_by(FeedbackRow.metric)
        )
        assert [("m0", 4.0, None), ("solved", 1.0, "early")] == [(row.metric, row.value, row.comment) for row in rows]


def test_exposure_is_dated_by_its_binding_when_the_answer_takes_its_time(site: Site) -> None:
    """An arm that answers slowly has its users at the same places as one that answers at once."""
    _publish(site, "legal")
    site.transport.permits = 3

    async def scenario(_http: httpx.AsyncClient) -> datetime:
        chat = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
        exchange = Exchange(site.app, CHAT, chat)
        await exchange.start()
        await exchange.chunk()
        before_its_end = utc_now()
        site.transport.permits = None
        await exchange.rest()
        return before_its_end

    before_its_end = on_site(site, scenario)
    (row,) = site.exposures()
    assert row.served_at < before_its_end


def test_feedback_is_409_when_the_answer_is_too_old(site: Site) -> None:
    """A clear code of its own, and clients are told not to try again."""
    response = _chat(site, model="base").json()["id"]
    with site.registry.database.write() as session:
        session.get_one(ExposureRow, response).served_at = utc_now() - timedelta(days=8)
    refused = _call(site, "POST", "/v1/feedback", json={"id": response, "metric": "solved", "value": True})
    assert (409, "feedback_too_late", "false") == (
        refused.status_code, refused.json()["error"]["code"], refused.headers["x-should-retry"],
    )  # fmt: skip
