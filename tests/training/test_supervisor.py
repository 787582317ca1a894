"""The supervisor with real trainer processes: crashes, kills and stops cost no job and end no supervisor."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DatabaseBusyError, NotFoundError
from adapters.jobs import MAX_ATTEMPTS, Claim, JobOrder, JobService
from adapters.records import Job
from tests.support.conversations import easy_rows, make_dataset, make_messages
from tests.support.disk import small_disk
from tests.support.jobs import HYPERPARAMETERS, JobPlace, supervised
from training.held_out import hold_out
from training.job import checkpoints_folder
from training.scratch import make_scratch
from training.supervisor import Supervisor

_HANGING = "import time\nwhile True: time.sleep(1)"
_DEAF = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
_SUPERVISOR = """
from adapters.database import open_database
from adapters.jobs import JobService
from adapters.settings import CoreSettings, resolve_home
from training.scratch import make_scratch
from training.supervisor import Supervisor

core = CoreSettings.load(resolve_home())
Supervisor(core, JobService(open_database(core.resolved_database_url)), lease_s=2.0, poll_s=0.05).run()
"""


_SERVER = f"""
import subprocess, sys
from adapters.processes import child_environment
import os
process = subprocess.Popen([sys.executable, "-c", {_SUPERVISOR!r}], env=os.environ | child_environment())
print(process.pid, flush=True)
process.wait()
"""


_NOTING = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)"


class _CountingJobs(JobService):
    """Counts the renewals that the database did not take, and those that it took since."""

    num_refused = num_renewed = 0

    def renew(self, claim: Claim, *, lease_s: float) -> bool:
        """As ever."""
        try:
            renewed = super().renew(claim, lease_s=lease_s)
        except DatabaseBusyError:
            self.num_refused, self.num_renewed = self.num_refused + 1, 0
            raise
        self.num_renewed += 1
        return renewed


@pytest.fixture
def hasty_place(tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> JobPlace:
    """A home whose database is waited for no longer than 20 ms, and a supervisor's next try comes soon."""
    monkeypatch.setattr("adapters.database._BUSY_TIMEOUT_MS", 20)
    monkeypatch.setattr("training.supervisor._INSIST_EVERY_S", 0.05)
    return JobPlace.make(tmp_path, tiny_folders["llama"])


@pytest.fixture
def place(tmp_path: Path, tiny_folders: dict[str, Path]) -> JobPlace:
    """An empty home over a tiny Llama."""
    return JobPlace.make(tmp_path, tiny_folders["llama"])


def _supervisor(place: JobPlace, trainer: tuple[str, ...] | None = None, **options: Any) -> Supervisor:
    command: dict[str, Any] = {} if trainer is None else {"trainer": (sys.executable, *trainer)}
    return Supervisor(place.core, place.jobs, poll_s=0.02, **command, **options)


@contextmanager
def _running(supervisor: Supervisor) -> Iterator[None]:
    """Let a supervisor run in a thread for the length of the block."""
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield
    finally:
        supervisor.stopping.set()
        thread.join()


@contextmanager
def _held(place: JobPlace) -> Iterator[None]:
    """Let nobody else write for the length of the block."""
    with place.database.write() as session:
        session.connection()  # which begins the transaction
        yield


@pytest.mark.parametrize(("point", "newest", "steps"), [("checkpoint", 3, ["4", "5", "6"]), ("publish", 6, [])])
def test_job_goes_on_from_its_checkpoint_when_its_trainer_is_killed(
    place: JobPlace, point: str, newest: int, steps: list[str]
) -> None:
    """SIGKILL behind the first checkpoint, and between the publication's files and its transaction."""
    job = place.create(validate=False)
    supervisor = _supervisor(place, ("-m", "tests.support.dying_trainer", point))
    assert supervisor.run_one()
    assert place.jobs.get(job.id).status == "queued"
    with pytest.raises(NotFoundError):
        place.registry().find("legal")
    first = len(place.messages(job.id))
    assert supervisor.run_one()
    done = place.jobs.get(job.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "legal@v1")
    killed = place.messages(job.id)[first - 1]
    assert "The trainer was killed by signal 9" in killed
    assert killed.endswith(f"the job goes on from its checkpoint at step {newest}")
    repeated = [message.split("/")[0][5:] for message in place.messages(job.id)[first:] if message.startswith("Step ")]
    assert steps == repeated
    assert done.result_file is not None
    assert len(place.files.path(done.result_file).read_text().splitlines()) == 7
    assert not checkpoints_folder(place.core.home, job.id).exists()
    assert not supervisor.run_one()


def test_jobs_make_the_same_version_when_their_trainers_are_killed_at_random(place: JobPlace) -> None:
    """Up to twice each, at any step of their work; more jobs with JOB_KILL_SEEDS. Nothing is left half-published."""
    seeds = range(int(os.environ.get("JOB_KILL_SEEDS", "2")))
    for name in ("whole", *(f"killed-{seed}" for seed in seeds)):
        place.create(alias=name, n_epochs=1, checkpoint_steps=1, dropout=0.1)
    command = [sys.executable, "-m", "tests.support.killed_jobs", "2", *map(str, seeds)]
    result = subprocess.run(
        command, env=os.environ | place.core.environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed at step") >= len(seeds)
    registry = place.registry()
    expected = registry.find("whole").version.digest
    for seed in seeds:
        assert registry.find(f"killed-{seed}").version.digest == expected, result.stdout
        assert [version.label for version in registry.versions(f"killed-{seed}")] == [f"killed-{seed}@v1"]
    results, _ = place.files.list(limit=100, purpose="fine-tune-results")
    assert len(results) == 1 + len(seeds)
    assert len({place.files.path(found.id).read_bytes() for found in results}) == 1
    registry.store.sweep()
    place.files.sweep()
    assert not [path for path in (place.core.home / "store" / ".incoming").iterdir() if path.is_dir()]
    kept = {path.name for path in place.files.root.iterdir() if path.is_file()}
    assert kept == {found.id for found in place.files.list(limit=100)[0]}


def test_job_is_finished_by_another_supervisor_when_the_first_is_killed(place: JobPlace) -> None:
    """SIGKILL of the supervisor in the middle of a run: its trainer ends too, and nothing runs twice."""
    job = place.create(validate=False, n_epochs=40, checkpoint_steps=20)
    process = subprocess.Popen([sys.executable, "-c", _SUPERVISOR], env=place.core.environment)
    place.wait(lambda: bool(place.jobs.checkpoints(job.id, limit=1)[0]))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert place.jobs.get(job.id).status == "running"
    with _running(_supervisor(place, lease_s=2.0)):
        place.wait(lambda: place.jobs.get(job.id).status != "running")
    assert place.jobs.get(job.id).status == "succeeded"
    assert place.messages(job.id).count("The job is running") == 2
    assert len(place.registry().versions("legal")) == 1


def test_job_fails_in_words_when_the_disk_is_full(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """On a real file system of 1.5 MB that a checkpoint does not fit on, with the database and the log beside it."""
    with small_disk(tmp_path / "disk", kilobytes=1500) as disk:
        place = JobPlace.make(disk, tiny_folders["llama"])
        job = place.create(rank=16, checkpoint_steps=1, validate=False)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 350_000))
        assert _supervisor(place).run_one()
        error = place.jobs.get(job.id).error
        assert error is not None
        assert error.code == "disk_full"
        assert not checkpoints_folder(place.core.home, job.id).exists()
        place.database.close()


def test_validation_fails_the_job_beside_a_running_one_when_a_row_is_too_long(place: JobPlace) -> None:
    """Only the tokenizer tells; the field and the line are named, and the job behind it is queued."""
    running = place.create()
    with _running(_supervisor(place, ("-c", _HANGING), grace_s=0.1)):
        place.wait(lambda: place.jobs.get(running.id).status == "running")
        bad = place.jobs.create(
            JobOrder("tiny", place.upload([make_messages("x" * 100, "yes")]), supervised(), 0, alias="legal")
        )
        good = place.jobs.create(JobOrder("tiny", place.upload(easy_rows(3)), supervised(), 0, alias="legal"))
        place.wait(lambda: place.jobs.get(good.id).status != "validating_files")
        assert place.jobs.get(running.id).status == "running"
    assert place.jobs.get(good.id).status == "queued"
    error = place.jobs.get(bad.id).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert error.message.startswith("rows.jsonl:1: ")


def test_job_fails_when_its_settings_do_not_fit_together(place: JobPlace) -> None:
    """Found by the validation too: a job that can't be trained does not wait for its turn."""
    method = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS | {"rank": 256}}}
    job = place.jobs.create(JobOrder("tiny", place.upload(easy_rows(3)), method, 0, alias="legal"))
    assert _supervisor(place).validate_one()
    error = place.jobs.get(job.id).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_hyperparameters", "method")


def _warnings(place: JobPlace, job_id: str) -> list[str]:
    return [event.message for event in place.jobs.events(job_id, limit=99, level="warn")[0]]


def _validated(place: JobPlace, rows: list[Any], kind: str = "supervised", **hyperparameters: Any) -> Job:
    """A job over these rows, without a validation file, behind the validation of its files."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file_id = place.files.upload(io.BytesIO(lines.encode()), "rows.jsonl").id
    method = {"type": kind, kind: {"hyperparameters": HYPERPARAMETERS | hyperparameters}}
    job = place.jobs.create(JobOrder("tiny", file_id, method, 0, alias="legal", row_kinds=("chat", "labelled")))
    assert _supervisor(place).validate_one()
    return place.jobs.get(job.id)


def test_validation_warns_that_nothing_can_be_compared_when_a_job_has_no_validation_rows(place: JobPlace) -> None:
    """Before the job is queued, not when it is trained; it is queued none the less."""
    job = _validated(place, [{"messages": row} for row in easy_rows(10)])
    assert job.status == "queued"
    assert any("no validation rows: the gate can't compare" in warning for warning in _warnings(place, job.id))


def test_validation_looks_at_divided_rows_when_a_share_is_held_out(place: JobPlace) -> None:
    """Rows that nearly equal one another and fall on both sides are told before the job is queued."""
    answers = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = [{"messages": make_messages("say", f"{answers} {number}")} for number in range(12)]
    job = _validated(place, rows, validation_share=0.5, max_length=512)
    warnings = _warnings(place, job.id)
    assert job.status == "queued", job.error
    assert any("(held out): rows that nearly equal one of " in warning for warning in warnings)
    assert not any("no validation rows" in warning for warning in warnings)


def test_validation_warns_once_when_a_share_holds_out_too_few_rows(place: JobPlace) -> None:
    """The gate would say it at the end; the trainer does not say it again."""
    job = _validated(place, [{"messages": row} for row in easy_rows(10)], validation_share=0.3)
    assert _supervisor(place).run_one()
    assert place.jobs.get(job.id).status == "succeeded"
    few = [warning for warning in _warnings(place, job.id) if "the gate compares with 8 or more" in warning]
    assert 1 == len(few)
    assert few[0].startswith("validation_share 0.3 holds out ")


def test_validation_fails_the_job_when_its_share_leaves_nothing_to_learn(place: JobPlace, tmp_path: Path) -> None:
    """Within seconds, and not when its turn comes."""
    one = next([row] for row in easy_rows(50) if hold_out(make_dataset(tmp_path / "one.jsonl", [row]), 0.5)[1].rows)
    error = _validated(place, [{"messages": row} for row in one], validation_share=0.5).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "validation_share 0.5 holds out 1 of 1 rows, none is left to train on" in error.message


def test_validation_fails_the_job_when_its_schema_is_none(place: JobPlace) -> None:
    """What the request's check lets pass is found before the job is queued."""
    job = _validated(place, [{"messages": row} for row in easy_rows(3)], gate_format_schema={"type": "thing"})
    assert job.error is not None
    assert job.error.code == "invalid_hyperparameters"
    assert "gate_format_schema: is no JSON schema" in job.error.message


def test_job_waits_with_its_checkpoint_when_the_server_is_killed(place: JobPlace) -> None:
    """SIGKILL of what started the supervisor: that ends in good order by itself, with its trainer."""
    job = place.create(validate=False, n_epochs=200, checkpoint_steps=20)
    environment = os.environ | place.core.environment
    server = subprocess.Popen([sys.executable, "-c", _SERVER], env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    supervisor_pid = int(server.stdout.readline())
    place.wait(lambda: bool(place.jobs.checkpoints(job.id, limit=1)[0]))
    server.send_signal(signal.SIGKILL)
    server.wait()
    place.wait(lambda: place.jobs.get(job.id).status == "queued")
    place.wait(lambda: not Path(f"/proc/{supervisor_pid}").exists())
    steps = [checkpoint.step for checkpoint in place.jobs.checkpoints(job.id, limit=100)[0]]
    assert place.messages(job.id)[-1] == f"Checkpoint at step {steps[0]}"
    assert (checkpoints_folder(place.core.home, job.id) / f"checkpoint-{steps[0]}").is_dir()
    server.stdout.close()


def test_job_fails_when_its_trainer_crashes(place: JobPlace) -> None:
    """The exit code is told; the supervisor goes on with the next job."""
    first, second = place.create(), place.create()
    supervisor = _supervisor(place, ("-c", "import sys; print('reason'); sys.exit(3)"))
    assert supervisor.run_one()
    assert supervisor.run_one()
    for job in (first, second):
        failed = place.jobs.get(job.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert (failed.error.code, "exit code 3" in failed.error.message) == ("trainer_crashed", True)
    assert (place.core.home / "jobs" / first.id / "log.txt").read_text() == "reason\n"


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, "disk_full", "the server's disk is full: free some space and create the job again"),
        (errno.ENOMEM, "out_of_memory", "has no memory for another process"),
        (errno.EAGAIN, "out_of_memory", "or too many processes"),
    ],
)
def test_job_fails_in_words_when_its_process_can_not_be_started(
    place: JobPlace, monkeypatch: pytest.MonkeyPatch, number: int, code: str, words: str
) -> None:
    """What the system refuses may pass: the job has its attempts, and then the reason; the next is taken."""
    monkeypatch.setattr("training.supervisor._INSIST_EVERY_S", 0.01)
    first, second = place.create(), place.create()
    refusals = iter([OSError(number, os.strerror(number), "/home/of/the/server")] * 3)

    def refuse_thrice(folder: Path) -> Path:
        for error in refusals:
            raise error
        return make_scratch(folder)

    monkeypatch.setattr("training.supervisor.make_scratch", refuse_thrice)
    supervisor = _supervisor(place, ("-c", "import sys; sys.exit(3)"))
    for _ in range(2):
        assert supervisor.run_one()
        assert ("queued", "queued") == (place.jobs.get(first.id).status, place.jobs.get(second.id).status)
        assert words in place.messages(first.id)[-1]
    assert supervisor.run_one()
    error = place.jobs.get(first.id).error
    assert error is not None
    assert error.code == code
    assert error.message.startswith("the trainer could not be started: ")
    assert words in error.message
    assert "/home/of" not in error.message
    assert supervisor.run_one()
    assert place.jobs.get(second.id).status == "failed"
    assert "exit code 3" in place.messages(second.id)[-1]


def test_running_job_is_left_alone_when_a_new_one_can_not_be_started(place: JobPlace) -> None:
    """A file lies where the new job's folder should be: that job fails, the other lane goes on, and so does its own."""
    running = place.create()
    blocked, good = (
        place.jobs.create(JobOrder("tiny", place.upload(easy_rows(3)), supervised(), 0, alias="legal"))
        for _ in range(2)
    )
    (place.core.home / "jobs").mkdir(exist_ok=True)
    (place.core.home / "jobs" / blocked.id).write_text("no folder")
    supervisor = _supervisor(place, ("-c", _HANGING), grace_s=0.1)
    with _running(supervisor):
        place.wait(lambda: place.jobs.get(blocked.id).status == "failed")
        place.wait(lambda: place.jobs.get(good.id).status == "queued")
        place.wait(lambda: place.jobs.get(running.id).status == "running")
        assert not supervisor.stopping.is_set()
    error = place.jobs.get(blocked.id).error
    assert error is not None
    assert error.code == "trainer_crashed"
    assert error.message == (
        "the process that validates the files could not be started: File exists; the server's log says where"
    )
    assert 1 == place.messages(running.id).count("The job is running")


def test_job_fails_when_every_trainer_is_killed(place: JobPlace) -> None:
    """A job that takes all memory each time doesn't go round for ever."""
    job = place.create()
    supervisor = _supervisor(place, ("-c", "import os; os.kill(os.getpid(), 9)"))
    for _ in range(MAX_ATTEMPTS):
        assert supervisor.run_one()
    assert not supervisor.run_one()
    error = place.jobs.get(job.id).error
    assert error is not None
    assert error.code == "trainer_lost"
    assert error.message.startswith(
        "the trainer was killed by signal 9, as the kernel does when memory runs out, 3 times"
    )
    assert "lower batch_size or max_length" in error.message
    lost = [event.message for event in place.jobs.events(job.id, limit=9, level="warn")[0]]
    assert len(lost) == MAX_ATTEMPTS
    assert "killed by signal 9, " in lost[0]
    assert "memory r" in lost[0]


def test_job_fails_for_memory_when_the_kernel_counts_its_trainer_among_those_it_killed(
    place: JobPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of a container comes before the machine's; the job's own error says what to change."""
    counts = tmp_path / "memory.events"
    counts.write_text("oom 0\noom_kill 0\n")
    monkeypatch.setattr("training.supervisor._OUT_OF_MEMORY_COUNTS", (tmp_path / "none", counts, Path("/proc/vmstat")))
    job = place.create()
    dying = (
        "import os, pathlib, sys; path = pathlib.Path(sys.argv[1]); lines = path.read_text().split(); "
        "path.write_text(f'oom 0\\noom_kill {int(lines[-1]) + 1}\\n'); os.kill(os.getpid(), 9)"
    )
    supervisor = _supervisor(place, ("-c", dying, str(counts)))
    for _ in range(MAX_ATTEMPTS):
        assert supervisor.run_one()
    error = place.jobs.get(job.id).error
    assert error is not None
    assert error.code == "out_of_memory"
    assert error.message.startswith("the trainer was killed by signal 9, by the kernel, since memory ran out, 3 times")
    assert "lower batch_size or max_length, or set gradient_checkpointing" in error.message
    assert place.messages(job.id)[-1] == f"The job failed: {error.message}"


def test_scratch_of_a_trainer_is_in_the_home_and_gone_when_it_has_ended(place: JobPlace, tmp_path: Path) -> None:
    """What libraries would put into the system's temporary folder goes there, too; also if the trainer is killed."""
    job = place.create()
    leaving = (
        "import os, pathlib, sys, tempfile; folder = tempfile.mkdtemp(); pathlib.Path(sys.argv[1]).write_text(folder); "
        "os.kill(os.getpid(), 9)"
    )
    assert _supervisor(place, ("-c", leaving, str(tmp_path / "told"))).run_one()
    folder = Path((tmp_path / "told").read_text())
    assert folder.parent == place.core.home / "jobs" / job.id / "scratch"
    assert sorted(path.name for path in (place.core.home / "jobs" / job.id).iterdir()) == ["log.txt"]


def test_trainer_is_killed_when_its_job_is_cancelled_and_it_does_not_end(place: JobPlace) -> None:
    """A trainer that is stuck holds up the jobs behind it for the grace alone."""
    job = place.create()
    supervisor = _supervisor(place, ("-c", _HANGING), grace_s=0.1)
    with _running(supervisor):
        place.wait(lambda: place.jobs.get(job.id).status == "running")
        place.jobs.cancel(job.id)
        other = place.create()
        place.wait(lambda: place.jobs.get(other.id).status == "running")
    assert place.jobs.get(job.id).status == "cancelled"


def test_job_waits_again_when_the_supervisor_stops_and_the_trainer_is_deaf(place: JobPlace) -> None:
    """A stop takes the grace at most, and costs the job no attempt."""
    job = place.create()
    for _ in range(MAX_ATTEMPTS + 1):
        with _running(_supervisor(place, ("-c", _DEAF), grace_s=0.1)):
            place.wait(lambda: place.jobs.get(job.id).status == "running")
        assert place.jobs.get(job.id).status == "queued"


def test_sweep_deletes_checkpoints_when_their_job_is_at_its_end(place: JobPlace) -> None:
    """Those of a paused job stay."""
    kept, cancelled = place.create(), place.create()
    place.jobs.pause(kept.id)
    place.jobs.cancel(cancelled.id)
    folders = [checkpoints_folder(place.core.home, job_id) for job_id in (kept.id, cancelled.id, "ftjob-unknown")]
    for folder in folders:
        folder.mkdir(parents=True)
    with _running(_supervisor(place)):
        place.wait(lambda: not folders[2].exists() and not folders[1].exists())
    assert folders[0].exists()


def test_checkpoints_are_swept_when_their_job_is_cancelled_while_it_is_paused(place: JobPlace) -> None:
    """No process works on it whose end would be the moment to delete them; a supervisor that runs does it later."""
    job = place.create()
    place.jobs.pause(job.id)
    folder = checkpoints_folder(place.core.home, job.id)
    unknown = checkpoints_folder(place.core.home, "ftjob-unknown")
    for path in (folder, unknown):
        path.mkdir(parents=True)
    with _running(_supervisor(place, sweep_every_s=0.1)):
        place.wait(lambda: not unknown.exists())
        assert folder.exists()
        place.jobs.cancel(job.id)
        place.wait(lambda: not folder.exists())
    assert folder.parent.exists()


def test_importing_the_supervisor_is_cheap_when_the_server_starts_it() -> None:
    """It holds no model: neither torch nor the training libraries are imported."""
    code = (
        "import sys; import training.supervisor; heavy = {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (0, "") == (result.returncode, result.stderr)


def test_no_job_is_taken_and_none_lost_when_the_database_is_held(hasty_place: JobPlace) -> None:
    """The supervisor lives on and takes the job once the database is free."""
    job = hasty_place.create()
    supervisor = _supervisor(hasty_place, ("-c", "pass"))
    with _held(hasty_place):
        assert not supervisor.run_one()
    assert supervisor.run_one()
    assert "queued" == hasty_place.jobs.get(job.id).status


def test_trainer_runs_on_when_the_claim_can_not_be_renewed_for_a_while(hasty_place: JobPlace) -> None:
    """A database that others hold for less than the lease costs the job nothing."""
    job = hasty_place.create()
    jobs = _CountingJobs(hasty_place.database)
    supervisor = Supervisor(
        hasty_place.core, jobs, trainer=(sys.executable, "-c", _HANGING), lease_s=5.0, poll_s=0.02, grace_s=0.1
    )
    with _running(supervisor):
        hasty_place.wait(lambda: jobs.num_renewed > 0)
        with _held(hasty_place):
            hasty_place.wait(lambda: jobs.num_refused > 1)
        hasty_place.wait(lambda: jobs.num_renewed > 0)
        assert not supervisor.stopping.is_set()
        assert "running" == hasty_place.jobs.get(job.id).status
    assert 1 == hasty_place.messages(job.id).count("The job is running")


def test_trainer_is_killed_and_no_attempt_counted_when_its_lease_has_run_out(
    hasty_place: JobPlace, tmp_path: Path
) -> None:
    """Another supervisor may have the job by then; the job itself has done nothing wrong."""
    job = hasty_place.create()
    noted = tmp_path / "pid"
    with _running(_supervisor(hasty_place, ("-c", _NOTING, str(noted)), lease_s=1.0, grace_s=0.1)):
        hasty_place.wait(lambda: noted.exists() and bool(noted.read_text()))
        trainer = Path(f"/proc/{noted.read_text()}")
        with _held(hasty_place):
            hasty_place.wait(lambda: not trainer.exists())
        hasty_place.wait(lambda: hasty_place.messages(job.id).count("The job is running") > 1)
    assert [] == hasty_place.jobs.events(job.id, limit=9, level="warn")[0]


def test_lost_trainer_counts_as_no_attempt_when_the_parent_is_gone(place: JobPlace) -> None:
    """Whatever ends the server may end trainers with it; the supervisor then stops by itself."""
    job = place.create()
    supervisor = _supervisor(place, ("-c", "import os; os.kill(os.getpid(), 9)"))
    supervisor._parent = -1
    assert supervisor.run_one()
    assert supervisor.stopping.is_set()
    assert [] == place.jobs.events(job.id, limit=9, level="warn")[0]
