"""`hotswap jobs`: what waits to be trained, and how it goes on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.methods import WIRE_METHODS
from clients.cli.job_orders import create_job
from clients.cli.job_output import describe_progress, print_job, print_made, print_progress
from clients.cli.options import HomeOption, JsonOption, load_core, open_registry
from clients.cli.output import console, format_moment, print_gate, print_json, print_table
from clients.cli.plots import print_metrics
from server.home_lock import is_home_served

if TYPE_CHECKING:
    from adapters.jobs import JobService
    from adapters.records import Job

__all__ = ["app"]

app = typer.Typer(help="Fine-tuning jobs: create, list, show, events, cancel, pause, resume.", no_args_is_help=True)
_JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id: ftjob-...")]
_LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]


app.command("create")(create_job)


@app.command("list")
def list_jobs(limit: _LimitOption = 20, home: HomeOption = None, json: JsonOption = False) -> None:
    """The newest jobs; of those that wait, their place in the queue behind the status."""
    jobs, _ = _open(home).list(limit=limit)
    if json:
        print_json(jobs)
        return
    rows = [
        (job.id, _describe_status(job), job.fine_tuned_model or job.alias, format_moment(job.created_at))
        for job in jobs
    ]
    print_table(columns := ["job", "status", "adapter", "created"], rows, whole=columns)


def _describe_status(job: Job) -> str:
    return f"{job.status} ({job.queue_position})" if job.queue_position is not None else job.status


@app.command("show")
def show(
    job_id: _JobArgument,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss curves.")] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """One job: how far it is, its latest losses, warnings, what went wrong, and what the gate said of its version."""
    jobs = _open(home)
    job = jobs.get(job_id)
    gate = open_registry(home).gate_report(job.fine_tuned_model) if job.fine_tuned_model is not None else None
    if json:
        print_json({field.name: getattr(job, field.name) for field in fields(job)} | {"gate": gate})
        return
    _print_described(jobs, job, home)
    print_progress(jobs, job_id)
    if plot:
        print_metrics(jobs.metrics(job_id), WIRE_METHODS[job.method["type"]])
    if gate is not None:
        print_gate(gate)
    if job.fine_tuned_model is not None:
        print_made(open_registry(home), job.alias, job.fine_tuned_model)


@app.command("events")
def events(job_id: _JobArgument, limit: _LimitOption = 50, home: HomeOption = None, json: JsonOption = False) -> None:
    """What happened in a job, oldest first; the newest of it if there is more than the limit."""
    found, _ = _open(home).events(job_id, limit=limit)
    if json:
        print_json(found[::-1])
        return
    for event in reversed(found):
        console.print(f"{event.created_at:%H:%M:%S} {event.level:5} {event.message}", markup=False, highlight=False)


@app.command("cancel")
def cancel(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """End a job for good; nothing of it is published."""
    jobs = _open(home)
    _print_turned(jobs, jobs.cancel(job_id), home, json=json)


@app.command("pause")
def pause(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Stop a job after a checkpoint."""
    jobs = _open(home)
    _print_turned(jobs, jobs.pause(job_id), home, json=json)


@app.command("resume")
def resume(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Queue a paused job again; it goes on from its checkpoint."""
    jobs = _open(home)
    _print_turned(jobs, jobs.resume(job_id), home, json=json)


def _open(home: Path | None) -> JobService:
    from adapters.jobs import JobService
    from server.config import ServeSettings

    core = load_core(home)
    max_queued = ServeSettings.load(core.home).max_queued_jobs  # which bounds what is resumed, too
    return JobService(open_registry(home).database, max_queued=max_queued)


def _print_turned(jobs: JobService, job: Job, home: Path | None, *, json: bool) -> None:
    if json:
        print_json(job)
    else:
        _print_described(jobs, job, home)


def _print_described(jobs: JobService, job: Job, home: Path | None) -> None:
    core = load_core(home)
    progress = describe_progress(jobs, job, is_served=is_home_served(core.home))
    print_job(job, progress=progress, filenames=_find_filenames(jobs, job, core.home))


def _find_filenames(jobs: JobService, job: Job, home: Path) -> dict[str, str]:
    """By id what the job's files were called where they came from; those that are deleted are not there."""
    from adapters.errors import NotFoundError
    from adapters.files import FileService

    files = FileService(jobs.database, home / "files", max_bytes=0)
    found = {}
    for file_id in filter(None, (job.training_file, job.validation_file)):
        with suppress(NotFoundError):
            found[file_id] = files.get(file_id).filename
    return found
