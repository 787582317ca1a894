"""What every process that works on one job has: its claim, the services of its home, and a parent to end with."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from adapters.database import Database, open_database
from adapters.files import FileService
from adapters.jobs import Claim, JobService
from adapters.process_log import configure_log
from adapters.processes import parent_pid
from adapters.settings import CoreSettings, resolve_home

__all__ = ["DATABASE_PATIENCE_S", "JobProcess", "StoppedError", "job_process"]

DATABASE_PATIENCE_S = 300.0
_NICENESS = 10
_PARENT_CHECK_S = 0.5
_MAX_RESULT_BYTES = 100_000_000


class StoppedError(Exception):
    """The job was cancelled, paused or taken away between two stages."""


@dataclass(frozen=True, slots=True)
class JobProcess:
    """One attempt at a job, and what it works with. `stopping` is set when the supervisor ends."""

    claim: Claim
    core: CoreSettings
    database: Database
    jobs: JobService
    files: FileService
    stopping: threading.Event


@contextmanager
def job_process(arguments: list[str]) -> Iterator[JobProcess]:
    """Make this process one that works on the job whose id and claim are given, and that ends with its parent."""
    job_id, token = arguments
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the supervisor says when to stop
    signal.signal(signal.SIGTERM, _setter(stopping))
    threading.Thread(target=_end_with_parent, args=(parent_pid(),), daemon=True).start()
    os.nice(_NICENESS)
    configure_log()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    core = CoreSettings.load(resolve_home())
    database = open_database(core.resolved_database_url).waiting(DATABASE_PATIENCE_S)
    jobs = JobService(database)
    files = FileService(database, core.home / "files", max_bytes=_MAX_RESULT_BYTES)
    try:
        yield JobProcess(Claim(jobs.get(job_id), token), core, database, jobs, files, stopping)
    finally:
        database.close()


def _setter(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    return handle


def _end_with_parent(parent: int) -> None:
    # Without its supervisor nobody renews the claim, and another process will take the job up.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
