"""Claims jobs and works on each in a process of its own: `python -m training.supervisor`.

Two lanes run side by side: one validates the files of new jobs, one trains. It holds no model and imports no trainer,
so that nothing a job does can end it. `hotswap serve` starts it, restarts it if it dies, and ends it; it ends by itself
when the server is gone.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import structlog
from sqlalchemy.exc import OperationalError

from adapters.checkpoint_adapters import CheckpointAdapters
from adapters.database import open_database
from adapters.errors import DatabaseBusyError, NotFoundError
from adapters.files import ACTIVE_STATUSES
from adapters.jobs import MAX_ATTEMPTS, Claim, JobService, Standing
from adapters.process_log import configure_log
from adapters.processes import child_environment, parent_pid
from adapters.records import Job, JobError, JobStatus
from adapters.settings import CoreSettings, resolve_home
from adapters.store import ArtifactStore
from training.job_settings import describe_failure
from training.memory import MEMORY_ADVICE
from training.scratch import discard_scratch, make_scratch

__all__ = ["Supervisor", "main"]

_log = structlog.get_logger(__name__)

_TRAINER = (sys.executable, "-m", "training.job")
_VALIDATOR = (sys.executable, "-m", "training.validation")
_LEASE_S = 20.0
_POLL_S = 0.5
_GRACE_S = 20.0
_SWEEP_EVERY_S = 60.0
_DATABASE_PATIENCE_S = 2.0  # no longer: a process has to be watched meanwhile
_DATABASE_ERRORS = (OperationalError, DatabaseBusyError)
_INSIST_EVERY_S = 5.0
_LEAST_FREE_BYTES = 1_000_000
_NO_PROCESS_ERRORS = (errno.ENOMEM, errno.EAGAIN)
_PASSING = frozenset({"disk_full", "out_of_memory"})  # what a process may be refused for now, and not a minute later
_MAX_DEVICE_CHARS = 120
_OUT_OF_MEMORY_COUNTS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


@dataclass(frozen=True, slots=True)
class _Lane:
    """One kind of work: how a job is claimed for it, which command does it, and the job's status meanwhile.

    `worker` is what messages call the command's process.
    """

    take: Callable[[], Claim | None]
    command: Sequence[str]
    status: JobStatus
    worker: str


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a process ended: its exit code or negated signal, and whether it was killed by the supervisor itself."""

    returncode: int
    is_killed: bool


class Supervisor:
    """Works on jobs until it is told to stop.

    Args:
        core: Base model, home and database, for the processes that it starts.
        jobs: The job table.
        trainer: The command that trains one job, without its two arguments.
        validator: The command that validates the files of one job, without its two arguments.
        lease_s: How long a claim holds without being renewed; it is renewed five times as often.
        poll_s: Seconds between two looks at the job table and at a process.
        grace_s: Seconds that a process has to obey before it is killed.
        sweep_every_s: Seconds between two looks, while no files are validated, for what jobs at their end left.
    """

    def __init__(
        self,
        core: CoreSettings,
        jobs: JobService,
        *,
        trainer: Sequence[str] = _TRAINER,
        validator: Sequence[str] = _VALIDATOR,
        lease_s: float = _LEASE_S,
        poll_s: float = _POLL_S,
        grace_s: float = _GRACE_S,
        sweep_every_s: float = _SWEEP_EVERY_S,
    ) -> None:
        self._core = core
        self._jobs = jobs
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._sweep_every_s, self._sweep_again_at = sweep_every_s, 0.0
        self._adapters = CheckpointAdapters(jobs.database, ArtifactStore(core.home / "store"))
        self._parent = parent_pid()
        self.stopping = threading.Event()
        device = f"{platform.node()}/{core.device}"[-_MAX_DEVICE_CHARS:]
        self._training = _Lane(
            lambda: jobs.claim(lease_s=lease_s, device=device),
            trainer,
            "running",
            "trainer",
        )
        self._validation = _Lane(
            lambda: jobs.claim_validation(lease_s=lease_s),
            validator,
            "validating_files",
            "process that validates the files",
        )

    def run(self) -> None:
        """Take one job after another until `stopping` is set or the parent process is gone."""
        beside = threading.Thread(target=self._keep_taking, args=(self._validation,), name="validation")
        beside.start()
        try:
            self._keep_taking(self._training)
        finally:
            beside.join()

    def run_one(self) -> bool:
        """Train the job whose turn it is; False if there is none."""
        return self._take_one(self._training)

    def validate_one(self) -> bool:
        """Validate the files of one new job; False if there is none."""
        return self._take_one(self._validation)

    def _keep_taking(self, lane: _Lane) -> None:
        try:
            while not self._is_ending():
                if not self._take_one(lane):
                    if lane is self._validation:  # which is idle while a job is trained for hours
                        self._sweep_at_times()
                    self.stopping.wait(self._poll_s)
        finally:
            # Both lanes end with either: half a supervisor would leave jobs waiting, a new one is started at once.
            self.stopping.set()

    def _is_ending(self) -> bool:
        """Whether the supervisor was told to stop, or is without its parent, which from then on is the same."""
        if os.getppid() != self._parent:
            self.stopping.set()
        return self.stopping.is_set()

    def _take_one(self, lane: _Lane) -> bool:
        try:
            claim = lane.take()
        except _DATABASE_ERRORS as error:
            _log.error("no_job_can_be_taken", reason=_reason(error), retry_in_s=_INSIST_EVERY_S)
            self.stopping.wait(_INSIST_EVERY_S)
            return False
        if claim is None:
            return False
        folder = self._core.home / "jobs" / claim.job.id
        _log.info("job_taken", job=claim.job.id, alias=claim.job.alias, worker=lane.worker)
        num_killed = _count_memory_kills()
        try:
            process = self._start(lane, claim, folder)
        except OSError as error:
            _log.exception("job_not_started", job=claim.job.id, worker=lane.worker)
            reason = _describe_refusal(lane, error)
            self._insist(lambda: self._give_up(claim, reason))
            if reason.code in _PASSING:  # the next job would be refused as well
                self.stopping.wait(_INSIST_EVERY_S)
            return True
        ending = self._watch(process, claim)
        discard_scratch(folder)
        is_out_of_memory = _count_memory_kills() > num_killed
        self._insist(lambda: self._conclude(lane, claim, ending, is_out_of_memory=is_out_of_memory))
        return True

    def _start(self, lane: _Lane, claim: Claim, folder: Path) -> subprocess.Popen[bytes]:
        """Start the process that works on a job, with a log and a scratch folder of its own.

        Raises:
            OSError: the disk or the machine has no room for that.
        """
        folder.mkdir(parents=True, exist_ok=True)
        discard_scratch(folder)  # of a process whose supervisor was killed, too
        places = {"TMPDIR": str(make_scratch(folder))}
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*lane.command, claim.job.id, claim.token],
                env=os.environ | self._core.environment | child_environment() | places,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _give_up(self, claim: Claim, reason: JobError) -> None:
        """Let a job that no process could be started for wait for its next attempt, or end it if none would help."""
        if reason.code in _PASSING:
            problem = f"{reason.message[:1].upper()}{reason.message[1:]}"
            self._leave(self._jobs.release(claim, problem=problem, last=reason))
        else:
            self._jobs.fail(claim, reason)
            self._leave(self._jobs.release(claim))

    def _insist(self, act: Callable[[], None]) -> None:
        """Do what must not be lost as soon as the database takes it, which on a full disk may be hours later."""
        while True:
            try:
                return act()
            except _DATABASE_ERRORS as error:
                if self._is_ending():
                    raise
                _log.error("database_can_not_be_written", reason=_reason(error), retry_in_s=_INSIST_EVERY_S)
                self.stopping.wait(_INSIST_EVERY_S)

    def _watch(self, process: subprocess.Popen[bytes], claim: Claim) -> _Ending:
        """Renew the claim while the process runs; pass on a stop, and kill a process that doesn't obey."""
        lost_at, renew_at = time.monotonic() + self._lease_s, 0.0
        kill_at: float | None = None
        is_killed = False
        while True:
            try:
                return _Ending(process.wait(self._poll_s), is_killed)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            standing: Standing = "continue"
            try:
                if now >= renew_at:
                    has_claim = self._jobs.renew(claim, lease_s=self._lease_s)
                    renew_at, lost_at = now + self._lease_s / 5, now + self._lease_s if has_claim else now
                standing = self._jobs.standing(claim)
            except _DATABASE_ERRORS as error:  # the claim holds until its lease has run out
                _log.warning("claim_not_renewed", job=claim.job.id, reason=_reason(error))
            if kill_at is None and (self._is_ending() or standing == "stop"):
                kill_at = now + self._grace_s
                if self._is_ending():  # a process whose job is at its end knows that from the job table
                    process.send_signal(signal.SIGTERM)
            if now >= lost_at or (kill_at is not None and now >= kill_at):
                is_killed = True
                process.kill()

    def _conclude(self, lane: _Lane, claim: Claim, ending: _Ending, *, is_out_of_memory: bool) -> None:
        """Leave no job that seems to be worked on while nobody is."""
        status = self._jobs.get(claim.job.id).status
        is_open = status == lane.status and not self._is_ending()
        if ending.returncode > 0 and status == lane.status:
            self._jobs.fail(claim, self._describe_crash(lane, ending.returncode))
        if is_open and ending.returncode < 0 and not ending.is_killed:
            cause = _describe_kill(lane, -ending.returncode, is_out_of_memory=is_out_of_memory)
            last = JobError("out_of_memory" if is_out_of_memory else "trainer_lost", _last_words(cause))
            job = self._jobs.release(claim, problem=f"{cause}; {self._what_follows(claim)}", last=last)
        else:
            job = self._jobs.release(claim)
        _log.info("job_left", job=job.id, status=job.status, returncode=ending.returncode)
        self._leave(job)

    def _leave(self, job: Job) -> None:
        """Delete what nobody needs of a job that is at its end."""
        if job.status not in ACTIVE_STATUSES:
            self._discard_checkpoints(self._core.home / "jobs" / job.id)
            self._adapters.sweep()

    def _what_follows(self, claim: Claim) -> str:
        newest, _ = self._jobs.checkpoints(claim.job.id, limit=1)
        return f"the job goes on from its checkpoint at step {newest[0].step}" if newest else "it begins again"

    def _describe_crash(self, lane: _Lane, returncode: int) -> JobError:
        if shutil.disk_usage(self._core.home).free < _LEAST_FREE_BYTES:
            return JobError("disk_full", f"the {lane.worker} ended since the server's disk is full: free some space")
        message = f"the {lane.worker} ended with exit code {returncode}; the job's log on the server says why"
        return JobError("trainer_crashed", message)

    def _sweep_at_times(self) -> None:
        """Sweep at the first idle moment and then once a minute: jobs are cancelled while nobody works on them, too."""
        if time.monotonic() < self._sweep_again_at:
            return
        self._sweep_again_at = time.monotonic() + self._sweep_every_s
        try:
            self._sweep()
        except _DATABASE_ERRORS as error:
            _log.warning("nothing_swept", reason=_reason(error), retry_in_s=self._sweep_every_s)

    def _sweep(self) -> None:
        """Delete the states of jobs that are at their end or that nobody knows, and old adapters of checkpoints."""
        self._adapters.sweep()
        folders = [path for path in (self._core.home / "jobs").glob("*") if path.is_dir()]
        for folder in folders:
            try:
                is_active = self._jobs.get(folder.name).status in ACTIVE_STATUSES
            except NotFoundError:
                is_active = False
            if not is_active:
                self._discard_checkpoints(folder)
                discard_scratch(folder)

    @staticmethod
    def _discard_checkpoints(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _reason(error: OperationalError | DatabaseBusyError) -> str:
    """In one line: SQLAlchemy's own message holds the statement."""
    return str(error.orig) if isinstance(error, OperationalError) else str(error)


def _describe_refusal(lane: _Lane, error: OSError) -> JobError:
    """Why the process of a job could not even be started; a path of the server is left to the log."""
    begin = f"the {lane.worker} could not be started: "
    known = describe_failure(error)
    if known.code == "disk_full":
        return JobError(known.code, begin + known.message)
    if error.errno in _NO_PROCESS_ERRORS:
        advice = "the server's machine has no memory for another process, or too many processes: end what else needs it"
        return JobError("out_of_memory", f"{begin}{advice}, and create the job again")
    return JobError("trainer_crashed", f"{begin}{error.strerror or type(error).__name__}; the server's log says where")


def _describe_kill(lane: _Lane, number: int, *, is_out_of_memory: bool) -> str:
    reason = ""
    if is_out_of_memory:
        reason = ", by the kernel, since memory ran out"
    elif number == signal.SIGKILL:
        reason = ", as the kernel does when memory runs out"
    return f"The {lane.worker} was killed by signal {number}{reason}"


def _last_words(cause: str) -> str:
    """What the job's error says of a process that was killed as often as is tried."""
    advice = f": {MEMORY_ADVICE}, or end what else needs this machine's memory" if "memory" in cause else ""
    return f"{cause[0].lower()}{cause[1:]}, {MAX_ATTEMPTS} times without reaching another checkpoint{advice}"


def _count_memory_kills() -> int:
    """How many processes the kernel has killed for memory: of this container, else of the machine; 0 if nobody says."""
    for path in _OUT_OF_MEMORY_COUNTS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0


def main() -> None:
    """Supervise until SIGTERM, or until the process that started this one is gone."""
    configure_log()
    core = CoreSettings.load(resolve_home())
    database = open_database(core.resolved_database_url).waiting(_DATABASE_PATIENCE_S)
    supervisor = Supervisor(core, JobService(database))

    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stopping.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the server says when to stop
    signal.signal(signal.SIGTERM, stop)
    supervisor.run()
    database.close()


if __name__ == "__main__":
    main()
