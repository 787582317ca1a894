"""`hotswap jobs create` in process: data of any shape becomes an upload of rows, a file of rows is stored as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters.database import open_database
from adapters.errors import DataError
from adapters.files import FileService
from adapters.settings import CoreSettings
from clients.cli.main import app
from tests.support.conversations import make_messages, write_rows


@pytest.fixture
def files(tmp_path: Path) -> FileService:
    """What is stored in the home folder."""
    core = CoreSettings.load(tmp_path / "home")
    core.home.mkdir()
    return FileService(open_database(core.resolved_database_url), core.home / "files", max_bytes=1 << 20)


def _create(files: FileService, *arguments: str) -> Result:
    result = CliRunner().invoke(
        app, ["jobs", "create", *arguments, "--json"], env={"HOTSWAP_HOME": str(files.root.parent)}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _stored(files: FileService, file_id: str) -> tuple[str, bytes]:
    return files.get(file_id).filename, files.path(file_id).read_bytes()


def test_jobs_create_makes_rows_when_the_data_is_a_table(tmp_path: Path, files: FileService) -> None:
    """With the options of train, for both files; what was recognised is said. A row keeps the line that it had."""
    table, conversation = tmp_path / "t.csv", tmp_path / "v.json"
    table.write_text("frage;antwort\nq;a\n")
    turns = [{"from": "kunde", "value": "q"}, {"from": "kunde", "value": "r"}, {"from": "bot", "value": "a"}]
    conversation.write_text(json.dumps([{"conversation": turns}]))
    options = ["--roles", "kunde=user,bot=assistant", "--join-turns"]

    first = _create(files, "--data", str(table), "--map", "user=frage,assistant=antwort", "--suffix", "legal")
    second = _create(files, "--data", str(conversation), "--validation", str(conversation), *options)

    rows = (json.dumps({"messages": make_messages("q", "a")}) + "\n").encode()
    assert ("t.csv", b"\n" + rows) == _stored(files, json.loads(first.stdout)["training_file"])
    assert f"{table}: 1 rows; CSV with semicolons: mapped to chat (user = frage, assistant = antwort)" in first.stderr
    job = json.loads(second.stdout)
    rows = (json.dumps({"messages": make_messages("q\n\nr", "a")}) + "\n").encode()
    assert [("v.json.jsonl", rows)] * 2 == [_stored(files, job[part]) for part in ("training_file", "validation_file")]


def test_jobs_create_stores_rows_under_a_name_that_tells_how_they_are_found(tmp_path: Path, files: FileService) -> None:
    """A list is no lines, whatever its file is called, and lines are lines."""
    rows = [json.dumps({"question": "q", "answer": answer}) for answer in "ab"]
    listed, lines = tmp_path / "listed.jsonl", tmp_path / "lines.json"
    listed.write_text(f"[{', '.join(rows)}]")
    lines.write_text("\n\n".join(rows))
    made = [_create(files, "--data", str(path), "--suffix", "legal") for path in (listed, lines)]
    names, stored = zip(*(_stored(files, json.loads(each.stdout)["training_file"]) for each in made), strict=True)
    assert ("listed.jsonl.json", "lines.json.jsonl") == names
    assert [2, 3] == [len(content.splitlines()) for content in stored]


def test_jobs_create_stores_the_very_bytes_when_the_data_is_rows(tmp_path: Path, files: FileService) -> None:
    """Lines in messages of the job are lines of the user's file; notes beside the rows stay in it."""
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": make_messages("q", "a"), "id": 7}])
    path.write_bytes(b"\n" + path.read_bytes())

    job = json.loads(_create(files, "--data", str(path)).stdout)

    assert ("rows.jsonl", path.read_bytes()) == _stored(files, job["training_file"])


def test_jobs_create_names_the_row_and_keeps_nothing_when_data_is_bad(tmp_path: Path, files: FileService) -> None:
    """As train does, with the command that shows every problem; the training file is gone again."""
    good = write_rows(tmp_path / "good.jsonl", [make_messages("q", "a")])
    bad = tmp_path / "bad.csv"
    bad.write_text("question,answer\nq,a\nr,\n")

    with pytest.raises(DataError, match=r"bad\.csv:3: field answer: is empty") as caught:
        _create(files, "--data", str(good), "--validation", str(bad))

    command = f"hotswap data check {good} --validation {bad} --home {tmp_path / 'home'}"
    assert [f"every problem, and how to leave rows out: {command}"] == caught.value.__notes__
    assert ([], False) == files.list(limit=9)
