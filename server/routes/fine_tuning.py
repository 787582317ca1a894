"""/v1/fine_tuning/jobs: create, watch, cancel, pause and resume jobs. The supervisor is what runs them."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from adapters.records import Job
from server.auth import needs
from server.fine_tuning_schemas import (
    CheckpointsQuery,
    CreateJobRequest,
    EventsQuery,
    JobsQuery,
    checkpoint_body,
    event_body,
    job_body,
    page_body,
)
from server.services import CurrentServices, Services
from server.streaming import ClosingStreamingResponse

__all__ = ["router"]

router = APIRouter(dependencies=[needs("train")])
_RequestKey = Annotated[
    str | None,
    Header(
        description="What the client calls this request; sent again, it makes no second job.",
        json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    ),
]
_LIST_PARAMETERS = [  # read by hand, since the names of `metadata[...]` are the client's own
    {"name": "after", "in": "query", "schema": {"type": "string", "minLength": 1, "maxLength": 80}},
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}},
    {
        "name": "metadata",
        "in": "query",
        "style": "deepObject",
        "description": "`metadata[key]=value`: only jobs that have it.",
        "schema": {
            "type": "object",
            "propertyNames": {"minLength": 1, "maxLength": 64},
            "additionalProperties": {"type": "string", "maxLength": 512},
            "maxProperties": 16,
        },
    },
]
_METADATA_KEY = re.compile(r"metadata\[(.*)\]")


@router.post("/v1/fine_tuning/jobs")
async def create_job(
    body: CreateJobRequest, services: CurrentServices, idempotency_key: _RequestKey = None
) -> dict[str, Any]:
    """Take a job: its files are validated, then it is queued. The same key again gives the job that it made."""
    return await asyncio.to_thread(
        lambda: _with_gate(services, services.fine_tuning.accept(body, request_key=idempotency_key))
    )


@router.get("/v1/fine_tuning/jobs", openapi_extra={"parameters": _LIST_PARAMETERS})
async def list_jobs(request: Request, services: CurrentServices) -> dict[str, Any]:
    """Jobs, newest first; `metadata[key]=value` leaves those that have it."""
    query = _read_jobs_query(request)

    def read() -> dict[str, Any]:
        jobs = services.fine_tuning.jobs
        found, has_more = jobs.list(limit=query.limit, after=query.after, metadata=query.metadata)
        return page_body([_with_gate(services, job) for job in found], has_more=has_more)

    return await asyncio.to_thread(read)


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def retrieve_job(job_id: str, services: CurrentServices) -> dict[str, Any]:
    """One job."""
    return await asyncio.to_thread(lambda: _with_gate(services, services.fine_tuning.jobs.get(job_id)))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, services: CurrentServices) -> dict[str, Any]:
    """End a job for good."""
    return await asyncio.to_thread(lambda: _with_gate(services, services.fine_tuning.jobs.cancel(job_id)))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
async def pause_job(job_id: str, services: CurrentServices) -> dict[str, Any]:
    """Stop a job after a checkpoint."""
    return await asyncio.to_thread(lambda: _with_gate(services, services.fine_tuning.jobs.pause(job_id)))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
async def resume_job(job_id: str, services: CurrentServices) -> dict[str, Any]:
    """Queue a paused job again."""
    return await asyncio.to_thread(lambda: _with_gate(services, services.fine_tuning.jobs.resume(job_id)))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str, query: Annotated[EventsQuery, Query()], request: Request, services: CurrentServices
) -> Response:
    """A job's events, newest first; with `stream`, all of them from the first as they happen."""
    jobs = services.fine_tuning.jobs
    if query.stream:
        await asyncio.to_thread(jobs.follow, job_id, after=query.after, limit=1)  # what is wrong gets a status code
        events = services.fine_tuning.streams.open(services, job_id, query.after, request)
        return ClosingStreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    found, has_more = await asyncio.to_thread(jobs.events, job_id, limit=query.limit, after=query.after)
    return JSONResponse(page_body([event_body(event) for event in found], has_more=has_more))


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, query: Annotated[CheckpointsQuery, Query()], services: CurrentServices
) -> dict[str, Any]:
    """A job's checkpoints, newest first."""
    jobs = services.fine_tuning.jobs
    found, has_more = await asyncio.to_thread(jobs.checkpoints, job_id, limit=query.limit, after=query.after)
    return page_body([checkpoint_body(checkpoint) for checkpoint in found], has_more=has_more)


def _with_gate(services: Services, job: Job) -> dict[str, Any]:
    """A job's body; reads the manifest of its version, if it has made one."""
    return job_body(job, services.registry.gate_report(job.fine_tuned_model) if job.fine_tuned_model else None)


def _read_jobs_query(request: Request) -> JobsQuery:
    given: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if match := _METADATA_KEY.fullmatch(name):
            metadata[match.group(1)] = value
        else:
            given[name] = value
    try:
        return JobsQuery.model_validate(given | {"metadata": metadata})
    except ValidationError as error:
        raise RequestValidationError(
            [{**detail, "loc": ("query", *detail["loc"])} for detail in error.errors()]
        ) from None
