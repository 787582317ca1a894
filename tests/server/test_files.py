"""/v1/files with the unmodified OpenAI client and with raw forms, in one process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.jobs import JobOrder
from server.services import Services
from server.uploads import MAX_UPLOADS
from tests.support.conversations import easy_rows, write_rows
from tests.support.disk import small_disk
from tests.support.engine import Site, on_site
from tests.support.sdk import with_sdk

_BOUNDARY = "b0"
_NO_ROOM = "no space left for the file; nothing of it was kept"
_FORM = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Three good rows."""
    return write_rows(tmp_path / "rows.jsonl", easy_rows(3)).read_bytes()


def _services(site: Site) -> Services:
    services: Services = site.app.state.services
    return services


def _post(site: Site, fields: dict[str, Any], files: dict[str, Any]) -> httpx.Response:
    return on_site(site, lambda http: http.post("/v1/files", data=fields, files=files))


def _stored(site: Site) -> list[str]:
    return [path.name for path in _services(site).files.root.rglob("*") if path.is_file() and path.name != ".lock"]


def test_openai_client_uploads_lists_reads_and_deletes_when_driven(site: Site, content: bytes) -> None:
    """A file's life with the unmodified SDK."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        made = [await client.files.create(file=(f"{n}.jsonl", content), purpose="fine-tune") for n in range(3)]
        assert (made[0].object, made[0].filename, made[0].bytes) == ("file", "0.jsonl", len(content))
        assert (made[0].purpose, made[0].status) == ("fine-tune", "processed")
        assert await client.files.retrieve(made[0].id) == made[0]
        assert (await client.files.content(made[0].id)).content == content
        assert [file.id async for file in client.files.list(limit=1)] == [file.id for file in made[::-1]]
        assert (await client.files.delete(made[1].id)).deleted
        assert [file.id async for file in client.files.list(order="asc")] == [made[0].id, made[2].id]
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made[1].id)

    with_sdk(site, scenario)
    assert len(_stored(site)) == 2


def test_upload_names_every_bad_line_when_rows_are_wrong(site: Site, content: bytes) -> None:
    """A 400 with the field and the lines, and nothing is kept."""
    bad = content + b"{\n" + b'{"messages": [{"role": "robot", "content": "x"}]}\n'
    response = _post(site, {"purpose": "fine-tune"}, {"file": ("rows.jsonl", bad)})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_data", "file")
    assert [line.split(":")[0] for line in error["message"].splitlines()] == ["line 4", "line 5"]
    assert _stored(site) == []


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"purpose": "assistants"}, {"file": ("a", b"x")}, "purpose"),
        ({}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "fine-tune"}, {"document": ("a", b"x")}, "document"),
        ({"purpose": "fine-tune", "file": "text"}, {}, "file"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, {}, "expires_after[anchor]"),
        ({"purpose": "fine-tune"}, {"file": ("x" * 300, b"x")}, "file"),
    ],
)
def test_upload_names_the_field_when_the_form_is_wrong(
    site: Site, fields: dict[str, Any], files: dict[str, Any], param: str
) -> None:
    """Missing, unknown and impossible fields are each a 400 in the envelope."""
    response = on_site(
        site,
        # A field without a file's name is still a form with parts.
        lambda http: http.post("/v1/files", files={**{name: (None, value) for name, value in fields.items()}, **files}),
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert _stored(site) == []


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"purpose=fine-tune", {"content-type": "application/x-www-form-urlencoded"}),
        (b'{"purpose": "fine-tune"}', {"content-type": "application/json"}),
        (b"x", {"content-type": "multipart/form-data"}),
        (b"no part at all", _FORM),
        (b"", {}),
    ],
)
def test_upload_is_refused_when_the_body_is_no_form(site: Site, content: bytes, headers: dict[str, str]) -> None:
    """A 400 in the envelope, whatever is sent; a body that is no form is not read into memory."""
    response = on_site(site, lambda http: http.post("/v1/files", content=content, headers=headers))
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_upload_is_cut_while_it_streams_when_it_is_too_large(site: Site) -> None:
    """The server stops reading soon behind the cap of 200 kB, says 413, and nothing stays behind."""
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        part = 'Content-Disposition: form-data; name="file"; filename="rows.jsonl"'
        yield f"--{_BOUNDARY}\r\n{part}\r\n\r\n".encode()
        while num_sent < 100_000_000:
            num_sent += 10_000
            yield b"x" * 10_000
            await asyncio.sleep(0)

    response = on_site(site, lambda http: http.post("/v1/files", content=endless(), headers=_FORM))
    assert response.status_code == 413
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert 200_000 <= num_sent <= 300_000
    assert _stored(site) == []


def test_file_is_a_400_when_it_is_larger_than_the_cap_but_its_form_is_not(site: Site) -> None:
    """The form's own bytes don't let a file be larger."""
    response = _post(site, {"purpose": "fine-tune"}, {"file": ("rows.jsonl", b"x" * 200_001)})
    assert response.status_code == 400
    assert "larger than 200000 bytes" in response.json()["error"]["message"]
    assert _stored(site) == []


def test_delete_is_a_conflict_when_a_job_needs_the_file(site: Site, content: bytes) -> None:
    """409 with the job's id, and the client is told not to try again by itself."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        made = await http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)})
        _services(site).fine_tuning.jobs.create(JobOrder("tiny", made.json()["id"], {}, 0))
        return await http.delete(f"/v1/files/{made.json()['id']}")

    response = on_site(site, scenario)
    assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")
    assert "needed by job ftjob-" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("after=file-x", "after"), ("x=1", "x")],
)
def test_list_names_the_parameter_when_it_is_wrong(site: Site, query: str, param: str) -> None:
    """Bounds hold, and unknown parameters are errors."""
    response = on_site(site, lambda http: http.get(f"/v1/files?{query}"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_files_are_not_found_when_ids_are_paths(site: Site) -> None:
    """No id reaches the disk; a 404 tells no path."""
    for given in ("..%2Fhotswap.db", "%2Fetc%2Fpasswd", ".incoming"):
        for path in (f"/v1/files/{given}", f"/v1/files/{given}/content"):
            response = on_site(site, lambda http, path=path: http.get(path))  # type: ignore[misc]
            assert response.status_code == 404
            assert "/etc/passwd:" not in response.text


def test_upload_is_400_when_its_sender_hangs_up(site: Site) -> None:
    """Nobody reads it, but it is no failure of the server's, and nothing of it stays."""
    incoming: list[dict[str, Any]] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": f"--{_BOUNDARY}\r\n".encode(), "more_body": True},
    ]
    sent: list[Any] = []
    headers = [(b"host", b"localhost"), (b"content-type", _FORM["content-type"].encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "query_string": b"",
        "headers": headers,
    }

    async def scenario(http: httpx.AsyncClient) -> None:
        async def receive() -> dict[str, Any]:
            return incoming.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await site.app(scope, receive, send)

    on_site(site, scenario)
    assert 400 == sent[0]["status"]
    assert b"the body broke off" in sent[1]["body"]
    assert [] == _stored(site)


def test_upload_is_504_and_frees_its_place_when_it_does_not_arrive(
    site: Site, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender who stops holds one of few places, but not for ever."""
    monkeypatch.setattr(_services(site).uploads, "_timeout_s", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield f"--{_BOUNDARY}\r\n".encode()
        await asyncio.Event().wait()

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        late = [http.post("/v1/files", content=stalled(), headers=_FORM) for _ in range(4)]
        refused = await asyncio.gather(*late)
        monkeypatch.undo()
        files = {"file": ("rows.jsonl", content)}
        return [*refused, await http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)]

    assert [504] * 4 + [200] == [response.status_code for response in on_site(site, scenario)]


def test_requests_are_answered_when_as_many_uploads_as_may_be_are_stuck(site: Site, content: bytes) -> None:
    """Uploads have threads of their own: those that wait for the database take none that look up keys."""

    async def scenario(http: httpx.AsyncClient) -> tuple[int, list[int]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", content)}}
        with site.registry.database.write() as session:
            session.connection()  # nobody else writes from here on
            stuck = [asyncio.create_task(http.post("/v1/files", **form)) for _ in range(MAX_UPLOADS)]
            while len(_stored(site)) < MAX_UPLOADS:
                await asyncio.sleep(0.01)
            answer = await http.get("/v1/models")
            assert not any(upload.done() for upload in stuck)
        return answer.status_code, [upload.status_code for upload in await asyncio.gather(*stuck)]

    assert (200, [200] * MAX_UPLOADS) == on_site(site, scenario)


@pytest.mark.parametrize("folder", ["uploads", "files"])
def test_upload_is_507_when_the_disk_is_full(folder: str, site: Site, content: bytes, tmp_path: Path) -> None:
    """While the body arrives, or where it is kept: told without a path, not to be repeated, and nothing is left."""
    large = content * (100_000 // len(content))
    form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", large)}}
    with small_disk(tmp_path / folder, kilobytes=64):
        (tmp_path / folder / ".incoming").mkdir()
        refused = on_site(site, lambda http: http.post("/v1/files", **form))
        assert [] == [path for path in (tmp_path / folder).rglob("*") if path.is_file() and path.name != ".lock"]
    error = refused.json()["error"]
    assert (507, "storage_full", "false") == (refused.status_code, error["code"], refused.headers["x-should-retry"])
    assert error["message"] in ("no space left for the upload; nothing of it was kept", _NO_ROOM)
    assert [] == _stored(site)
    assert 200 == on_site(site, lambda http: http.post("/v1/files", **form)).status_code


def test_upload_arrives_in_the_home_folder_when_it_is_large(site: Site, tmp_path: Path) -> None:
    """Not in the system's folder for temporary files, which may be small; nothing stays behind of what is refused."""
    seen: set[str] = set()
    arriving = tmp_path / "uploads"

    async def slow() -> AsyncIterator[bytes]:
        yield f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
        for _ in range(3):
            yield b"x" * 10_000
            seen.update(path.name for path in arriving.rglob("*") if path.is_file())

    response = on_site(site, lambda http: http.post("/v1/files", content=slow(), headers=_FORM))
    assert (400, {"content"}) == (response.status_code, seen)
    assert [] == list(arriving.iterdir())


@pytest.mark.parametrize("charset", ["undefined", "utf-7", "unicode_escape"])
def test_upload_is_400_when_its_form_asks_for_another_charset(charset: str, site: Site) -> None:
    """Names are UTF-8: what other codecs make of bytes may be no text at all."""
    headers = {"content-type": f"{_FORM['content-type']}; charset={charset}"}
    response = on_site(site, lambda http: http.post("/v1/files", content=b"--b0--\r\n", headers=headers))
    assert (400, "file") == (response.status_code, response.json()["error"]["param"])


def test_file_tells_of_no_job_when_the_key_may_not_see_it(site: Site, content: bytes) -> None:
    """A file that another alias's job needs can't be deleted; which job that is, stays unsaid."""
    _, secret = site.keys.create("web", scopes=["train"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}
    fields, files = {"purpose": "fine-tune"}, {"file": ("rows.jsonl", content)}
    uploaded = on_site(site, lambda http: http.post("/v1/files", headers=headers, data=fields, files=files))
    stored = uploaded.json()["id"]
    job = _services(site).fine_tuning.jobs.create(JobOrder("tiny", stored, {}, 0, alias="support"))
    refused = on_site(site, lambda http: http.delete(f"/v1/files/{stored}", headers=headers))
    assert 409 == refused.status_code
    assert job.id not in refused.text


def test_files_of_others_are_absent_when_the_key_is_limited(site: Site, content: bytes) -> None:
    """Training data of another client, and results of jobs for other aliases: not listed, not found, not to be read."""
    files = _services(site).files
    theirs = files.upload(io.BytesIO(content), "theirs.jsonl").id
    results = {}
    for alias in ("legal", "support"):
        with files.placed_result(io.BytesIO(b"x"), f"{alias}.csv") as result, files.database.write() as session:
            files.register(session, result, alias=alias)
        results[alias] = result.id
    _, secret = site.keys.create("web", scopes=["train"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}

    def call(method: str, path: str = "") -> httpx.Response:
        return on_site(site, lambda http: http.request(method, f"/v1/files{path}", headers=headers))

    assert [results["legal"]] == [file["id"] for file in call("GET").json()["data"]]
    assert b"x" == call("GET", f"/{results['legal']}/content").content
    for hidden in (theirs, results["support"]):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert 404 == call(method, f"/{hidden}{path}").status_code
        assert "after" == call("GET", f"?after={hidden}").json()["error"]["param"]
    assert files.get(theirs).id == theirs
