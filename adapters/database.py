"""Opens the SQL database, migrated to the newest revision: SQLite in WAL mode by default, else PostgreSQL."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from adapters.errors import ConfigurationError, DatabaseBusyError
from adapters.records import COMMAND_LINE, Actor

__all__ = ["Database", "actor_of", "open_database"]

_log = structlog.get_logger(__name__)

_MIGRATIONS_DIR = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_MS = 10_000
_WRITERS_LOCK = 0x407_5A9  # PostgreSQL's advisory lock that writers take; any number that is ours alone
_LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL's code for a lock timeout
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_ACTOR = "actor"  # in `Session.info`


class Database:
    """A migrated database; hands out sessions. Safe to share between threads, not across a fork.

    Every session knows on whose behalf it works, so that what hides names from an actor, and what writes the audit log,
    need no word from the callers between.
    """

    def __init__(self, engine: Engine, actor: Actor = COMMAND_LINE) -> None:
        self.engine = engine
        self.actor = actor
        self._patience_s = 0.0
        self._readers = sessionmaker(engine, expire_on_commit=False)
        self._writers = sessionmaker(engine.execution_options(writes=True), expire_on_commit=False)

    def waiting(self, limit_s: float) -> Database:
        """The same database for a process that nobody waits for: while it is locked or away, this one tries again.

        Each session tries for so many seconds before it fails, ever more rarely.
        """
        view = copy(self)
        view._patience_s = limit_s
        return view

    def acting_for(self, actor: Actor) -> Database:
        """The same database on somebody's behalf; closing either closes both."""
        view = copy(self)
        view.actor = actor
        return view

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading.

        Raises:
            DatabaseBusyError: others hold the database for longer than is waited for.
        """
        with _busy_is_told(), self._readers(info={_ACTOR: self.actor}) as session:
            self._begin(session)
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one transaction: all of it is committed at the end of the block, or none of it.

        Raises:
            DatabaseBusyError: others hold the database for longer than is waited for; nothing was written.
        """
        with _busy_is_told(), self._writers(info={_ACTOR: self.actor}) as session, session.begin():
            self._begin(session)
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _begin(self, session: Session) -> None:
        """Begin the transaction as soon as that can be done: to write is to hold the lock from then on."""
        give_up_at = time.monotonic() + self._patience_s
        wait_s = _FIRST_WAIT_S
        while self._patience_s:
            try:
                session.connection()
            except OperationalError as error:
                if time.monotonic() + wait_s > give_up_at:
                    raise
                _log.warning("database_not_to_be_had", reason=str(error.orig), retry_in_s=wait_s)
            else:
                return
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


@contextmanager
def _busy_is_told() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if not _is_busy(error.orig):
            raise
        raise DatabaseBusyError(
            f"the database was held by others for more than {_BUSY_TIMEOUT_MS / 1000:g} s; nothing was written"
        ) from error


def _is_busy(error: BaseException | None) -> bool:
    # The low byte: what stands above it tells kinds of the same apart.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or (
        getattr(error, "sqlstate", None) == _LOCK_NOT_AVAILABLE
    )


def actor_of(session: Session) -> Actor:
    """On whose behalf a session works."""
    actor: Actor = session.info[_ACTOR]
    return actor


def open_database(url: str) -> Database:
    """Connect to `url`, creating and migrating the database where needed.

    Two processes may call this at the same time: migrations run under a lock. Writers come one after another, with
    SQLite by its own lock and with PostgreSQL by an advisory one: what a transaction has read is true until its end.

    Raises:
        ConfigurationError: the URL can't be used.
    """
    try:
        parsed = make_url(url)
        # Errors go to logs; the values of a statement may be what users have written.
        engine = create_engine(parsed, hide_parameters=True)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigurationError(f"setting database_url: {error}") from None
    if parsed.get_backend_name() == "postgresql":
        event.listen(engine, "begin", _lock_when_writing)
        _migrate(engine.execution_options(writes=True))
        return Database(engine)
    if parsed.get_backend_name() != "sqlite":
        raise ConfigurationError(
            f"setting database_url: expected sqlite or postgresql, found {parsed.get_backend_name()}"
        )
    event.listen(engine, "connect", _set_sqlite_pragmas)
    event.listen(engine, "begin", _begin_immediate_when_writing)
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigurationError("setting database_url: SQLite needs a file, since several processes share it")
    path = Path(parsed.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _migrate(engine)
    return Database(engine)


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS_DIR))
    config.attributes["engine"] = engine
    command.upgrade(config, "head")


def _set_sqlite_pragmas(connection: sqlite3.Connection, record: Any) -> None:
    # sqlite3's own transaction handling starts a transaction too late for SELECT ... then UPDATE; see the begin event.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.close()


def _begin_immediate_when_writing(connection: Any) -> None:
    # A deferred transaction that reads and then writes fails at once when another writer came between; IMMEDIATE waits.
    mode = "IMMEDIATE" if connection.get_execution_options().get("writes") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {mode}")


def _lock_when_writing(connection: Any) -> None:
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_BUSY_TIMEOUT_MS}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")
