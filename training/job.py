"""The trainer of one job: `python -m training.job <job id> <claim>`, started by the supervisor, one process a job.

It loads a base model of its own, trains, publishes and ends. What goes wrong is written into the job.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import torch
from sqlalchemy.orm import Session

from adapters.database import open_database
from adapters.errors import ConflictError, DataError, HotswapError, RankTooHighError
from adapters.files import FileService
from adapters.jobs import Claim, JobService
from adapters.manifest import Manifest
from adapters.processes import parent_pid
from adapters.records import Actor, Job, JobError, NumberedVersion
from adapters.registry import Registry
from adapters.settings import CoreSettings, resolve_home
from adapters.store import ArtifactStore
from training.config import TrainSettings
from training.losses import Evaluation
from training.process_log import configure_process_log
from training.progress import NextMove, StepMetrics, TrainedCounts
from training.worker import DataFile, JobFolder, train_and_publish

__all__ = [
    "JobRun",
    "checkpoints_folder",
    "describe_failure",
    "discard_unrecorded",
    "main",
    "newest_checkpoint",
    "resolve_settings",
    "write_csv",
]

_log = structlog.get_logger(__name__)

_NICENESS = 10
_PARENT_CHECK_S = 0.5
_MAX_METRIC_EVENTS = 500
_MAX_RESULT_BYTES = 100_000_000
_CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_HYPERPARAMETERS = {"n_epochs": "epochs"}  # the wire's name -> the setting's; all others are called the same
_NO_SETTINGS = frozenset({"learning_rate_multiplier", "checkpoint_steps"})


class _StoppedError(Exception):
    """The job was cancelled, paused or taken away between two stages."""


class JobRun:
    """One attempt at a job: trains, reports into the job table, publishes.

    Args:
        claim: The attempt; everything is written under it alone.
        core: Base model, home and database.
        jobs: The job table.
        files: Where the data lies and the result goes.
        registry: Where to publish.
        stopping: Set when the supervisor ends: the run writes a checkpoint and stops.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        core: CoreSettings,
        jobs: JobService,
        files: FileService,
        registry: Registry,
        stopping: threading.Event,
    ) -> None:
        self._claim = claim
        self._core = core
        self._jobs = jobs
        self._files = files
        self._registry = registry
        self._stopping = stopping
        self._first: tuple[int, float] | None = None

    def run(self) -> None:
        """Do the job. Its end, good or bad, is in the job table afterwards; a run that was stopped leaves it open."""
        job = self._claim.job
        try:
            settings = resolve_settings(job, self._core.home)
            train_and_publish(
                self._data_file(job.training_file, "training_file"),
                self._data_file(job.validation_file, "validation_file") if job.validation_file else None,
                core=self._core,
                settings=settings,
                listener=self,
                publish=self._publish,
                job=self._folder(job),
            )
        except _StoppedError:
            _log.info("job_stopped", job=job.id)
        except Exception as error:
            # The process boundary: whatever it was, the job says so, and the traceback is in the job's log.
            _log.exception("job_failed", job=job.id)
            self._jobs.fail(self._claim, describe_failure(error))

    def on_stage(self, message: str) -> None:
        """Write an event; between two stages is a moment to stop, too."""
        if self.next_move() != "continue":
            raise _StoppedError
        self._jobs.note(self._claim, message)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Told again, with more, by `on_metrics`."""

    def next_move(self) -> NextMove:
        """What the job table says, or the end of the supervisor."""
        standing = self._jobs.standing(self._claim)
        return "pause" if standing == "continue" and self._stopping.is_set() else standing

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Write a step's event; of a long run every so many steps, so that there are at most about 500."""
        every = -(-metrics.num_steps // _MAX_METRIC_EVENTS)
        if metrics.step % every == 0 or metrics.step in (1, metrics.num_steps):
            self._note_metrics(metrics, None)

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        """Record a checkpoint, and its validation as the step's metrics."""
        if validation is not None:
            self._note_metrics(metrics, validation)
        known = _metrics_of(metrics, validation)
        self._jobs.add_checkpoint(
            self._claim, metrics.step, {k: v for k, v in known.items() if k not in ("step", "total_steps")}
        )

    def _note_metrics(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        message = f"Step {metrics.step}/{metrics.num_steps}: training loss={metrics.loss:.4f}"
        if validation is not None:
            message += f", validation loss={validation.loss:.4f}"
        self._jobs.note_metrics(
            self._claim,
            message,
            _metrics_of(metrics, validation),
            trained_tokens=metrics.num_tokens,
            seconds_left=self._seconds_left(metrics),
        )

    def _seconds_left(self, metrics: StepMetrics) -> float:
        first_step, started = self._first = self._first or (metrics.step, time.monotonic())
        if metrics.step == first_step:
            return 0.0
        return (time.monotonic() - started) / (metrics.step - first_step) * (metrics.num_steps - metrics.step)

    def _publish(self, folder: Path, manifest: Manifest, counts: TrainedCounts) -> tuple[NumberedVersion, bool]:
        """Version, alias, result file and the job's success become visible in one transaction."""
        job = self._claim.job
        content = io.BytesIO(write_csv(self._jobs.metrics(job.id)).encode())
        with self._files.placed_result(content, f"{job.id}_metrics.csv") as result:

            def succeed(session: Session, published: NumberedVersion) -> None:
                self._files.register(session, result)
                self._jobs.succeed(
                    session,
                    self._claim,
                    fine_tuned_model=published.label,
                    result_file=result.id,
                    trained_tokens=counts.num_tokens,
                )

            try:
                return self._registry.publish(folder, manifest, alias=job.alias, also=succeed)
            except ConflictError as error:  # cancelled or paused in the last moment
                raise _StoppedError from error

    def _data_file(self, file_id: str, param: str) -> DataFile:
        return DataFile(self._files.path(file_id), param, param)

    def _folder(self, job: Job) -> JobFolder:
        folder = checkpoints_folder(self._core.home, job.id)
        steps = [checkpoint.step for checkpoint in self._jobs.checkpoints(job.id, limit=2)[0]]
        discard_unrecorded(folder, steps)
        every_steps = _hyperparameters(job).get("checkpoint_steps")
        return JobFolder(folder, self, every_steps, newest_checkpoint(folder, steps))


def checkpoints_folder(home: Path, job_id: str) -> Path:
    """Where a job's checkpoints lie; the id is one that the job table gave."""
    return home / "jobs" / job_id / "checkpoints"


def newest_checkpoint(folder: Path, steps: list[int]) -> Path | None:
    """The folder of the latest recorded step that is still there."""
    found = [folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)]
    return next((path for path in found if path.is_dir()), None)


def discard_unrecorded(folder: Path, steps: list[int]) -> None:
    """Delete what a killed trainer left half written, or did not come to record: it could push out what is needed."""
    recorded = {f"checkpoint-{step}" for step in steps}
    for path in folder.glob("checkpoint-*"):
        if path.name not in recorded:
            shutil.rmtree(path)


def resolve_settings(job: Job, home: Path) -> TrainSettings:
    """What the client asked for, over the server's own settings; "auto" is the server's own."""
    given = {name: value for name, value in _hyperparameters(job).items() if value != "auto"}
    multiplier = given.get("learning_rate_multiplier")
    flags = {_HYPERPARAMETERS.get(name, name): value for name, value in given.items() if name not in _NO_SETTINGS}
    settings = TrainSettings.load(home, **flags, seed=job.seed)
    if multiplier is None:
        return settings
    return TrainSettings.load(
        home, **flags | {"learning_rate": min(1.0, settings.learning_rate * multiplier)}, seed=job.seed
    )


def describe_failure(error: Exception) -> JobError:
    """What a client is told; whatever might hold a path is left to the log."""
    if isinstance(error, DataError):
        return JobError(f"invalid_{error.param}", str(error), error.param)
    if isinstance(error, RankTooHighError):
        return JobError("invalid_hyperparameters", str(error), "method")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = "the device has too little memory for this job: lower batch_size or max_length"
        return JobError("out_of_memory", message, "method")
    kind = "training_failed" if isinstance(error, HotswapError) else "trainer_crashed"
    return JobError(kind, f"the trainer failed with {type(error).__name__}; the job's log on the server says why")


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The metrics of all steps in the columns that tools for the hosted API read; empty where nothing was measured."""
    names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    lines = [",".join(_CSV_COLUMNS)]
    lines += [",".join(_cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Run one job in this process, with a parent that watches it."""
    job_id, token = arguments
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the supervisor says when to stop
    signal.signal(signal.SIGTERM, _setter(stopping))
    threading.Thread(target=_end_with_parent, args=(parent_pid(),), daemon=True).start()
    os.nice(_NICENESS)
    configure_process_log()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    core = CoreSettings.load(resolve_home())
    database = open_database(core.resolved_database_url)
    jobs = JobService(database)
    run = JobRun(
        Claim(jobs.get(job_id), token),
        core=core,
        jobs=jobs,
        files=FileService(database, core.home / "files", max_bytes=_MAX_RESULT_BYTES),
        registry=Registry(database.acting_for(Actor(f"job {job_id}")), ArtifactStore(core.home / "store")),
        stopping=stopping,
    )
    run.run()
    database.close()


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _hyperparameters(job: Job) -> Mapping[str, Any]:
    found: Mapping[str, Any] = job.method[job.method["type"]]["hyperparameters"]
    return {name: value for name, value in found.items() if value is not None}


def _metrics_of(metrics: StepMetrics, validation: Evaluation | None) -> dict[str, float]:
    known = {
        "step": metrics.step,
        "total_steps": metrics.num_steps,
        "train_loss": metrics.loss,
        "train_mean_token_accuracy": metrics.accuracy,
    }
    if validation is not None:
        known |= {"valid_loss": validation.loss, "valid_mean_token_accuracy": validation.accuracy}
    return known


def _setter(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    return handle


def _end_with_parent(parent: int) -> None:
    # Without its supervisor nobody renews the claim, and another trainer will take the job up.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
