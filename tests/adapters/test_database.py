"""The database: migrated once, by any number of processes; transactions whole or not at all."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

import adapters
from adapters.database import Database, open_database
from adapters.errors import DatabaseBusyError
from adapters.experiments import ExperimentService
from adapters.tables import AliasRow, FeedbackRow, Table, VersionRow, utc_now
from tests.support.postgres import POSTGRES_URL

SQLITE_ONLY = pytest.mark.skipif(bool(POSTGRES_URL), reason="it asks SQLite itself")
REPOSITORY = Path(__file__).parents[2]
_NAMES = ("aliases", "experiments", "arms", "exposures")
OPEN_WHEN_TOLD = """
import sys
from adapters.database import open_database
print("ready", flush=True)
sys.stdin.readline()
open_database(sys.argv[1]).close()
"""


def _head() -> str | None:
    return ScriptDirectory(str(Path(adapters.__file__).parent / "migrations")).get_current_head()


def test_migrations_equal_the_tables_when_compared(database: Database) -> None:
    """A changed table without a migration shows up as a difference."""
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    assert set(Table.metadata.tables) < set(inspect(database.engine).get_table_names())


def test_errors_show_no_values_when_a_statement_fails(database: Database) -> None:
    """They go to the log, and the values may be what users have written."""
    with pytest.raises(IntegrityError) as caught, database.write() as session:
        session.add(FeedbackRow(response_id="nobody", metric="m", value=1.0, comment="a secret", reported_at=utc_now()))
    assert "a secret" not in str(caught.value)


def _database_of(revision: str, path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(adapters.__file__).parent / "migrations"))
    config.attributes["engine"] = engine
    command.upgrade(config, revision)
    return engine


def test_experiments_go_on_when_rows_from_before_are_migrated(tmp_path: Path) -> None:
    """Stage 1 of all units, each with the arm that the sum of the weights gave it; exposures know their stage."""
    path = tmp_path / "hotswap.db"
    engine = _database_of("0005", path)
    moment = "2026-01-01 00:00:00"
    arms = [("A", 100 / 3, 0), ("B", 100 / 3, 1), ("C", 100 / 3, 2)]
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO experiments VALUES ('exp-1', 'legal', 's', 'running', '{moment}', NULL)"))
        for name, weight, position in arms:
            connection.execute(text(f"INSERT INTO arms VALUES ('exp-1', {position}, '{name}', 1, 'd', {weight!r})"))
        for response, experiment in (("r1", "'exp-1'"), ("r2", "NULL")):
            connection.execute(
                text(
                    "INSERT INTO exposures (response_id, served_at, alias, route, experiment_id, unit, unit_source, "
                    "prompt_tokens, completion_tokens, total_ms) "
                    f"VALUES ('{response}', '{moment}', 'legal', 'experiment', {experiment}, 'u', 'user', 1, 1, 1)"
                )
            )
    engine.dispose()
    opened = open_database(f"sqlite:///{path}")
    found = ExperimentService(opened).get("exp-1")
    assert ("running", 1, 100.0, ((0.0, 100.0),)) == (found.state, found.stage, found.traffic, found.stretches)
    assert found.created_at == found.starts_at
    cuts = [0.0, 100 / 3, 100 / 3 + 100 / 3, 100.0]
    assert [((low, high),) for low, high in pairwise(cuts)] == [arm.stretches for arm in found.arms]
    with opened.read() as session:
        rows = session.execute(text("SELECT response_id, stage, forced FROM exposures ORDER BY response_id")).all()
    assert [("r1", 1, 0), ("r2", None, 0)] == [tuple(row) for row in rows]
    opened.close()


def test_migrations_go_back_and_forth_when_asked_to(tmp_path: Path) -> None:
    """An experiment keeps the arms of its stage on the way down, and is the same on the way up."""
    path = tmp_path / "hotswap.db"
    engine = _database_of("0005", path)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO experiments VALUES ('exp-1', 'legal', 's', 'running', '2026', NULL)"))
        connection.execute(text("INSERT INTO arms VALUES ('exp-1', 0, 'A', 1, 'd', 40), ('exp-1', 1, 'B', 2, 'e', 60)"))
    before = _tables(engine)
    config = Config()
    config.set_main_option("script_location", str(Path(adapters.__file__).parent / "migrations"))
    config.attributes["engine"] = engine
    command.upgrade(config, "0006")
    command.downgrade(config, "0005")
    assert before == _tables(engine)
    engine.dispose()


def _tables(engine: Engine) -> dict[str, object]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM arms ORDER BY position")).all()
        columns = {table: sorted(c["name"] for c in inspect(connection).get_columns(table)) for table in _NAMES}
        indexes = {table: sorted(str(i["name"]) for i in inspect(connection).get_indexes(table)) for table in _NAMES}
    return {"rows": [tuple(row) for row in rows], "columns": columns, "indexes": indexes}


def test_files_know_their_job_when_rows_from_before_are_migrated(tmp_path: Path) -> None:
    """Kinds of training files and aliases of results are filled in, in a database of revision 0004 with rows."""
    path = tmp_path / "hotswap.db"
    engine = _database_of("0004", path)
    moment = "2026-01-01 00:00:00"
    with engine.begin() as connection:
        for file_id, purpose in (
            ("train", "fine-tune"),
            ("result", "fine-tune-results"),
            ("lost", "fine-tune-results"),
        ):
            connection.execute(
                text(
                    "INSERT INTO files (id, filename, purpose, size_bytes, sha256, created_at) "
                    f"VALUES ('{file_id}', 'f', '{purpose}', 1, '', '{moment}')"
                )
            )
        connection.execute(
            text(
                "INSERT INTO jobs (id, status, model, alias, training_file, method, seed, details, created_at, "
                "result_file, num_attempts) "
                f"VALUES ('job', 'succeeded', 'tiny', 'legal', 'train', '{{}}', 0, '{{}}', '{moment}', 'result', 1)"
            )
        )
    engine.dispose()
    opened = open_database(f"sqlite:///{path}")
    with opened.read() as session:
        rows = session.execute(text("SELECT id, kind, alias FROM files ORDER BY id")).all()
        assert [("lost", None, None), ("result", None, "legal"), ("train", "chat", None)] == [
            tuple(row) for row in rows
        ]
        assert [("job", 1)] == [tuple(row) for row in session.execute(text("SELECT id, is_validated FROM jobs"))]
    opened.close()


@SQLITE_ONLY
def test_sqlite_uses_wal_and_foreign_keys_when_opened(database: Database) -> None:
    """Readers don't block the writer, and rows can't point to nothing."""
    with database.read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert (session.scalar(text("PRAGMA busy_timeout")) or 0) > 0


def test_foreign_keys_are_enforced_when_a_row_points_to_nothing(database: Database) -> None:
    """Feedback for a response that isn't there can't be written, whoever writes it."""
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), database.write() as session:
        session.add(FeedbackRow(response_id="none", metric="m", value=1.0, comment=None, reported_at=utc_now()))


def test_open_database_keeps_the_rows_when_opened_again(tmp_path: Path) -> None:
    """Opening migrates, and never clears."""
    url = f"sqlite:///{tmp_path / 'new' / 'folder' / 'hotswap.db'}"
    moment = utc_now()
    first = open_database(url)
    with first.write() as session:
        session.add(AliasRow(name="legal", number=None, last_number=3, updated_at=moment))
    first.close()
    second = open_database(url)
    with second.read() as session:
        row = session.get_one(AliasRow, "legal")
        assert (3, moment) == (row.last_number, row.updated_at)
    second.close()


def test_open_database_migrates_once_when_two_processes_open_it_at_once(tmp_path: Path) -> None:
    """Both succeed, and the schema is at the newest revision."""
    url = f"sqlite:///{tmp_path / 'hotswap.db'}"
    command = [sys.executable, "-c", OPEN_WHEN_TOLD, url]
    children = [
        subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate() for child in children] == [("", ""), ("", "")]
    assert [child.returncode for child in children] == [0, 0]
    opened = open_database(url)
    with opened.read() as session:
        assert [_head()] == list(session.scalars(text("SELECT version_num FROM alembic_version")))
    opened.close()


def test_write_leaves_nothing_when_the_block_raises(database: Database) -> None:
    """All of a transaction is committed at the end of the block, or none of it."""

    def fail_half_way() -> None:
        with database.write() as session:
            session.add(AliasRow(name="legal", number=None, last_number=0, updated_at=utc_now()))
            session.flush()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    with database.read() as session:
        assert session.get(AliasRow, "legal") is None


def test_write_loses_no_update_when_threads_read_and_then_write(database: Database) -> None:
    """A writer holds the lock from its first read; otherwise two would read the same number, or one would fail."""
    with database.write() as session:
        session.add(AliasRow(name="legal", number=None, last_number=0, updated_at=utc_now()))
    start = threading.Barrier(4)
    errors: list[Exception] = []

    def increment() -> None:
        start.wait()
        try:
            for _ in range(10):
                with database.write() as session:
                    session.get_one(AliasRow, "legal").last_number += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=increment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with database.read() as session:
        assert session.get_one(AliasRow, "legal").last_number == 40


def test_reader_sees_the_old_state_when_a_writer_has_not_committed(database: Database) -> None:
    """A reader neither waits for the writer nor sees half of what it does."""
    with database.write() as writer:
        writer.add(AliasRow(name="legal", number=None, last_number=0, updated_at=utc_now()))
        writer.flush()
        with database.read() as reader:
            assert reader.get(AliasRow, "legal") is None
    with database.read() as reader:
        assert reader.get(AliasRow, "legal") is not None


def test_write_is_refused_when_others_hold_the_database_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of our own, which says that nothing was written; afterwards writing goes on."""
    monkeypatch.setattr("adapters.database._BUSY_TIMEOUT_MS", 20)
    opened = open_database(f"sqlite:///{tmp_path / 'hotswap.db'}")
    row = {"number": None, "last_number": 0, "updated_at": utc_now()}
    with opened.write() as holder:
        holder.add(AliasRow(name="legal", **row))
        holder.flush()
        with pytest.raises(DatabaseBusyError, match=r"more than 0\.02 s; nothing was written"), opened.write() as late:
            late.add(AliasRow(name="support", **row))
    with opened.write() as session:
        assert session.get(AliasRow, "support") is None
    opened.close()


@SQLITE_ONLY
def test_other_errors_of_the_database_stay_what_they_are_when_raised(database: Database) -> None:
    """A table that is missing is no matter of waiting."""
    with pytest.raises(OperationalError, match="no such table"), database.read() as session:
        session.execute(text("SELECT * FROM absent"))


def test_moments_are_in_utc_when_read_back(database: Database) -> None:
    """SQLite forgets the time zone; a naive moment would be compared wrongly."""
    moment = utc_now()
    with database.write() as session:
        session.add(
            VersionRow(
                digest="a" * 64,
                base_fingerprint="f" * 64,
                rank=4,
                size_bytes=1,
                source="imported",
                published_at=moment,
                metrics={"loss": 0.5},
            )
        )
    with database.read() as session:
        row = session.get_one(VersionRow, "a" * 64)
        assert moment == row.published_at
        assert row.published_at.tzinfo is not None
        assert row.metrics == {"loss": 0.5}


@SQLITE_ONLY
def test_write_waits_for_the_lock_when_the_database_is_told_to_wait(database: Database) -> None:
    """Longer than SQLite itself waits; without that a locked database is an error, and so it is when time is up."""
    event.listen(database.engine, "connect", lambda connection, record: connection.execute("PRAGMA busy_timeout=1"))
    database.close()  # connections from before have the long timeout
    path = database.engine.url.database
    assert path is not None
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    row = AliasRow(name="legal", number=None, last_number=0, updated_at=utc_now())
    for hasty in (database, database.waiting(0.3)):
        with pytest.raises(DatabaseBusyError, match="held by others"), hasty.write() as session:
            session.add(row)
    free = threading.Timer(0.3, holder.execute, ["COMMIT"])
    free.start()
    with database.waiting(60).write() as session:
        session.merge(row)
    free.join()
    holder.close()
    with database.read() as session:
        assert session.get(AliasRow, "legal") is not None
