"""The trainer of one job: `python -m training.job <job id> <claim>`, started by the supervisor, one process a job.

It loads a base model of its own, trains, publishes and ends. What goes wrong is written into the job.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from adapters.checkpoint_adapters import CheckpointAdapters
from adapters.errors import AdapterRejectedError, ConflictError
from adapters.manifest import Manifest
from adapters.records import Actor, Job, NumberedVersion
from adapters.registry import Registry
from adapters.store import ArtifactStore
from training.job_process import JobProcess, StoppedError, job_process
from training.job_settings import (
    describe_failure,
    hyperparameters_of,
    name_data,
    read_options,
    resolve_settings,
    tracker_environment,
)
from training.losses import Evaluation
from training.progress import NextMove, StepMetrics, TrainedCounts
from training.publication import AdapterSaver, MoveRule
from training.run_data import DataFile
from training.scratch import scratch_folder
from training.worker import JobFolder, train_and_publish

__all__ = [
    "JobRun",
    "checkpoints_folder",
    "discard_unrecorded",
    "main",
    "newest_checkpoint",
    "write_csv",
]

_log = structlog.get_logger(__name__)

_MAX_METRIC_EVENTS = 500
_CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class JobRun:
    """One attempt at a job: trains, reports into the job table, publishes.

    Args:
        process: The attempt; everything is written under its claim alone.
        registry: Where to publish.
    """

    def __init__(self, process: JobProcess, registry: Registry) -> None:
        self._claim = process.claim
        self._core = process.core
        self._jobs = process.jobs
        self._files = process.files
        self._registry = registry
        self._stopping = process.stopping
        self._checkpoints = CheckpointAdapters(process.database, registry.store)
        self._first: tuple[int, float] | None = None

    def run(self) -> None:
        """Do the job. Its end, good or bad, is in the job table afterwards; a run that was stopped leaves it open."""
        job = self._claim.job
        try:
            settings = resolve_settings(job, self._core.home)
            os.environ.update(tracker_environment(job))
            train_and_publish(
                job.alias,
                self._data_file(job.training_file, "training_file"),
                self._data_file(job.validation_file, "validation_file") if job.validation_file else None,
                core=self._core,
                settings=settings,
                listener=self,
                publish=self._publish,
                folder=checkpoints_folder(self._core.home, job.id).parent,
                open_versions=lambda: nullcontext(self._registry),
                job=self._folder(job),
            )
        except StoppedError:
            _log.info("job_stopped", job=job.id)
        except Exception as error:
            # The process boundary: whatever it was, the job says so, and the traceback is in the job's log. Both need
            # room on the disk, which a job that fails has: its checkpoints are of no more use.
            if self._jobs.standing(self._claim) == "continue":
                shutil.rmtree(checkpoints_folder(self._core.home, job.id), ignore_errors=True)
            _log.exception("job_failed", job=job.id)
            self._jobs.fail(self._claim, describe_failure(error))

    def on_stage(self, message: str) -> None:
        """Write an event; between two stages is a moment to stop, too."""
        if self.next_move() != "continue":
            raise StoppedError
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

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """Write the step's event again, with what was measured on the validation file."""
        self._note_metrics(metrics, evaluation)

    def on_warning(self, message: str) -> None:
        """Write an event of level warn."""
        self._jobs.note(self._claim, message, level="warn")

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None, save: AdapterSaver) -> None:
        """Record a checkpoint, with its validation if it was validated, and let clients call it."""
        known = {k: v for k, v in _metrics_of(metrics, validation).items() if k not in ("step", "total_steps")}

        def record(digest: str | None) -> None:
            self._jobs.add_checkpoint(self._claim, metrics.step, known, digest=digest)

        with scratch_folder(checkpoints_folder(self._core.home, self._claim.job.id).parent) as folder:
            try:
                manifest = save(folder, {**known, "checkpoint_step": metrics.step})
            except AdapterRejectedError as error:
                # Whether it can be called or not, it can be gone on from.
                _log.info("checkpoint_can_not_be_called", step=metrics.step, reason=str(error))
                record(None)
                return
            if manifest.kind == "reward":  # it judges answers and gives none
                record(None)
                return
            self._checkpoints.add(folder, manifest, record)
        self._checkpoints.prune(self._claim.job.id)

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

    def _publish(
        self, folder: Path, manifest: Manifest, counts: TrainedCounts, may_move: MoveRule, prompts: Sequence[str]
    ) -> tuple[NumberedVersion, bool]:
        """Version, alias, result file and the job's success become visible in one transaction."""
        job = self._claim.job
        if (report := manifest.gate) is not None:
            self._jobs.note(self._claim, report.reason, level="info" if report.verdict == "passed" else "warn")
        content = io.BytesIO(write_csv(self._jobs.metrics(job.id)).encode())
        with self._files.placed_result(content, f"{job.id}_metrics.csv") as result:

            def succeed(session: Session, published: NumberedVersion) -> None:
                self._files.register(session, result, alias=job.alias)
                self._jobs.succeed(
                    session,
                    self._claim,
                    fine_tuned_model=published.label,
                    result_file=result.id,
                    trained_tokens=counts.num_tokens,
                )

            try:
                return self._registry.publish(
                    folder, manifest, alias=job.alias, promote=may_move, also=succeed, prompts=prompts
                )
            except ConflictError as error:  # cancelled or paused in the last moment
                raise StoppedError from error

    def _data_file(self, file_id: str, param: str) -> DataFile:
        name, options = name_data(self._claim.job, self._files)[param], read_options(self._files, file_id)
        return DataFile(self._files.path(file_id), name, param, options)

    def _folder(self, job: Job) -> JobFolder:
        folder = checkpoints_folder(self._core.home, job.id)
        steps = [checkpoint.step for checkpoint in self._jobs.checkpoints(job.id, limit=2)[0]]
        discard_unrecorded(folder, steps)
        every_steps = hyperparameters_of(job).get("checkpoint_steps")
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


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The metrics of all steps in the columns that tools for the hosted API read; empty where nothing was measured."""
    names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    lines = [",".join(_CSV_COLUMNS)]
    lines += [",".join(_cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Run one job in this process."""
    with job_process(arguments) as process:
        database = process.database.acting_for(Actor(f"job {process.claim.job.id}"))
        JobRun(process, Registry(database, ArtifactStore(process.core.home / "store"))).run()


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _metrics_of(metrics: StepMetrics, validation: Evaluation | None) -> dict[str, float]:
    known = {"step": metrics.step, "total_steps": metrics.num_steps, "train_loss": metrics.loss}
    known |= _measured("train", metrics.accuracy, metrics.extra)
    if validation is not None:
        known |= {"valid_loss": validation.loss} | _measured("valid", validation.accuracy, validation.extra)
    return known


def _measured(part: str, accuracy: float | None, extra: Mapping[str, float]) -> dict[str, float]:
    named = {f"{part}_{name}": value for name, value in extra.items()}
    return named if accuracy is None else named | {f"{part}_mean_token_accuracy": accuracy}


if __name__ == "__main__":
    main(sys.argv[1:])
