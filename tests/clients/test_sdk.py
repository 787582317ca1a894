"""The typed client against the real API over real HTTP, sync and async; retries and errors by a scripted server."""

from __future__ import annotations

import asyncio
import inspect
import re
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.registry import Registry
from adapters.routing.rules import parse_rules
from clients import errors
from clients.errors import (
    ApiError,
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    ServerError,
    TooLargeError,
    UnavailableError,
    UnexpectedAnswerError,
)
from clients.results import Route
from clients.sdk import (
    AdaptersResource,
    ArmSpec,
    AsyncAdaptersResource,
    AsyncExperimentsResource,
    AsyncHotswap,
    AsyncShadowsResource,
    ExperimentSpec,
    ExperimentsResource,
    GuardrailSpec,
    Hotswap,
    ShadowsResource,
    WeightSpec,
)
from tests.support.engine import RECIPES, Bench, Site, make_bench, save_recipes
from tests.support.experiments import add_users
from tests.support.http import serve_site
from tests.support.tiny import save_random_adapter

FIRST, SECOND, *_ = RECIPES
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def bench(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny Llama for this file."""
    folder = tiny_folders["llama"]
    return make_bench(folder, save_recipes(tmp_path_factory.mktemp("adapters"), folder))


@pytest.fixture
def site(bench: Bench, registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """The API with `legal` in two versions, of which the second answers."""
    made = Site.build(bench, registry, tmp_path)
    made.publish("legal", FIRST)
    made.publish("legal", SECOND)
    yield made
    made.engine.close()


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    """Where the site listens."""
    with serve_site(site) as served:
        yield served.root


def _scripted(*answers: Answer) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A server that gives these answers in turn, the last one for ever; and what it was asked."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        status, headers, body = answers[min(len(asked), len(answers)) - 1]
        return httpx.Response(status, headers=headers, json=body)

    return httpx.MockTransport(answer), asked


_HEALTHY: Answer = (200, {}, {"status": "ok"})
_BUSY: Answer = (429, {"retry-after": "0"}, {"error": {"message": "full", "code": "overloaded", "param": None}})


# Against the real API ------------------------------------------------------------------------------------------------


def test_adapters_live_their_life_when_driven_by_the_sync_client(url: str, site: Site, tmp_path: Path) -> None:
    """Upload, look, move, pin, unload, export, delete."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=5)
    with Hotswap(url) as hotswap:
        adapters = hotswap.adapters
        uploaded = adapters.upload(folder, "support")
        assert ("support@v1", True, 4) == (uploaded.id, uploaded.is_live, uploaded.rank)
        listed = adapters.list(limit=1)
        assert (["legal"], True) == ([item.id for item in listed.data], listed.has_more)
        assert ["support"] == [item.id for item in adapters.list(after=listed.last_id).data]
        assert "legal@v1" == adapters.promote("legal", "v1").version
        assert "legal@v2" == adapters.rollback("legal").version
        assert ["publish", "publish", "promote", "rollback"] == [c.action for c in adapters.history("legal").data]
        assert ["legal@v2"] == [version.id for version in adapters.versions("legal", after=1).data]
        assert ["legal"] == adapters.pin("legal").pinned
        with pytest.raises(ConflictError, match="pinned"):
            adapters.unload("legal")
        assert [] == adapters.unpin("legal").pinned
        assert "legal@v1" == adapters.unload("legal", "v1").id
        shown = adapters.get("legal")
        assert (site.registry.find("legal").version.digest, 2) == (shown.current.digest, len(shown.versions))
        assert site.base.reference.fingerprint == shown.current.manifest["base"]["fingerprint"]
        assert adapters.version("legal", "v1").published_at <= datetime.now(UTC)
        archive = adapters.export("legal", "v1", tmp_path / "legal.tar")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "legal", filter="data")
        assert shown.versions[1].digest == adapters.upload(tmp_path / "legal", "copy", promote=False).digest
        assert ["legal@v1"] == adapters.delete("legal", "v1").versions
        assert ["copy@v1"] == adapters.delete("copy").versions


def test_version_is_found_when_it_is_named_either_way(url: str) -> None:
    """With its alias in one, or beside it; where there has to be one, its absence is said before anything is sent."""
    with Hotswap(url) as hotswap:
        adapters = hotswap.adapters
        assert "legal@v1" == adapters.promote("legal@v1").version
        assert "legal@v2" == adapters.promote("legal", "legal@v2").version
        assert "legal@v1" == adapters.version("legal@v1").id
        assert ["legal@v1"] == adapters.pin("legal@v1").pinned
        assert [] == adapters.unpin("legal", "v1").pinned
        assert ["legal@v1"] == adapters.delete("legal@v1").versions
        with pytest.raises(ValueError, match="say which version of 'legal'"):
            adapters.promote("legal")


def test_paths_are_taken_as_text_when_adapters_are_sent_and_fetched(url: str, site: Site, tmp_path: Path) -> None:
    """A folder and an archive, by either type; what is not there is said by its name."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=5)
    with Hotswap(url) as hotswap:
        sent = hotswap.adapters.upload(str(folder), "support")
        archive = hotswap.adapters.export("support@v1", None, str(tmp_path / "support.tar"))
        assert sent.digest == hotswap.adapters.upload(str(archive), "copy").digest
        with pytest.raises(FileNotFoundError, match=r"absent: expected an adapter's folder"):
            hotswap.adapters.upload(str(tmp_path / "absent"), "support")
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
            hotswap.adapters.upload(folder, "support")


def test_experiment_is_run_and_judged_when_driven_by_the_async_client(url: str, site: Site) -> None:
    """Start, report an outcome, read the report, stop."""

    async def scenario() -> None:
        async with AsyncHotswap(f"{url}/v1/") as hotswap:
            assert ("ok", "ready") == ((await hotswap.health()).status, (await hotswap.ready()).status)
            arms = [ArmSpec("A", "v1", 50), ArmSpec("B", "v2", 50)]
            started = await hotswap.experiments.create("legal", arms, ExperimentSpec(salt="s"))
            assert ["legal@v1", "legal@v2"] == [arm.version for arm in started.arms]
            body = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "user": "ann"}
            async with httpx.AsyncClient(base_url=url) as http:
                answer = await http.post("/v1/chat/completions", json=body)
            recorded = await hotswap.feedback(answer.json()["id"], "solved", True)
            assert (answer.json()["id"], "solved") == (recorded.id, recorded.metric)
            report = (await hotswap.experiments.get(started.id)).report
            (arm,) = [arm for arm in report if arm.num_exposures]
            assert ("solved", 1.0, 1) in [(m.metric, m.mean, m.num_outcomes) for m in arm.metrics]
            assert "stopped" == (await hotswap.experiments.stop(started.id)).state
            assert [started.id] == [item.id for item in (await hotswap.experiments.list()).data]
            experiments = hotswap.experiments
            draft = await experiments.create("legal", arms, draft=True)
            assert "running" == (await experiments.start(draft.id)).state
            assert 2 == (await experiments.change_weights(draft.id, [WeightSpec("A", 80), WeightSpec("B", 20)])).stage
            assert 3 == (await experiments.undo(draft.id)).stage
            assert 4 == len((await experiments.decisions(draft.id)).data)
            await experiments.stop(draft.id)
            guarded = ExperimentSpec(guardrails=[GuardrailSpec("error_rate", 0.01)])
            judged = [(await experiments.create("legal", arms, guarded)).id]
            assert "running" == (await experiments.accept_guardrail(judged[0], "error_rate", "known")).state
            assert "running" == (await experiments.accept_feedback(judged[0], "known")).state
            add_users(site.registry, site.experiments.get(judged[0]), "A", [None] * 300)
            assert "running" == (await experiments.accept_split(judged[0], "known")).state
            assert "decided" == (await experiments.promote(judged[0], "B")).state
            judged.append((await experiments.create("legal", arms)).id)
            assert "decided" == (await experiments.rollback(judged[1], reason="cold feet")).state
            assert (5, 5) == (
                (await experiments.set_holdout("legal", 5)).percent,
                (await experiments.holdout("legal")).percent,
            )

    asyncio.run(scenario())


def test_route_is_told_when_either_client_asks(url: str, site: Site) -> None:
    """A text, or messages with metadata; typed."""
    site.services.routing.set_rules(parse_rules({"rules": [{"alias": "legal", "metadata": {"team": "law"}}]}))

    async def scenario() -> Route:
        async with AsyncHotswap(url) as hotswap:
            return await hotswap.route(messages=[{"role": "user", "content": "x"}], metadata={"team": "law"})

    found = asyncio.run(scenario())
    assert ("legal", "rule", "rule 1", None) == (found.alias, found.route, found.rule, found.confidence)
    with Hotswap(url) as hotswap:
        abstained = hotswap.route("x")
    assert ("base", "abstained", [], []) == (
        abstained.alias,
        abstained.route,
        abstained.probabilities,
        abstained.nearest,
    )


def test_experiment_is_planned_and_changed_when_driven_by_the_client(url: str, site: Site) -> None:
    """Every field of a plan goes there and comes back."""
    ends_at = datetime(2090, 1, 31, tzinfo=UTC)
    spec = ExperimentSpec(
        salt="s",
        traffic=20,
        metric="solved",
        guardrails=[GuardrailSpec("ttft_ms", 0.1, is_relative=True)],
        smallest_effect=0.02,
        planned_units=1000,
        auto_promote=True,
        auto_rollback=True,
        ends_at=ends_at,
    )
    with Hotswap(url) as hotswap:
        experiments = hotswap.experiments
        draft = experiments.create("legal", [ArmSpec("A", "v1", 50), ArmSpec("B", "v2", 50)], spec, draft=True)
        assert ("draft", "s", 20, "solved", 0.02, 1000, True, True, ends_at) == (
            draft.state,
            draft.salt,
            draft.traffic,
            draft.metric and draft.metric.name,
            draft.smallest_effect,
            draft.planned_units,
            draft.auto_promote,
            draft.auto_rollback,
            draft.ends_at,
        )
        assert [("ttft_ms", 0.1, True)] == [(item.metric, item.margin, item.is_relative) for item in draft.guardrails]
        assert [draft.id] == [item.id for item in experiments.list(state="draft").data]
        assert "running" == experiments.start(draft.id).state
        changed = experiments.change_weights(draft.id, [WeightSpec("A", 80), WeightSpec("B", 20)], traffic=30)
        assert (2, 30) == (changed.stage, changed.traffic)
        assert (3, 20) == (experiments.undo(draft.id).stage, experiments.get(draft.id).traffic)
        assert ["create", "start"] == [item.action for item in experiments.decisions(draft.id, limit=2).data]
        assert "stopped" == experiments.stop(draft.id).state
        guarded = ExperimentSpec(guardrails=[GuardrailSpec("error_rate", 0.01)])
        judged = [experiments.create("legal", [ArmSpec("A", "v1", 50), ArmSpec("B", "v2", 50)], guarded).id]
        assert "running" == experiments.accept_guardrail(judged[0], "error_rate", "known").state
        assert "running" == experiments.accept_feedback(judged[0], "known").state
        add_users(site.registry, site.experiments.get(judged[0]), "A", [None] * 300)
        assert "running" == experiments.accept_split(judged[0], "known").state
        assert "decided" == experiments.promote(judged[0], "B", reason="users say so").state
        judged.append(experiments.create("legal", [ArmSpec("A", "v1", 50), ArmSpec("B", "v2", 50)]).id)
        assert "decided" == experiments.rollback(judged[1]).state
        assert (5, 5) == (experiments.set_holdout("legal", 5).percent, experiments.holdout("legal").percent)


def test_adapters_live_their_life_when_driven_by_the_async_client(url: str, site: Site, tmp_path: Path) -> None:
    """Every call has a twin that is awaited."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=5)

    async def scenario() -> None:
        async with AsyncHotswap(url) as hotswap:
            adapters = hotswap.adapters
            assert "support@v1" == (await adapters.upload(folder, "support")).id
            assert ["legal", "support"] == [item.id for item in (await adapters.list()).data]
            assert "legal@v1" == (await adapters.promote("legal", "v1")).version
            assert "legal@v2" == (await adapters.rollback("legal")).version
            assert 4 == len((await adapters.history("legal")).data)
            assert 2 == len((await adapters.versions("legal")).data)
            assert ["legal@v1"] == (await adapters.pin("legal", "v1")).pinned
            assert [] == (await adapters.unpin("legal", "v1")).pinned
            assert "legal@v2" == (await adapters.unload("legal")).id
            assert "legal@v2" == (await adapters.get("legal")).current.id
            assert 1 == (await adapters.version("legal", "v1")).number
            assert tarfile.is_tarfile(await adapters.export("legal", "v1", tmp_path / "legal.tar"))
            assert ["support@v1"] == (await adapters.delete("support")).versions

    asyncio.run(scenario())


def test_readme_example_prints_what_it_says_when_run(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block with the typed client, word for word, against a real server; only its address is another."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    found = re.findall(r"```python\n([^`]*clients\.sdk[^`]*)```\n\n```text\n([^`]*)```", readme)
    ((example, printed),) = found
    monkeypatch.setenv("HOTSWAP_URL", url)
    exec(compile(example, "README.md", "exec"), {})
    assert printed == capsys.readouterr().out


def test_export_leaves_no_file_when_it_is_refused(url: str, tmp_path: Path) -> None:
    """And never writes over one that is there."""
    with Hotswap(url) as hotswap:
        with pytest.raises(NotFoundError):
            hotswap.adapters.export("legal", "v9", tmp_path / "legal.tar")
        assert not (tmp_path / "legal.tar").exists()
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(FileExistsError):
            hotswap.adapters.export("legal", "v1", tmp_path / "mine")
    assert "mine" == (tmp_path / "mine").read_text()


def test_error_carries_what_the_envelope_says_when_a_field_is_wrong(url: str) -> None:
    """Status, code, field and the request's id, as typed attributes."""
    with Hotswap(url) as hotswap, pytest.raises(InvalidRequestError) as caught:
        hotswap.adapters.promote("legal", "2")
    error = caught.value
    assert (400, "invalid_value", "version") == (error.status, error.code, error.param)
    assert str(error.request_id).startswith("req_")


# Against a scripted server -------------------------------------------------------------------------------------------


def _health(transport: httpx.MockTransport, is_async: bool, **options: Any) -> str:
    async def ask() -> str:
        async with AsyncHotswap("http://test", transport=transport, **options) as hotswap:
            return (await hotswap.health()).status

    if is_async:
        return asyncio.run(ask())
    with Hotswap("http://test", transport=transport, **options) as hotswap:
        return hotswap.health().status


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("status", [429, 503])
def test_call_is_sent_again_when_the_server_is_busy(status: int, is_async: bool) -> None:
    """Twice refused, then answered; after the time that the server names."""
    transport, asked = _scripted((status, *_BUSY[1:]), (status, *_BUSY[1:]), _HEALTHY)
    assert ("ok", 3) == (_health(transport, is_async), len(asked))


@pytest.mark.parametrize("is_async", [False, True])
def test_error_is_raised_when_all_retries_were_refused(is_async: bool) -> None:
    """As many attempts as allowed and one."""
    transport, asked = _scripted(_BUSY)
    with pytest.raises(RateLimitedError, match="full") as caught:
        _health(transport, is_async, max_retries=3)
    assert (429, "overloaded", 4) == (caught.value.status, caught.value.code, len(asked))


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"retry-after": "0"}, {}),
        (503, {"retry-after": "0", "x-should-retry": "false"}, {}),
        (503, {"retry-after": "3600"}, {}),
        (503, {"retry-after": "nan"}, {}),
        (409, {}, {}),
    ],
)
def test_call_is_not_sent_again_when_that_would_not_help(answer: Answer) -> None:
    """Failures, an explicit no, and a wait that no caller expects."""
    transport, asked = _scripted(answer, _HEALTHY)
    with pytest.raises(ApiError):
        _health(transport, is_async=False)
    assert 1 == len(asked)


def test_upload_is_sent_whole_again_when_the_server_was_busy(tmp_path: Path) -> None:
    """The files are read from their beginning for each attempt."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text(f"content of {name}")
    transport, asked = _scripted(_BUSY, (409, {}, {}))
    with Hotswap("http://test", transport=transport) as hotswap, pytest.raises(ConflictError):
        hotswap.adapters.upload(tmp_path, "legal")
    for request in asked:
        assert b"content of adapter_config.json" in request.content
        assert b"content of adapter_model.safetensors" in request.content
        assert b'name="manifest"' not in request.content
    assert 2 == len(asked)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (405, InvalidRequestError),
        (409, ConflictError),
        (413, TooLargeError),
        (429, RateLimitedError),
        (500, ServerError),
        (503, UnavailableError),
        (504, ServerError),
    ],
)
@pytest.mark.parametrize("body", [{"error": {"message": "no"}}, {"error": "no"}, [], "no", None])
def test_error_is_of_the_statuss_class_when_the_body_is_anything(status: int, kind: type[ApiError], body: Any) -> None:
    """A proxy's own page is no reason to crash."""
    transport, _ = _scripted((status, {"x-request-id": "req_1"}, body))
    with pytest.raises(ApiError) as caught:
        _health(transport, is_async=False, max_retries=0)
    assert (kind, status, "req_1") == (type(caught.value), caught.value.status, caught.value.request_id)


def test_every_error_class_is_in_the_tree_of_the_docstring_when_compared() -> None:
    """What is drawn there is what there is."""
    classes = [name for name, item in vars(errors).items() if inspect.isclass(item) and issubclass(item, ApiError)]
    assert len(classes) >= 10
    assert [name for name in classes if name not in str(errors.__doc__)] == []


@pytest.mark.parametrize("body", [{}, {"status": 1}, [], "ok"])
def test_answer_is_refused_when_it_is_none_of_hotswaps(body: Any) -> None:
    """The error says what was expected of what."""
    transport, _ = _scripted((200, {}, body))
    with pytest.raises(UnexpectedAnswerError, match=r"GET /health: .* is not as expected"):
        _health(transport, is_async=False)


@pytest.mark.parametrize("is_async", [False, True])
def test_error_says_where_when_nobody_listens(is_async: bool) -> None:
    """The address is in the message, the status is 0."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(NoAnswerError, match="http://test/ can't be reached") as caught:
        _health(httpx.MockTransport(refuse), is_async)
    assert 0 == caught.value.status


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [("a", "b", "Bearer a"), (None, "b", "Bearer b"), (None, None, None), ("", "", None)],
)
def test_api_key_is_the_argument_or_the_variable_when_sent(
    given: str | None, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without either no header is sent."""
    monkeypatch.delenv("HOTSWAP_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("HOTSWAP_API_KEY", variable)
    transport, asked = _scripted(_HEALTHY)
    _health(transport, is_async=False, api_key=given)
    assert expected == asked[0].headers.get("authorization")


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("inf")}, {"max_retries": -1}, {"max_retries": 99}]
)
@pytest.mark.parametrize("kind", [Hotswap, AsyncHotswap])
def test_client_is_refused_when_a_limit_is_out_of_bounds(kind: Callable[..., Any], options: dict[str, Any]) -> None:
    """No client waits or repeats for ever."""
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        kind("http://test", **options)


@pytest.mark.parametrize("alias", ["", ".", ".."])
def test_call_is_refused_when_a_name_would_lead_to_another_route(alias: str) -> None:
    """`DELETE /v1/adapters/..` is nobody's wish; other signs are quoted."""
    transport, asked = _scripted((404, {}, {}))
    with Hotswap("http://test", transport=transport) as hotswap:
        with pytest.raises(ValueError, match="expected a name"):
            hotswap.adapters.delete(alias)
        with pytest.raises(NotFoundError):
            hotswap.adapters.delete("a/../b?c")
    assert [b"/v1/adapters/a%2F..%2Fb%3Fc"] == [request.url.raw_path for request in asked]


@pytest.mark.parametrize(
    ("sync", "awaited"),
    [
        (Hotswap, AsyncHotswap),
        (AdaptersResource, AsyncAdaptersResource),
        (ExperimentsResource, AsyncExperimentsResource),
        (ShadowsResource, AsyncShadowsResource),
    ],
)
def test_async_client_has_the_same_methods_when_compared(sync: type, awaited: type) -> None:
    """Name by name with the same arguments, each a coroutine."""

    def methods(kind: type) -> dict[str, Any]:
        return {name: item for name, item in vars(kind).items() if inspect.isfunction(item) and name[0] != "_"}

    found, twins = methods(sync), methods(awaited)
    assert len(found) >= 4
    for name, method in found.items():
        assert inspect.signature(method) == inspect.signature(twins[name])
        assert inspect.iscoroutinefunction(twins[name])
    assert found.keys() == twins.keys()


def test_shadow_is_started_and_read_when_driven_by_the_client(url: str) -> None:
    """Sync and async read the same objects; one alias has one shadow at a time."""
    with Hotswap(url) as hotswap:
        started = hotswap.shadows.start("legal@v1", share=5)
        assert ("legal@v1", 5.0, "running") == (started.version, started.share, started.state)
        assert [started] == list(hotswap.shadows.list())
        with pytest.raises(ConflictError):
            hotswap.shadows.start("legal", "v2", share=5)
        detail = hotswap.shadows.get(started.id)
        assert (started.id, 0, None) == (detail.id, detail.num_answered, detail.same_share)

    async def stop() -> str:
        async with AsyncHotswap(url) as hotswap:
            return (await hotswap.shadows.stop(started.id)).state

    assert "stopped" == asyncio.run(stop())
