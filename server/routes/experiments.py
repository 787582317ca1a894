"""/v1/experiments: splits of aliases and what came of them. POST /v1/feedback: an outcome for a response, by its id."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters.records import Arm, Experiment, Feedback
from server.auth import needs
from server.experiment_report import ReportObject, report_object
from server.resources import (
    EXPERIMENT_PATTERN,
    ArmObject,
    ExperimentObject,
    ExperimentPath,
    ExperimentRequest,
    FeedbackObject,
    Page,
    PageLimit,
    make_page,
)
from server.schemas import FeedbackRequest
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()


class ExperimentDetail(ExperimentObject, ReportObject):
    """An experiment and what came of its present stage."""


_EXPERIMENTS = [needs("experiments")]


@router.post("/v1/feedback", dependencies=[needs("feedback")])
async def record_feedback(body: FeedbackRequest, services: CurrentServices) -> FeedbackObject:
    """Record an outcome; sending the same metric for the same response again replaces the value."""
    feedback = Feedback(body.id, body.metric, float(body.value), body.comment)
    await asyncio.to_thread(services.experiments.record_feedback, feedback)
    return FeedbackObject(id=body.id, metric=body.metric)


@router.get("/v1/experiments", dependencies=_EXPERIMENTS)
async def list_experiments(
    services: CurrentServices,
    after: Annotated[
        str | None, Query(pattern=EXPERIMENT_PATTERN, description="The experiment to go on behind.")
    ] = None,
    limit: PageLimit = 20,
) -> Page[ExperimentObject]:
    """All experiments, the newest first."""
    found = await asyncio.to_thread(services.experiments.list, after=after, limit=limit + 1)
    data = [ExperimentObject(**_experiment_fields(experiment)) for experiment in found]
    return make_page(data, limit, lambda item: item.id)


@router.post("/v1/experiments", dependencies=_EXPERIMENTS, status_code=201)
async def start_experiment(body: ExperimentRequest, services: CurrentServices) -> ExperimentObject:
    """Split an alias between versions, from the next request on; 409 while another experiment runs on it."""
    arms = [(arm.name, arm.version, arm.weight) for arm in body.arms]
    created = await asyncio.to_thread(services.experiments.create, body.alias, arms, salt=body.salt)
    return ExperimentObject(**_experiment_fields(created))


@router.get("/v1/experiments/{experiment}", dependencies=_EXPERIMENTS)
async def show_experiment(experiment: ExperimentPath, services: CurrentServices) -> ExperimentDetail:
    """One experiment with its verdict, effects with intervals that hold at every look, guardrails and counts."""
    report = await asyncio.to_thread(services.evaluation.report, experiment)
    return ExperimentDetail(**_experiment_fields(report.experiment), **dict(report_object(report)))


@router.post("/v1/experiments/{experiment}/stop", dependencies=_EXPERIMENTS)
async def stop_experiment(experiment: ExperimentPath, services: CurrentServices) -> ExperimentObject:
    """End an experiment: its alias answers with the version that it points to again."""
    stopped = await asyncio.to_thread(services.experiments.stop, experiment)
    return ExperimentObject(**_experiment_fields(stopped))


def _experiment_fields(experiment: Experiment) -> dict[str, Any]:
    return {
        "id": experiment.id,
        "alias": experiment.alias,
        "state": experiment.state,
        "arms": [ArmObject(**_arm_fields(experiment.alias, arm)) for arm in experiment.arms],
        "created_at": int(experiment.created_at.timestamp()),
        "stopped_at": None if experiment.stopped_at is None else int(experiment.stopped_at.timestamp()),
    }


def _arm_fields(alias: str, arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "version": f"{alias}@v{arm.number}", "digest": arm.digest, "weight": arm.weight}
