"""Claims jobs one at a time and runs each in a process of its own: `python -m training.supervisor`.

It holds no model and imports no trainer, so that nothing a job does can end it. `hotswap serve` starts it, restarts it
if it dies, and ends it; it ends by itself when the server is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import structlog

from adapters.database import open_database
from adapters.errors import NotFoundError
from adapters.files import ACTIVE_STATUSES
from adapters.jobs import Claim, JobService
from adapters.processes import child_environment, parent_pid
from adapters.records import JobError
from adapters.settings import CoreSettings, resolve_home
from training.process_log import configure_process_log

__all__ = ["Supervisor", "main"]

_log = structlog.get_logger(__name__)

_TRAINER = (sys.executable, "-m", "training.job")
_LEASE_S = 20.0
_POLL_S = 0.5
_GRACE_S = 20.0


class Supervisor:
    """Runs jobs until it is told to stop.

    Args:
        core: Base model, home and database, for the trainers.
        jobs: The job table.
        trainer: The command that runs one job, without its two arguments.
        lease_s: How long a claim holds without being renewed; it is renewed five times as often.
        poll_s: Seconds between two looks at the job table and at the trainer.
        grace_s: Seconds that a trainer has to obey before it is killed.
    """

    def __init__(
        self,
        core: CoreSettings,
        jobs: JobService,
        *,
        trainer: Sequence[str] = _TRAINER,
        lease_s: float = _LEASE_S,
        poll_s: float = _POLL_S,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._core = core
        self._jobs = jobs
        self._trainer = trainer
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._grace_s = grace_s
        self.stopping = threading.Event()

    def run(self) -> None:
        """Take one job after another until `stopping` is set or the parent process is gone."""
        parent = parent_pid()
        self._sweep()
        while not self.stopping.is_set() and os.getppid() == parent:
            if not self.run_one():
                self.stopping.wait(self._poll_s)

    def run_one(self) -> bool:
        """Run the oldest job that waits; False if there is none."""
        claim = self._jobs.claim(lease_s=self._lease_s)
        if claim is None:
            return False
        folder = self._core.home / "jobs" / claim.job.id
        folder.mkdir(parents=True, exist_ok=True)
        _log.info("job_started", job=claim.job.id, alias=claim.job.alias)
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*self._trainer, claim.job.id, claim.token],
                env=os.environ | self._core.environment | child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            returncode = self._watch(process, claim)
        self._conclude(claim, returncode)
        return True

    def _watch(self, process: subprocess.Popen[bytes], claim: Claim) -> int:
        """Renew the claim while the trainer runs; pass on a stop, and kill a trainer that doesn't obey."""
        parent = parent_pid()
        renew_at = 0.0
        kill_at: float | None = None
        while True:
            try:
                return process.wait(self._poll_s)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            has_claim = True
            if now >= renew_at:
                has_claim = self._jobs.renew(claim, lease_s=self._lease_s)
                renew_at = now + self._lease_s / 5
            is_ending = self.stopping.is_set() or os.getppid() != parent
            if kill_at is None and (is_ending or self._jobs.standing(claim) == "stop"):
                kill_at = now + self._grace_s
                if is_ending:  # a trainer whose job is at its end knows that from the job table
                    process.send_signal(signal.SIGTERM)
            if not has_claim or (kill_at is not None and now >= kill_at):
                process.kill()

    def _conclude(self, claim: Claim, returncode: int) -> None:
        """Leave no job that seems to run without a trainer."""
        job = self._jobs.get(claim.job.id)
        is_lost = returncode < 0 and job.status == "running" and not self.stopping.is_set()
        if returncode > 0 and job.status == "running":
            message = f"the trainer ended with exit code {returncode}; the job's log on the server says why"
            self._jobs.fail(claim, JobError("trainer_crashed", message))
        lost = f"The trainer was killed by signal {-returncode}; the job goes on from its newest checkpoint"
        job = self._jobs.release(claim, problem=lost if is_lost else None)
        _log.info("job_left", job=job.id, status=job.status, returncode=returncode)
        if job.status not in ACTIVE_STATUSES:
            self._discard_checkpoints(self._core.home / "jobs" / job.id)

    def _sweep(self) -> None:
        """Delete the checkpoints of jobs that are at their end, and those of jobs that nobody knows."""
        folders = [path for path in (self._core.home / "jobs").glob("*") if path.is_dir()]
        for folder in folders:
            try:
                is_active = self._jobs.get(folder.name).status in ACTIVE_STATUSES
            except NotFoundError:
                is_active = False
            if not is_active:
                self._discard_checkpoints(folder)

    @staticmethod
    def _discard_checkpoints(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def main() -> None:
    """Supervise until SIGTERM, or until the process that started this one is gone."""
    configure_process_log()
    core = CoreSettings.load(resolve_home())
    database = open_database(core.resolved_database_url)
    supervisor = Supervisor(core, JobService(database))

    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stopping.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the server says when to stop
    signal.signal(signal.SIGTERM, stop)
    supervisor.run()
    database.close()


if __name__ == "__main__":
    main()
