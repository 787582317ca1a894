"""The job table: who may run a job, what clients may turn it into, and what a lost trainer leaves."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from adapters.audit import AuditLog
from adapters.database import Database
from adapters.errors import ConflictError, InvalidInputError, InvalidNameError, NotFoundError, OverloadedError
from adapters.files import FileService
from adapters.jobs import MAX_ATTEMPTS, Claim, JobOrder, JobService, RequestIdentity
from adapters.records import Actor, Job, JobError
from adapters.registry import Registry
from adapters.tables import utc_now
from tests.support.conversations import easy_rows, write_rows
from tests.support.jobs import pass_all
from tests.support.versions import publish_text

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


def _order(file_id: str, **metadata: str) -> JobOrder:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    return JobOrder("tiny", file_id, method, 7, alias="legal", metadata=metadata)


def _create(jobs: JobService, file_id: str, **metadata: str) -> Job:
    job = jobs.create(_order(file_id, **metadata))
    pass_all(jobs)
    return jobs.get(job.id)


def _claim(jobs: JobService) -> Claim:
    claim = jobs.claim(lease_s=LEASE_S)
    assert claim is not None
    return claim


def _messages(jobs: JobService, job: Job) -> list[str]:
    return [event.message for event in jobs.follow(job.id, after=None, limit=100)[0]]


def test_create_keeps_the_order_when_files_exist(jobs: JobService, file_id: str) -> None:
    """A job is queued with what was asked for once its files are found valid, and events say so."""
    job = jobs.create(_order(file_id, team="a"))
    assert (job.status, job.alias, job.seed, job.metadata) == ("validating_files", "legal", 7, {"team": "a"})
    assert jobs.get(job.id) == job
    assert _messages(jobs, job) == [f"Created fine-tuning job: {job.id}"]
    pass_all(jobs)
    assert jobs.get(job.id) == replace(job, status="queued", queue_position=1)
    assert _messages(jobs, job)[1:] == ["Validating the files", "The files are valid; the job is queued"]


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
    """The queue is bounded; a job that runs or is paused doesn't count, but can't be resumed into a full one."""
    for _ in range(4):
        _create(jobs, file_id)
    newest = jobs.create(_order(file_id))
    with pytest.raises(OverloadedError, match="5 jobs are waiting"):
        _create(jobs, file_id)
    _claim(jobs)
    assert _create(jobs, file_id).status == "queued"
    jobs.pause(newest.id)
    assert _create(jobs, file_id).status == "queued"
    with pytest.raises(OverloadedError, match="5 jobs are waiting"):
        jobs.resume(newest.id)
    assert jobs.get(newest.id).status == "paused"


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
    with pytest.raises(ConflictError, match="is running; only a paused job can be resumed"):
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


def _begin(jobs: JobService, file_id: str) -> Job:
    return jobs.create(_order(file_id))


def _begin_validation(jobs: JobService, file_id: str) -> Job:
    job = jobs.create(_order(file_id))
    assert jobs.claim_validation(lease_s=LEASE_S) is not None
    return job


def _run(jobs: JobService, file_id: str) -> Job:
    _create(jobs, file_id)
    return _claim(jobs).job


def _pause_new(jobs: JobService, file_id: str) -> Job:
    return jobs.pause(jobs.create(_order(file_id)).id)


def _pause_queued(jobs: JobService, file_id: str) -> Job:
    return jobs.pause(_create(jobs, file_id).id)


def _pause_running(jobs: JobService, file_id: str) -> Job:
    return jobs.pause(_run(jobs, file_id).id)


def _succeed(jobs: JobService, file_id: str) -> Job:
    _create(jobs, file_id)
    claim = _claim(jobs)
    with jobs.database.write() as session:
        jobs.succeed(session, claim, fine_tuned_model="legal@v1", result_file="file-r", trained_tokens=1)
    return jobs.release(claim)


def _fail(jobs: JobService, file_id: str) -> Job:
    _create(jobs, file_id)
    claim = _claim(jobs)
    jobs.fail(claim, JobError("trainer_crashed", "bad"))
    return jobs.release(claim)


def _cancel(jobs: JobService, file_id: str) -> Job:
    return jobs.cancel(_create(jobs, file_id).id)


@pytest.mark.parametrize(
    ("reach", "after_pause", "after_resume", "after_cancel"),
    [
        (_begin, "paused", "validating_files", "cancelled"),
        (_begin_validation, "paused", "validating_files", "cancelled"),
        (_create, "paused", "queued", "cancelled"),
        (_run, "paused", None, "cancelled"),
        (_pause_new, "paused", "validating_files", "cancelled"),
        (_pause_queued, "paused", "queued", "cancelled"),
        (_pause_running, "paused", "queued", "cancelled"),
        (_succeed, None, None, None),
        (_fail, None, None, None),
        (_cancel, None, None, "cancelled"),
    ],
)
def test_turns_lead_where_the_table_says_when_made_in_every_state(
    jobs: JobService,
    file_id: str,
    reach: Callable[[JobService, str], Job],
    after_pause: str | None,
    after_resume: str | None,
    after_cancel: str | None,
) -> None:
    """None is a refusal, which changes nothing; a turn made twice is made once."""
    for turn, expected in ((jobs.pause, after_pause), (jobs.resume, after_resume), (jobs.cancel, after_cancel)):
        job = jobs.get(reach(jobs, file_id).id)
        if expected is None:
            why = "; only a paused job can be" if job.status == "running" else " and stays so; it can't be"
            with pytest.raises(ConflictError, match=f"is {job.status}{why} {turn.__name__}"):
                turn(job.id)
            assert jobs.get(job.id) == job
        else:
            assert turn(job.id).status == expected
            assert jobs.get(job.id) == turn(job.id)


def test_turns_stand_in_the_audit_log_when_made(jobs: JobService, file_id: str) -> None:
    """Who paused a job, resumed it and ended it; what changes nothing is no act."""
    job = jobs.create(_order(file_id))
    mine = jobs.acting_for(Actor("key-1"))
    for turn in (mine.pause, mine.pause, mine.resume, mine.resume, mine.cancel, mine.cancel):
        turn(job.id)
    acts = [(entry.action, entry.actor, entry.subject) for entry in AuditLog(jobs.database).list(limit=10)]
    assert acts == [
        ("cancel_job", "key-1", job.id),
        ("resume_job", "key-1", job.id),
        ("pause_job", "key-1", job.id),
        ("create_job", "command line", job.id),
    ]


def test_validation_goes_on_when_another_job_is_being_trained(jobs: JobService, file_id: str) -> None:
    """Bad data is known hours before its turn; a job is not trained before its files are found valid."""
    running = _run(jobs, file_id)
    good, bad = jobs.create(_order(file_id)), jobs.create(_order(file_id))
    assert jobs.claim(lease_s=LEASE_S) is None
    claim = jobs.claim_validation(lease_s=LEASE_S)
    assert claim is not None
    assert (claim.job.id, jobs.standing(claim)) == (good.id, "continue")
    jobs.pass_validation(claim)
    jobs.release(claim)
    claim = jobs.claim_validation(lease_s=LEASE_S)
    assert claim is not None
    jobs.note(claim, "3 rows appear twice", level="warn")
    jobs.fail(claim, JobError("invalid_training_file", "line 2: bad", "training_file"))
    jobs.release(claim)
    assert [jobs.get(job.id).status for job in (running, good, bad)] == ["running", "queued", "failed"]
    warnings, _ = jobs.events(bad.id, limit=10, level="warn")
    assert [event.message for event in warnings] == ["3 rows appear twice"]
    assert jobs.claim_validation(lease_s=LEASE_S) is None


def test_validation_is_remembered_when_the_job_is_paused_or_cancelled_meanwhile(jobs: JobService, file_id: str) -> None:
    """A paused job stays so, and goes on behind the validation; a cancelled one stays cancelled."""
    for turn, then in ((jobs.pause, "paused"), (jobs.cancel, "cancelled")):
        job = jobs.create(_order(file_id))
        claim = jobs.claim_validation(lease_s=LEASE_S)
        assert claim is not None
        turn(job.id)
        assert jobs.standing(claim) == ("pause" if then == "paused" else "stop")
        jobs.pass_validation(claim)
        assert jobs.release(claim).status == then
        if then == "paused":
            assert jobs.resume(job.id).status == "queued"


def test_job_fails_when_the_validation_of_its_files_is_lost_too_often(
    jobs: JobService, clock: Clock, file_id: str
) -> None:
    """Data that ends every process which reads it doesn't go round for ever."""
    job = jobs.create(_order(file_id))
    for _ in range(MAX_ATTEMPTS):
        assert jobs.claim_validation(lease_s=LEASE_S) is not None
        clock.advance(LEASE_S + 1)
    assert jobs.claim_validation(lease_s=LEASE_S) is None
    error = jobs.get(job.id).error
    assert error is not None
    assert "the process that validates the files was lost 3 times" in error.message


def test_claim_takes_the_most_urgent_job_when_priorities_differ(jobs: JobService, file_id: str) -> None:
    """By priority, then by age; each job that waits knows its place."""
    ids = [jobs.create(replace(_order(file_id), priority=priority)).id for priority in (0, -5, 7, 0)]
    assert [jobs.get(job_id).queue_position for job_id in ids] == [None] * 4
    pass_all(jobs)
    assert [jobs.get(job_id).queue_position for job_id in ids] == [2, 4, 1, 3]
    assert [job.queue_position for job in jobs.list(limit=9)[0]] == [3, 1, 4, 2]
    assert [_claim(jobs).job.id for _ in ids] == [ids[2], ids[0], ids[3], ids[1]]
    assert jobs.get(ids[2]).queue_position is None


def test_claim_takes_nothing_when_another_job_runs_on_the_device(jobs: JobService, clock: Clock, file_id: str) -> None:
    """One job a device, whoever supervises; a lost trainer frees it with its lease."""
    first, second = _create(jobs, file_id), _create(jobs, file_id)
    assert jobs.claim(lease_s=LEASE_S, device="here/cpu") is not None
    assert jobs.claim(lease_s=LEASE_S, device="here/cpu") is None
    there = jobs.claim(lease_s=LEASE_S, device="there/cpu")
    assert there is not None
    assert there.job.id == second.id
    clock.advance(LEASE_S + 1)
    again = jobs.claim(lease_s=LEASE_S, device="here/cpu")
    assert again is not None
    assert again.job.id == first.id


def test_create_gives_the_same_job_when_the_request_is_repeated(jobs: JobService, file_id: str) -> None:
    """Also when the queue is full by then; the same key with another request is refused, another client has its own."""
    order = replace(_order(file_id), identity=RequestIdentity("retry-1", "a" * 64))
    made = jobs.create(order)
    pass_all(jobs)
    for _ in range(4):
        jobs.create(_order(file_id))
    assert jobs.create(order) == jobs.get(made.id)
    with pytest.raises(ConflictError, match=f"'retry-1' was sent with another request, which made job {made.id}"):
        jobs.create(replace(order, identity=RequestIdentity("retry-1", "b" * 64)))
    jobs.cancel(made.id)
    assert jobs.acting_for(Actor("key-2")).create(order).id != made.id
    assert len(jobs.list(limit=10)[0]) == 6


def test_create_is_refused_when_the_rows_are_of_another_kind(jobs: JobService, file_id: str) -> None:
    """What a method can't be trained on is known before anything waits."""
    order = replace(_order(file_id), row_kinds=("preference",))
    with pytest.raises(InvalidInputError, match=r"trained on preference rows, file-.* holds chat") as caught:
        jobs.create(order)
    assert caught.value.param == "training_file"
    with pytest.raises(InvalidInputError) as caught:
        jobs.create(replace(_order(file_id), row_kinds=("text",), validation_file=file_id))
    assert caught.value.param == "training_file"
    assert jobs.create(replace(order, row_kinds=("chat", "text"))).status == "validating_files"


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


def test_reward_is_bound_and_kept_when_a_job_needs_it(registry: Registry, jobs: JobService, file_id: str) -> None:
    """By its digest: the alias may move on; the version can't be deleted before the job is at its end."""
    judge = publish_text(registry, "one", alias="tone", kind="reward")
    method = {"type": "grpo", "grpo": {"hyperparameters": {"reward": "tone", "beta": 0.1}}}
    job = jobs.create(JobOrder("tiny", file_id, method, 7, alias="legal", reward="tone"))
    bound = {"reward": f"tone@{judge.version.digest}", "beta": 0.1}
    assert {"type": "grpo", "grpo": {"hyperparameters": bound}} == job.method
    publish_text(registry, "two", alias="tone", kind="reward")
    for name in ("tone@v1", "tone"):
        with pytest.raises(ConflictError, match=f"job {job.id}, which is validating_files, is judged by tone@v1"):
            registry.remove(name)
    jobs.cancel(job.id)
    assert ["tone@v1"] == registry.remove("tone@v1")


def test_version_is_refused_when_it_is_of_the_wrong_kind(registry: Registry, jobs: JobService, file_id: str) -> None:
    """At once, not when the job's turn comes; a reward model may be trained further as such."""
    publish_text(registry, "one", alias="tone", kind="reward")
    publish_text(registry, "two", alias="chatty")
    by_type: dict[str, dict[str, Any]] = {
        kind: {"type": kind, kind: {"hyperparameters": {}}} for kind in ("grpo", "reward", "supervised")
    }
    order = JobOrder("tiny", file_id, by_type["grpo"], 7, alias="legal")
    with pytest.raises(InvalidInputError, match="expected a version that method reward has made, found chatty@v1") as e:
        jobs.create(replace(order, reward="chatty"))
    assert "method" == e.value.param
    with pytest.raises(InvalidInputError, match="tone@v1 is a reward model; only method reward") as e:
        jobs.create(replace(order, method=by_type["supervised"], start_from="tone"))
    assert "model" == e.value.param
    assert "tone@v1" == jobs.create(replace(order, method=by_type["reward"], start_from="tone")).model
