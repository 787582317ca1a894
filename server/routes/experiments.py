"""/v1/experiments: splits of aliases and what came of them. POST /v1/feedback: an outcome for a response, by its id."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters.experiments import ArmReport, ExperimentReport, MetricReport
from adapters.records import Arm, Experiment, Feedback
from adapters.statistics import Interval
from server.auth import needs
from server.resources import (
    EXPERIMENT_PATTERN,
    ArmObject,
    ArmReportObject,
    ExperimentDetail,
    ExperimentObject,
    ExperimentPath,
    ExperimentRequest,
    FeedbackObject,
    IntervalObject,
    MetricObject,
    Page,
    PageLimit,
    make_page,
)
from server.schemas import FeedbackRequest
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()
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
    """One experiment with counts, means and 95 % intervals by arm; the intervals hold for one look."""
    report = await asyncio.to_thread(services.experiments.report, experiment)
    return _detail(report)


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


def _detail(report: ExperimentReport) -> ExperimentDetail:
    alias = report.experiment.alias
    return ExperimentDetail(
        **_experiment_fields(report.experiment), report=[_arm_report(alias, arm) for arm in report.arms]
    )


def _arm_report(alias: str, report: ArmReport) -> ArmReportObject:
    return ArmReportObject(
        **_arm_fields(alias, report.arm),
        num_exposures=report.num_exposures,
        num_units=report.num_units,
        num_errors=report.num_errors,
        metrics=[_metric(metric) for metric in report.metrics],
    )


def _metric(report: MetricReport) -> MetricObject:
    return MetricObject(
        metric=report.metric,
        num_outcomes=report.num_outcomes,
        num_units=report.estimate.num_units,
        mean=report.estimate.mean,
        interval=_interval(report.estimate.interval),
        difference=_interval(report.difference),
    )


def _interval(interval: Interval | None) -> IntervalObject | None:
    return None if interval is None else IntervalObject(**asdict(interval))
