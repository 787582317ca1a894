"""What the command line shows of a fine-tuning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clients.cli.output import console, format_loss, format_seconds, print_live, print_table

if TYPE_CHECKING:
    from adapters.jobs import JobService
    from adapters.records import Job
    from adapters.registry import Registry

__all__ = ["describe_progress", "print_job", "print_made", "print_progress"]

_MAX_SHOWN = 10
_MAX_STEPS_SHOWN = 5


def print_job(job: Job, *, progress: str | None = None, filenames: Mapping[str, str] | None = None) -> None:
    """Its state, what it was asked for, and what it made; what does not hold of it has no row.

    `progress` is what `describe_progress` says, `filenames` what the files were called where they came from, by id.
    """
    rows = [
        ("status", job.status),
        ("how far", progress),
        ("place in the queue", job.queue_position),
        ("priority", job.priority),
        ("method", job.method["type"]),
        ("model", job.model),
        ("alias", job.alias),
        ("training file", _name_file(job.training_file, filenames or {})),
        ("validation file", _name_file(job.validation_file, filenames or {})),
        ("trained tokens", job.trained_tokens),
        ("made", job.fine_tuned_model),
        ("error", f"{job.error.code}: {job.error.message}" if job.error else None),
    ]
    print_table(["", job.id], [row for row in rows if row[1] is not None])


def describe_progress(jobs: JobService, job: Job, *, is_served: bool) -> str | None:
    """How far a job is, or what it waits for; `is_served` says whether a server runs on this home folder."""
    measured = jobs.metrics(job.id)
    step = None
    if measured:
        newest = measured[-1]
        step = f"step {newest['step']} of {newest['total_steps']}, loss {format_loss(newest['train_loss'])}"
    if job.status == "running":
        return _describe_running(jobs, job, step)
    if job.status not in ("validating_files", "queued"):
        return step
    if not is_served:
        wait = "waits for a server: hotswap serve on this home folder trains it"
    else:
        wait = "its files are being checked" if job.status == "validating_files" else "waits for its turn"
    return f"{step}; {wait}" if step else wait


def print_progress(jobs: JobService, job_id: str) -> None:
    """Its latest losses, the checkpoints that can be called, and its latest warnings."""
    if measured := jobs.metrics(job_id):
        print_table(["step", "training loss", "validation loss"], _loss_rows(measured))
    kept = [found.name for found in jobs.checkpoints(job_id, limit=_MAX_SHOWN)[0] if found.is_kept]
    if kept:
        console.print("checkpoints that can be called: " + ", ".join(kept), markup=False)
    for warning in reversed(jobs.events(job_id, limit=_MAX_SHOWN, level="warn")[0]):
        console.print(f"warning: {warning.message}", style="yellow", markup=False)


def print_made(registry: Registry, alias: str, label: str) -> None:
    """Whether a job's alias points to the version that it made, and how to chat with that or to promote it."""
    from adapters.errors import NotFoundError

    try:
        made = registry.find(label)
    except NotFoundError:
        console.print(f"{label} was removed since", markup=False)
        return
    live = registry.alias(alias).current.label if registry.has_alias(alias) else None
    if live == label:
        print_live(made)
        return
    standing = f"{alias} stands for {live}" if live else f"no version of {alias} has been promoted"
    chat = f' or hotswap chat {label} "..."' if made.version.kind == "chat" else ""
    told = f"{label} is published; {standing}. Try: hotswap adapters promote {label}{chat}"
    console.print(told, markup=False, soft_wrap=True)


def _describe_running(jobs: JobService, job: Job, step: str | None) -> str | None:
    if step and job.estimated_finish is not None:
        left = max(0.0, (job.estimated_finish - datetime.now(UTC)).total_seconds())
        return f"{step}, about {format_seconds(left)} left"
    newest, _ = jobs.events(job.id, limit=1, level="info")  # the stage: the base model is being loaded, say
    return "; ".join(part for part in (step, newest[0].message if newest else None) if part) or None


def _name_file(file_id: str | None, filenames: Mapping[str, str]) -> str | None:
    return f"{file_id} ({filenames[file_id]})" if file_id and file_id in filenames else file_id


def _loss_rows(measured: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """The newest steps, and the latest one that was validated."""
    newest = list(measured[-_MAX_STEPS_SHOWN:])
    validated = [data for data in measured if "valid_loss" in data]
    shown = [*([validated[-1]] if validated and validated[-1] not in newest else []), *newest]
    return [
        (f"{data['step']}/{data['total_steps']}", format_loss(data["train_loss"]), format_loss(data.get("valid_loss")))
        for data in shown
    ]
