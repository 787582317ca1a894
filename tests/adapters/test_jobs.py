"""The job table: who may run a job, what clients may turn it into, and what a lost trainer leaves."""

from __future__ import annotations

import io
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from adapters.database import Database
from adapters.errors import ConflictError, InvalidInputError, InvalidNameError, NotFoundError, OverloadedError
from adapters.files import FileService
from adapters.jobs import MAX_ATTEMPTS, Claim, JobOrder, JobService
from adapters.records import Job, JobError
from adapters.tables import utc_now
from tests.support.conversations import easy_rows, write_rows

LEASE_S = 10.0


class Clock:
    """Time that a test moves on."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> datetime:
        """The time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    """The time by which leases run out."""
    return Clock()


@pytest.fixture
def jobs(database: Database, clock: Clock) -> JobService:
    """An empty job table."""
    return JobService(database, max_queued=5, clock=clock)


@pytest.fixture
def file_id(database: Database, tmp_path: Path) -> str:
    """A training file."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(3)).read_bytes()
    return FileService(database, tmp_path / "files", max_bytes=10_000).upload(io.BytesIO(rows), "rows.jsonl").id


def _create(jobs: JobService, file_id: str, **metadata: str) -> Job:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    return jobs.create(JobOrder("tiny", file_id, method, 7, alias="legal", metadata=metadata))


def _claim(jobs: JobService) -> Claim:
    claim = jobs.claim(lease_s=LEASE_S)
    assert claim is not None
    return claim


def _messages(jobs: JobService, job: Job) -> list[str]:
    return [event.message for event in jobs.follow(job.id, after=None, limit=100)[0]]


def test_create_keeps_the_order_when_files_exist(jobs: JobService, file_id: str) -> None:
    """A job is queued with what was asked for, and an event says so."""
    job = _create(jobs, file_id, team="a")
    assert (job.status, job.alias, job.seed, job.metadata) == ("queued", "legal", 7, {"team": "a"})
    assert jobs.get(job.id) == job
    assert _messages(jobs, job) == [f"Created fine-tuning job: {job.id}"]


def test_create_makes_an_alias_when_none_is_given(jobs: JobService, file_id: str) -> None:
    """Of the model's name and the job's id, with other letters than the grammar's replaced."""
    job = jobs.create(JobOrder("Org/Tiny Model", file_id, {}, 0))
    assert job.alias == f"org-tiny-model-ft-{job.id.removeprefix('ftjob-')[:8]}"


def test_create_is_refused_when_a_file_is_missing_or_no_training_data(
    jobs: JobService, database: Database, tmp_path: Path, file_id: str
) -> None:
    """The field at fault is named; nothing is queued."""
    files = FileService(database, tmp_path / "files", max_bytes=10_000)
    with files.placed_result(io.BytesIO(b"x"), "r.csv") as result, database.write() as session:
        files.register(session, result)
    with pytest.raises(InvalidInputError, match="there is no file 'file-x'") as missing:
        jobs.create(JobOrder("tiny", "file-x", {}, 0))
    assert missing.value.param == "training_file"
    with pytest.raises(InvalidInputError, match="'fine-tune-results'") as wrong:
        jobs.create(JobOrder("tiny", file_id, {}, 0, validation_file=result.id))
    assert wrong.value.param == "validation_file"
    with pytest.raises(InvalidNameError):
        jobs.create(JobOrder("tiny", file_id, {}, 0, alias="base"))
    assert jobs.list(limit=10) == ([], False)


def test_create_is_refused_when_too_many_jobs_wait(jobs: JobService, file_id: str) -> None:
    """The queue is bounded; a job that runs doesn't count."""
    for _ in range(5):
        _create(jobs, file_id)
    with pytest.raises(OverloadedError, match="5 jobs are waiting"):
        _create(jobs, file_id)
    _claim(jobs)
    assert _create(jobs, file_id).status == "queued"


def test_claim_takes_the_oldest_job_once_when_two_supervisors_ask(jobs: JobService, file_id: str) -> None:
    """No job has two trainers."""
    first, second = _create(jobs, file_id), _create(jobs, file_id)
    assert (_claim(jobs).job.id, _claim(jobs).job.id) == (first.id, second.id)
    assert jobs.claim(lease_s=LEASE_S) is None
    assert jobs.get(first.id).status == "running"


def test_claim_gives_every_job_to_one_thread_when_many_ask_at_once(jobs: JobService, file_id: str) -> None:
    """Claiming reads and writes in one transaction."""
    created = {_create(jobs, file_id).id for _ in range(5)}
    start = threading.Barrier(4)
    taken: list[str] = []

    def take() -> None:
        start.wait()
        while claim := jobs.claim(lease_s=LEASE_S):
            taken.append(claim.job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(created)


def test_job_is_taken_up_again_when_its_lease_has_run_out(jobs: JobService, clock: Clock, file_id: str) -> None:
    """A renewed claim holds; one that isn't renewed is lost, and with it every right to write."""
    _create(jobs, file_id)
    lost = _claim(jobs)
    clock.advance(LEASE_S - 1)
    assert jobs.renew(lost, lease_s=LEASE_S)
    clock.advance(LEASE_S - 1)
    assert jobs.claim(lease_s=LEASE_S) is None
    clock.advance(2)
    again = _claim(jobs)
    assert again.job.id == lost.job.id
    assert not jobs.renew(lost, lease_s=LEASE_S)
    assert jobs.standing(lost) == "stop"
    jobs.fail(lost, JobError("x", "too late"))
    jobs.note(lost, "too late")
    jobs.add_checkpoint(lost, 1, {})
    jobs.release(lost)
    assert jobs.get(again.job.id).status == "running"
    assert jobs.standing(again) == "continue"
    assert jobs.checkpoints(again.job.id, limit=1) == ([], False)
    assert "too late" not in " ".join(_messages(jobs, again.job))


def test_succeed_is_refused_when_the_claim_is_lost_or_the_job_cancelled(
    jobs: JobService, clock: Clock, file_id: str
) -> None:
    """What the refusal rolls back is the publication."""

    def succeed(claim: Claim) -> None:
        with jobs.database.write() as session:
            jobs.succeed(session, claim, fine_tuned_model="legal@v1", result_file="file-r", trained_tokens=3)

    _create(jobs, file_id)
    lost = _claim(jobs)
    clock.advance(LEASE_S + 1)
    holder = _claim(jobs)
    with pytest.raises(ConflictError):
        succeed(lost)
    jobs.cancel(holder.job.id)
    with pytest.raises(ConflictError, match="is cancelled"):
        succeed(holder)
    assert jobs.get(holder.job.id).fine_tuned_model is None
    other = _create(jobs, file_id)
    succeed(_claim(jobs))
    done = jobs.get(other.id)
    assert (done.status, done.fine_tuned_model, done.result_file) == ("succeeded", "legal@v1", "file-r")
    assert (done.trained_tokens, done.finished_at) == (3, clock.now)


def test_job_fails_when_its_trainer_is_lost_too_often(jobs: JobService, clock: Clock, file_id: str) -> None:
    """A job that kills every trainer ends; one that reached a checkpoint between has all its attempts again."""
    job = _create(jobs, file_id)
    for _ in range(MAX_ATTEMPTS - 1):
        _claim(jobs)
        clock.advance(LEASE_S + 1)
    jobs.add_checkpoint(_claim(jobs), 4, {})
    for _ in range(MAX_ATTEMPTS - 1):
        clock.advance(LEASE_S + 1)
        _claim(jobs)
    clock.advance(LEASE_S + 1)
    assert jobs.claim(lease_s=LEASE_S) is None
    ended = jobs.get(job.id)
    assert ended.status == "failed"
    assert ended.error == JobError(
        "trainer_lost", f"the trainer was lost {MAX_ATTEMPTS} times without reaching another checkpoint"
    )


def test_release_queues_the_job_again_when_it_was_still_running(jobs: JobService, file_id: str) -> None:
    """A server that ends in good order costs a job no attempt, however often."""
    job = _create(jobs, file_id)
    for _ in range(MAX_ATTEMPTS + 2):
        jobs.release(_claim(jobs))
    assert jobs.get(job.id).status == "queued"


def test_pause_and_resume_hold_the_job_when_it_waits_and_when_it_runs(jobs: JobService, file_id: str) -> None:
    """A paused job is claimed by nobody; a resumed one only once its trainer has let it go."""
    job = _create(jobs, file_id)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.claim(lease_s=LEASE_S) is None
    jobs.resume(job.id)
    claim = _claim(jobs)
    jobs.pause(job.id)
    assert jobs.standing(claim) == "pause"
    jobs.add_checkpoint(claim, 2, {"train_loss": 1.0})
    jobs.resume(job.id)
    assert jobs.claim(lease_s=LEASE_S) is None
    assert jobs.standing(claim) == "pause"
    jobs.release(claim)
    assert _claim(jobs).job.id == job.id
    assert [checkpoint.step for checkpoint in jobs.checkpoints(job.id, limit=9)[0]] == [2]


def test_turns_are_refused_when_the_job_is_at_its_end(jobs: JobService, file_id: str) -> None:
    """The message names the status; cancelling twice is cancelling once."""
    job = _create(jobs, file_id)
    running = _claim(jobs)
    with pytest.raises(ConflictError, match="is running; expected paused"):
        jobs.resume(running.job.id)
    cancelled = jobs.cancel(job.id)
    assert jobs.cancel(job.id) == cancelled
    for turn in (jobs.pause, jobs.resume):
        with pytest.raises(ConflictError, match="is cancelled"):
            turn(job.id)
    failing = _create(jobs, file_id)
    jobs.fail(_claim(jobs), JobError("invalid_training_file", "bad", "training_file"))
    with pytest.raises(ConflictError, match="is failed"):
        jobs.cancel(failing.id)
    assert jobs.get(failing.id).error == JobError("invalid_training_file", "bad", "training_file")


def test_list_filters_and_pages_when_jobs_have_metadata(jobs: JobService, file_id: str) -> None:
    """Newest first; all given pairs must be there; odd keys are keys like others."""
    ids = [_create(jobs, file_id, team="a" if n % 2 else "b", **{'q"$.[x]': "1"}).id for n in range(5)]
    found, has_more = jobs.list(limit=2, metadata={"team": "b", 'q"$.[x]': "1"})
    assert ([job.id for job in found], has_more) == ([ids[4], ids[2]], True)
    rest, has_more = jobs.list(limit=2, metadata={"team": "b"}, after=found[-1].id)
    assert ([job.id for job in rest], has_more) == ([ids[0]], False)
    assert jobs.list(limit=2, metadata={"team": "c"}) == ([], False)
    with pytest.raises(InvalidInputError, match="nothing called 'ftjob-x'"):
        jobs.list(limit=2, after="ftjob-x")


def test_events_are_paged_newest_first_and_followed_oldest_first_when_read(jobs: JobService, file_id: str) -> None:
    """The two directions of one list."""
    job = _create(jobs, file_id)
    claim = _claim(jobs)
    for step in (1, 2, 3):
        jobs.note(claim, f"step {step}")
    newest, has_more = jobs.events(job.id, limit=2)
    assert ([event.message for event in newest], has_more) == (["step 3", "step 2"], True)
    older, _ = jobs.events(job.id, limit=1, after=newest[-1].id)
    assert older[0].message == "step 1"
    following, status = jobs.follow(job.id, after=older[0].id, limit=10)
    assert ([event.message for event in following], status) == (["step 2", "step 3"], "running")
    with pytest.raises(NotFoundError):
        jobs.events("ftjob-x", limit=1)


def test_metrics_keep_the_later_value_when_a_step_is_taken_twice(jobs: JobService, clock: Clock, file_id: str) -> None:
    """After a crash steps are repeated; the result file has each once."""
    job = _create(jobs, file_id)
    claim = _claim(jobs)
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)):
        data = {"step": step, "train_loss": loss}
        jobs.note_metrics(claim, f"Step {step}", data, trained_tokens=10 * step, seconds_left=30)
    assert [(row["step"], row["train_loss"]) for row in jobs.metrics(job.id)] == [(1, 9.0), (2, 6.0), (3, 7.0)]
    current = jobs.get(job.id)
    assert (current.trained_tokens, current.estimated_finish) == (20, clock.now + timedelta(seconds=30))
