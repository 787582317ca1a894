"""`hotswap jobs`: what the fine-tuning API has queued, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.jobs import JobService
    from adapters.records import Job

__all__ = ["app"]

app = typer.Typer(help="Fine-tuning jobs: list, show, events, cancel, pause, resume.", no_args_is_help=True)
_JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id: ftjob-...")]
_LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]


@app.command("list")
def list_jobs(limit: _LimitOption = 20, home: HomeOption = None, json: JsonOption = False) -> None:
    """The newest jobs."""
    jobs, _ = _open(home).list(limit=limit)
    if json:
        print_json(jobs)
        return
    rows = [(job.id, job.status, job.fine_tuned_model or job.alias, format_moment(job.created_at)) for job in jobs]
    print_table(["job", "status", "adapter", "created"], rows, whole=["job", "adapter", "created"])


@app.command("show")
def show(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """One job, and what went wrong if it failed."""
    _print(_open(home).get(job_id), json=json)


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
    _print(_open(home).cancel(job_id), json=json)


@app.command("pause")
def pause(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Stop a job after a checkpoint."""
    _print(_open(home).pause(job_id), json=json)


@app.command("resume")
def resume(job_id: _JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Queue a paused job again; it goes on from its checkpoint."""
    _print(_open(home).resume(job_id), json=json)


def _open(home: Path | None) -> JobService:
    from adapters.jobs import JobService

    return JobService(open_registry(home).database)


def _print(job: Job, *, json: bool) -> None:
    if json:
        print_json(job)
        return
    rows = [
        ("status", job.status),
        ("alias", job.alias),
        ("training file", job.training_file),
        ("validation file", job.validation_file),
        ("trained tokens", job.trained_tokens),
        ("made", job.fine_tuned_model),
        ("error", f"{job.error.code}: {job.error.message}" if job.error else None),
    ]
    print_table(["", job.id], rows)
