"""What the command line shows of a fine-tuning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clients.cli.output import console, format_loss, print_table

if TYPE_CHECKING:
    from adapters.jobs import JobService
    from adapters.records import Job

__all__ = ["print_job", "print_progress"]

_MAX_SHOWN = 10
_MAX_STEPS_SHOWN = 5


def print_job(job: Job) -> None:
    """Its state, and what it was asked for."""
    rows = [
        ("status", job.status),
        ("place in the queue", job.queue_position),
        ("priority", job.priority),
        ("method", job.method["type"]),
        ("model", job.model),
        ("alias", job.alias),
        ("training file", job.training_file),
        ("validation file", job.validation_file),
        ("trained tokens", job.trained_tokens),
        ("time left", _format_left(job)),
        ("made", job.fine_tuned_model),
        ("error", f"{job.error.code}: {job.error.message}" if job.error else None),
    ]
    print_table(["", job.id], rows)


def print_progress(jobs: JobService, job_id: str) -> None:
    """Its latest losses, the checkpoints that can be called, and its latest warnings."""
    if measured := jobs.metrics(job_id):
        print_table(["step", "training loss", "validation loss"], _loss_rows(measured))
    kept = [found.name for found in jobs.checkpoints(job_id, limit=_MAX_SHOWN)[0] if found.is_kept]
    if kept:
        console.print("checkpoints that can be called: " + ", ".join(kept), markup=False)
    for warning in reversed(jobs.events(job_id, limit=_MAX_SHOWN, level="warn")[0]):
        console.print(f"warning: {warning.message}", style="yellow", markup=False)


def _format_left(job: Job) -> str | None:
    if job.estimated_finish is None or job.status != "running":
        return None
    left = job.estimated_finish - datetime.now(UTC)
    return f"about {max(0, round(left.total_seconds()))} s"


def _loss_rows(measured: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """The newest steps, and the latest one that was validated."""
    newest = list(measured[-_MAX_STEPS_SHOWN:])
    validated = [data for data in measured if "valid_loss" in data]
    shown = [*([validated[-1]] if validated and validated[-1] not in newest else []), *newest]
    return [
        (f"{data['step']}/{data['total_steps']}", format_loss(data["train_loss"]), format_loss(data.get("valid_loss")))
        for data in shown
    ]
