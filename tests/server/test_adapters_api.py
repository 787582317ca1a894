"""/v1/adapters over a real engine, registry and store in one process."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.audit import AuditLog
from adapters.database import open_database
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE
from adapters.pins import PinService
from adapters.registry import Registry
from adapters.store import ArtifactStore
from server.limits import BodyLimitMiddleware
from tests.support.adapters_api import API, HELLO, call
from tests.support.bad_adapters import ZOO
from tests.support.engine import RECIPES, Bench, Site, on_site
from tests.support.tiny import save_random_adapter

FIRST, SECOND, THIRD, *_ = RECIPES
# A body can't hold links, pipes, folders or further files, its file names are ours, and the cap comes before the size.
_UPLOADABLE = [
    case
    for case, bad in ZOO.items()
    if not any(
        word in f"{case} {bad.words}"
        for word in ("link", "pipe", "folder", "program", "missing", "absent", "huge file")
    )
]


def _error(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    return error


def _parts(folder: Path) -> dict[str, Any]:
    names = {"adapter_config": ADAPTER_CONFIG_FILE, "adapter_model": ADAPTER_WEIGHTS_FILE, "manifest": MANIFEST_FILE}
    return {
        part: ("../../etc/passwd", (folder / name).read_bytes())
        for part, name in names.items()
        if (folder / name).is_file()
    }


def _import(site: Site, folder: Path, **fields: str) -> httpx.Response:
    return call(site, "POST", "", data={"alias": "legal", **fields}, files=_parts(folder))


def _uploads_left(home: Path) -> list[str]:
    return [path.name for path in (home / "uploads").iterdir()]


@pytest.fixture(autouse=True)
def _nothing_is_left(site: Site, tmp_path: Path) -> Iterator[None]:
    """Of no upload."""
    yield
    assert [] == _uploads_left(tmp_path)


# Lists and single objects --------------------------------------------------------------------------------------------


def test_list_gives_every_alias_once_when_paged(site: Site) -> None:
    """Pages by `after` and `limit` join to the whole list, in the order of the names."""
    for alias in ("support", "legal", "medical"):
        site.publish(alias, FIRST)
    first = call(site, "GET", "", params={"limit": 2}).json()
    second = call(site, "GET", "", params={"limit": 2, "after": first["last_id"]}).json()
    assert [True, False] == [first["has_more"], second["has_more"]]
    assert ["legal", "medical", "support"] == [item["id"] for item in first["data"] + second["data"]]
    assert ("legal", "medical") == (first["first_id"], first["last_id"])
    empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert empty == call(site, "GET", "", params={"after": "support"}).json()


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?after=../x", "after"),
        ("/LEGAL", "alias"),
        ("/legal/versions/2", "version"),
        ("/legal/versions?after=-1", "after"),
        ("/legal/history?limit=x", "limit"),
    ],
)
def test_read_is_400_naming_the_parameter_when_it_is_out_of_bounds(path: str, param: str, site: Site) -> None:
    """Numbers are bounded, names keep to the grammar."""
    site.publish("legal", FIRST)
    response = call(site, "GET", path)
    assert (400, param) == (response.status_code, _error(response)["param"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nobody"),
        ("GET", "/nobody/versions"),
        ("GET", "/nobody/history"),
        ("GET", "/legal/versions/v9"),
        ("GET", "/legal/versions/v9/export"),
        ("DELETE", "/nobody"),
        ("DELETE", "/legal/versions/v9"),
        ("POST", "/nobody/rollback"),
        ("POST", "/nobody/pin"),
        ("POST", "/nobody/unpin"),
        ("POST", "/nobody/unload"),
    ],
)
def test_call_is_404_when_there_is_no_such_alias_or_version(method: str, path: str, site: Site) -> None:
    """Nothing is made up."""
    site.publish("legal", FIRST)
    response = call(site, method, path)
    assert (404, "not_found") == (response.status_code, _error(response)["code"])


def test_show_tells_versions_manifest_and_residency_when_one_is_in_a_slot(site: Site) -> None:
    """The version that was asked for is in a slot, the other one on the disk alone."""
    site.publish("legal", FIRST)
    version = site.publish("legal", SECOND).version

    async def scenario(http: httpx.AsyncClient) -> dict[str, Any]:
        await http.post("/v1/chat/completions", json={"model": "legal", "messages": [HELLO], "max_tokens": 1})
        body: dict[str, Any] = (await http.get(f"{API}/legal")).json()
        return body

    body = on_site(site, scenario)
    assert ("legal", "legal@v2", 2, []) == (body["id"], body["version"], body["num_versions"], body["pinned"])
    assert ["legal@v2", "legal@v1"] == [item["id"] for item in body["versions"]]
    assert ["slot", "store"] == [item["residency"]["place"] for item in body["versions"]]
    slot = body["current"]["residency"]
    assert (site.engine.residency.acquire(version.digest), 0, False) == (
        slot["slot"], slot["num_requests"], slot["pinned"],
    )  # fmt: skip
    assert version.digest == body["current"]["digest"]
    assert site.base.reference.model_dump() == body["current"]["manifest"]["base"]


def test_residency_is_null_when_there_is_no_engine(site: Site) -> None:
    """What nobody knows is not guessed; the registry answers all the same."""
    site.publish("legal", FIRST)

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.get(f"{API}/legal/versions/v1")

    response = on_site(site, scenario, is_up=False)
    assert (200, None) == (response.status_code, response.json()["residency"])


def test_versions_and_history_join_when_paged(site: Site) -> None:
    """Every version and every move once, oldest first."""
    for recipe in (FIRST, SECOND, THIRD):
        site.publish("legal", recipe)
    site.registry.rollback("legal")
    versions, after = [], 0
    while True:
        page = call(site, "GET", f"/legal/versions?limit=2&after={after}").json()
        versions += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = int(page["last_id"])
    first = call(site, "GET", "/legal/history?limit=3").json()
    last = call(site, "GET", f"/legal/history?limit=3&after={first['last_id']}").json()
    moves = [(item["id"], item["action"], item["to_version"]) for item in first["data"] + last["data"]]
    assert ["legal@v1", "legal@v2", "legal@v3"] == versions
    assert [
        (1, "publish", "legal@v1"), (2, "publish", "legal@v2"), (3, "publish", "legal@v3"), (4, "rollback", "legal@v2"),
    ] == moves  # fmt: skip
    assert [None, "legal@v1"] == [item["from_version"] for item in first["data"][:2]]


# Import and export ---------------------------------------------------------------------------------------------------


def test_import_publishes_and_answers_when_the_adapter_is_good(site: Site, tmp_path: Path) -> None:
    """It is checked, numbered, live and callable at once; file names of the parts play no part."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=3)
    response = _import(site, folder)
    body = response.json()
    assert (201, "legal@v1", True, 4) == (response.status_code, body["id"], body["is_live"], body["rank"])
    chat = {"model": "legal@v1", "messages": [HELLO], "max_tokens": 1}

    async def ask(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/chat/completions", json=chat)

    answer = on_site(site, ask)
    assert (200, body["digest"]) == (answer.status_code, answer.headers["x-hotswap-digest"])


def test_import_leaves_the_alias_when_told_not_to_promote(site: Site, tmp_path: Path) -> None:
    """The version is there, the name stays."""
    site.publish("legal", FIRST)
    response = _import(site, save_random_adapter(tmp_path / "adapter", site.base.folder, seed=3), promote="false")
    assert ("legal@v2", False) == (response.json()["id"], response.json()["is_live"])
    assert "legal@v1" == site.registry.alias("legal").current.label


def test_export_gives_the_same_version_when_imported_again(site: Site, tmp_path: Path) -> None:
    """Files and manifest survive the way out and in: the digest is the same."""
    version = site.publish("legal", SECOND).version
    response = call(site, "GET", "/legal/versions/v1/export")
    assert (str(len(response.content)), 'attachment; filename="legal-v1.tar"', f'"{version.digest}"') == (
        response.headers["content-length"], response.headers["content-disposition"], response.headers["etag"],
    )  # fmt: skip
    folder = tmp_path / "exported"
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        tar.extractall(folder, filter="data")
    again = _import(site, folder, alias="copy").json()
    assert (version.digest, "copy@v1") == (again["digest"], again["id"])


def test_export_hides_the_reason_when_the_store_is_damaged(site: Site) -> None:
    """500 before the first byte, without a path."""
    digest = site.publish("legal", FIRST).version.digest
    (site.registry.store.folder(digest) / ADAPTER_WEIGHTS_FILE).write_bytes(b"x")
    response = call(site, "GET", "/legal/versions/v1/export")
    assert (500, "integrity_error") == (response.status_code, _error(response)["code"])
    assert str(site.registry.store.root) not in response.text


@pytest.mark.parametrize("case", _UPLOADABLE)
def test_import_is_400_and_publishes_nothing_when_the_adapter_is_bad(case: str, site: Site, tmp_path: Path) -> None:
    """The whole zoo of the command line's import: the same words, a code that says what kind, and no path."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=3)
    ZOO[case].spoil(folder)
    response = _import(site, folder)
    error = _error(response)
    assert (400, "invalid_request_error") == (response.status_code, error["type"])
    assert error["code"].startswith(("adapter_", "fingerprint_mismatch", "rank_too_high"))
    assert ZOO[case].words in error["message"]
    assert str(tmp_path) not in error["message"]
    assert ([], set()) == (site.registry.aliases(), site.registry.store.digests())


def test_zoo_is_mostly_uploaded_when_counted() -> None:
    """The list above can't go blind."""
    assert len(_UPLOADABLE) >= 25


def _raw(*parts: bytes, end: bytes = b"--B--\r\n") -> bytes:
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + end


def _part(name: str, content: bytes, extra: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="' + name.encode() + b'"' + extra + b"\r\n\r\n" + content


_ALIAS, _CONFIG, _MODEL = _part("alias", b"legal"), _part("adapter_config", b"{}"), _part("adapter_model", b"x")
_ARCHIVE = _part("archive", b"x")


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (_raw(_CONFIG, _MODEL), "'alias' is missing", "alias"),
        (_raw(_ALIAS, _MODEL), "'adapter_config' is missing", "adapter_config"),
        (_raw(_ALIAS, _CONFIG), "'adapter_model' is missing", "adapter_model"),
        (_raw(_ALIAS, _ALIAS, _CONFIG, _MODEL), "is given twice", "alias"),
        (_raw(_ALIAS, _CONFIG, _CONFIG, _MODEL), "is given twice", "adapter_config"),
        (_raw(_ALIAS, _part("../config", b"x")), "unknown part '../config'", "../config"),
        (_raw(b"X: y\r\n\r\nz"), "unknown part ''", None),
        (_raw(_part("alias", b"a" * 300), _CONFIG, _MODEL), "longer than 256 bytes", "alias"),
        (_raw(_part("alias", b"../x"), _CONFIG, _MODEL), "is not an alias", "alias"),
        (_raw(_part("alias", b"base"), _CONFIG, _MODEL), "is reserved", "alias"),
        (_raw(_part("alias", b"\xff"), _CONFIG, _MODEL), "is not an alias", "alias"),
        (_raw(_ALIAS, _CONFIG, _MODEL, _part("promote", b"yes")), "expected true or false, found 'yes'", "promote"),
        (_raw(_ALIAS, _CONFIG, _ARCHIVE), "is in the archive already", "adapter_config"),
        (_raw(_ARCHIVE), "'alias' is missing", "alias"),
        (_raw(_ALIAS, _ARCHIVE), "no tar archive", None),
        (_raw(_ALIAS, _CONFIG, _MODEL, end=b""), "ends before its last boundary", None),
        (b"", "ends before its last boundary", None),
        (b"garbage", "is not multipart/form-data", None),
        (_raw(b"Content-Disposition" + b"x" * 10_000 + b": y\r\n\r\nz"), "is not multipart/form-data", None),
    ],
)
def test_import_is_400_saying_what_is_wrong_when_the_body_has_another_form(
    body: bytes, words: str, param: str | None, site: Site
) -> None:
    """Nothing is published and nothing stays in the temporary folder."""
    headers = {"content-type": "multipart/form-data; boundary=B"}
    response = call(site, "POST", "", content=body, headers=headers)
    error = _error(response)
    assert (400, param) == (response.status_code, error["param"])
    assert words in error["message"]
    assert [] == site.registry.aliases()


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 999}"]
)
def test_import_is_400_when_the_content_type_gives_no_boundary(kind: str, site: Site) -> None:
    """JSON, or a form without a usable boundary."""
    response = call(site, "POST", "", content=b"{}", headers={"content-type": kind})
    assert (400, "invalid_value") == (response.status_code, _error(response)["code"])


def test_import_is_cut_while_it_streams_when_it_is_over_the_cap(site: Site) -> None:
    """413 as soon as the cap is passed: the rest is never asked for, and no file stays."""
    site.app.add_middleware(BodyLimitMiddleware, max_bytes=10, larger={("POST", API): 50_000})
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield b"--B\r\n" + _part("adapter_model", b"")
        while True:
            num_sent += 1
            assert num_sent < 100
            yield b"x" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=B"}
    response = call(site, "POST", "", content=endless(), headers=headers)
    assert (413, 5) == (response.status_code, num_sent)
    assert "50000 bytes" in _error(response)["message"]
    assert 413 == call(site, "POST", "/legal/promote", content=b"x" * 11).status_code


def test_import_is_429_when_two_others_are_under_way(site: Site, tmp_path: Path) -> None:
    """Imports hold files and memory, so there are few at a time; the next one is taken when one has ended."""
    folder = save_random_adapter(tmp_path / "adapter", site.base.folder, seed=3)

    async def scenario(http: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response], httpx.Response]:
        gate = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"--B\r\n"
            await gate.wait()
            yield b""

        headers = {"content-type": "multipart/form-data; boundary=B"}
        held = [asyncio.create_task(http.post(API, content=slow(), headers=headers)) for _ in range(2)]
        while len(_uploads_left(tmp_path)) < 2:
            await asyncio.sleep(0)
        refused = await http.post(API, data={"alias": "legal"}, files=_parts(folder))
        gate.set()
        ended = await asyncio.gather(*held)
        return refused, ended, await http.post(API, data={"alias": "legal"}, files=_parts(folder))

    refused, ended, taken = on_site(site, scenario)
    assert (429, "overloaded", "1") == (
        refused.status_code, _error(refused)["code"], refused.headers["retry-after"],
    )  # fmt: skip
    assert ([400] * 2, 201) == ([response.status_code for response in ended], taken.status_code)


def test_export_is_the_same_version_when_it_is_sent_back_as_an_archive(site: Site) -> None:
    """What the API exports, it takes."""
    version = site.publish("legal", FIRST)
    exported = call(site, "GET", "/legal/versions/v1/export").content
    answer = call(site, "POST", "", data={"alias": "copy"}, files={"archive": ("legal-v1.tar", exported)})
    assert (201, "copy@v1", version.version.digest) == (
        answer.status_code, answer.json()["id"], answer.json()["digest"],
    )  # fmt: skip


# Moves and deletion --------------------------------------------------------------------------------------------------


def test_version_is_found_when_it_is_named_with_its_alias(site: Site) -> None:
    """In paths and in bodies, as in `model`; another alias's version is no version of this one."""
    for adapter in (FIRST, SECOND):
        site.publish("legal", adapter)
    assert "legal@v1" == call(site, "GET", "/legal/versions/legal@v1").json()["id"]
    assert "legal@v1" == call(site, "POST", "/legal/promote", json={"version": "legal@v1"}).json()["version"]
    assert ["legal@v2"] == call(site, "POST", "/legal/pin", json={"version": "legal@v2"}).json()["pinned"]
    for answer in (
        call(site, "GET", "/legal/versions/support@v1"),
        call(site, "POST", "/legal/promote", json={"version": "support@v1"}),
    ):
        assert 404 == answer.status_code
        assert "'support@v1' is no version of 'legal'" == _error(answer)["message"]


def test_promote_is_503_when_others_hold_the_database(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the time after which clients try again, and nothing of the database in the message."""
    monkeypatch.setattr("adapters.database._BUSY_TIMEOUT_MS", 20)
    database = open_database(f"sqlite:///{tmp_path / 'busy.db'}")
    site = Site.build(bench, Registry(database, ArtifactStore(tmp_path / "store")), tmp_path)
    for adapter in (FIRST, SECOND):
        site.publish("legal", adapter)
    with database.write() as session:
        session.connection()  # nobody else writes from here on
        response = call(site, "POST", "/legal/promote", json={"version": "v1"})
    assert (503, "database_busy", "true") == (
        response.status_code, _error(response)["code"], response.headers["x-should-retry"],
    )  # fmt: skip
    assert int(response.headers["retry-after"]) > 0
    assert 200 == call(site, "POST", "/legal/promote", json={"version": "v1"}).status_code
    site.engine.close()
    database.close()


def test_promote_and_rollback_move_the_alias_when_called(site: Site) -> None:
    """By number, by digest, and back."""
    first = site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    by_digest = call(site, "POST", "/legal/promote", json={"version": first.version.digest[:10]})
    back = call(site, "POST", "/legal/rollback")
    again = call(site, "POST", "/legal/promote", json={"version": "v1"})
    assert ["legal@v1", "legal@v2", "legal@v1"] == [answer.json()["version"] for answer in (by_digest, back, again)]
    assert "legal@v1" == site.registry.alias("legal").current.label


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "version"), ({"version": "2"}, "version"), ({"version": None}, "version"), ({"version": "v1", "x": 1}, "x")],
)
def test_promote_is_400_when_the_body_is_wrong(body: dict[str, Any], param: str, site: Site) -> None:
    """The version is required and has one of two forms."""
    site.publish("legal", FIRST)
    response = call(site, "POST", "/legal/promote", json=body)
    assert (400, param) == (response.status_code, _error(response)["param"])


def test_delete_removes_a_version_when_nothing_points_to_it(site: Site) -> None:
    """The version that answers is refused, the other one goes, then the alias with what is left."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    refused = call(site, "DELETE", "/legal/versions/v2")
    gone = call(site, "DELETE", "/legal/versions/v1")
    alias = call(site, "DELETE", "/legal")
    assert (409, "conflict") == (refused.status_code, _error(refused)["code"])
    assert {"id": "legal@v1", "object": "adapter.deleted", "deleted": True, "versions": ["legal@v1"]} == gone.json()
    assert (["legal@v2"], []) == (alias.json()["versions"], site.registry.aliases())
    assert set() == site.registry.store.digests()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/legal", None),
        ("DELETE", "/legal/versions/v1", None),
        ("POST", "/legal/rollback", None),
        ("POST", "/legal/promote", {"version": "v1"}),
    ],
)
def test_change_is_409_when_an_experiment_uses_the_alias(
    method: str, path: str, body: dict[str, str] | None, site: Site
) -> None:
    """Arms stay what they are while they are compared."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    experiment = site.experiments.create("legal", [("A", "v1", 50), ("B", "v2", 50)])
    response = call(site, method, path, json=body)
    assert 409 == response.status_code
    assert experiment.id in _error(response)["message"]
    assert 2 == len(site.registry.versions("legal"))


# Keys limited to aliases ---------------------------------------------------------------------------------------------


def test_other_aliases_are_absent_when_the_key_is_limited(site: Site, tmp_path: Path) -> None:
    """Lists, pins, unloading, moves and imports: what the key may not use is not there for it, and stays as it was."""
    for alias in ("legal", "support"):
        site.publish(alias, next(iter(RECIPES)))
    key, secret = site.keys.create("web", scopes=["adapters"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}
    listed = call(site, "GET", "", headers=headers).json()
    assert ["legal"] == [alias["id"] for alias in listed["data"]]
    for method, path, body in (
        ("GET", "/support", None),
        ("POST", "/support/pin", {}),
        ("POST", "/support/unpin", {}),
        ("POST", "/support/unload", {}),
        ("POST", "/support/promote", {"version": "v1"}),
        ("POST", "/support/rollback", None),
        ("DELETE", "/support", None),
        ("DELETE", "/support/versions/v1", None),
        ("GET", "/support/versions/v1/export", None),
    ):
        assert 404 == call(site, method, path, json=body, headers=headers).status_code, path
    folder = save_random_adapter(tmp_path / "new", site.base.folder, seed=3)
    imported = call(site, "POST", "", files=_parts(folder), data={"alias": "support"}, headers=headers)
    assert 403 == imported.status_code
    assert ["support@v1"] == [version.label for version in site.registry.versions("support")]
    assert frozenset() == PinService(site.registry.database).names()
    assert 200 == call(site, "POST", "/legal/pin", json={}, headers=headers).status_code
    (entry,) = [entry for entry in AuditLog(site.registry.database).list(limit=9) if entry.action == "pin"]
    assert (key.id, "legal") == (entry.actor, entry.subject)


def test_pinned_alias_of_the_settings_is_absent_when_the_key_is_limited(
    bench: Bench, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal that names a setting would tell that the alias is there."""
    monkeypatch.setenv("HOTSWAP_SERVE_PINNED", "support")
    site = Site.build(bench, registry, tmp_path)
    for alias in ("legal", "support"):
        site.publish(alias, next(iter(RECIPES)))
    _, secret = site.keys.create("web", scopes=["adapters"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}
    assert 404 == call(site, "POST", "/support/unpin", json={}, headers=headers).status_code
    assert 409 == call(site, "POST", "/support/unpin", json={}, headers=_admin(site)).status_code


def _admin(site: Site) -> dict[str, str]:
    _, secret = site.keys.create("admin", scopes=["adapters"])
    return {"authorization": f"Bearer {secret}"}
