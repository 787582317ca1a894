"""/v1/experiments: splits of aliases and what came of them; holdouts. POST /v1/feedback: an outcome for a response."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from adapters.errors import DatabaseBusyError
from adapters.experiment_acts import undo
from adapters.experiment_config import GuardrailConfig, MetricConfig, notes_on
from adapters.records import Arm, Decision, Experiment, ExperimentState, Feedback
from server.auth import needs
from server.experiment_report import ReportObject, report_object
from server.observe import request_id_of
from server.resources import (
    EXPERIMENT_PATTERN,
    AcceptGuardrailRequest,
    AcceptRequest,
    AfterNumber,
    AliasPath,
    ArmObject,
    DecisionObject,
    ExperimentObject,
    ExperimentPath,
    ExperimentRequest,
    FeedbackObject,
    HoldoutObject,
    HoldoutRequest,
    Page,
    PageLimit,
    PromotionRequest,
    RollbackRequest,
    WeightsRequest,
    make_page,
)
from server.schemas import FeedbackRequest
from server.services import CurrentCaller, CurrentServices, Services

__all__ = ["router"]

router = APIRouter()
_EXPERIMENTS = [needs("experiments")]
_PLAIN_FIELDS = (
    "id",
    "alias",
    "state",
    "salt",
    "traffic",
    "stage",
    "alpha",
    "smallest_effect",
    "planned_units",
    "analysis",
    "allocation",
    "auto_promote",
    "auto_rollback",
    "config_hash",
)


class ExperimentDetail(ExperimentObject, ReportObject):
    """An experiment and what came of its present stage."""


@router.post("/v1/feedback", dependencies=[needs("feedback")])
async def record_feedback(
    body: FeedbackRequest, request: Request, services: CurrentServices, caller: CurrentCaller
) -> FeedbackObject:
    """Record an outcome, also while the answer is still streamed; the same metric again replaces the value."""
    feedback = Feedback(body.id, body.metric, float(body.value), body.comment)
    actor = caller.actor(request_id_of(request.scope))
    if not await services.chat.take_feedback(feedback, actor):
        await asyncio.to_thread(services.experiments.record_feedback, feedback)
    return FeedbackObject(id=body.id, metric=body.metric)


@router.get("/v1/experiments", dependencies=_EXPERIMENTS)
async def list_experiments(
    services: CurrentServices,
    state: Annotated[ExperimentState | None, Query(description="Only those in this state.")] = None,
    after: Annotated[
        str | None, Query(pattern=EXPERIMENT_PATTERN, description="The experiment to go on behind.")
    ] = None,
    limit: PageLimit = 20,
) -> Page[ExperimentObject]:
    """All experiments, the newest first."""
    found = await asyncio.to_thread(services.experiments.list, state=state, after=after, limit=limit + 1)
    data = [ExperimentObject(**_experiment_fields(experiment)) for experiment in found]
    return make_page(data, limit, lambda item: item.id)


@router.post("/v1/experiments", dependencies=_EXPERIMENTS, status_code=201)
async def create_experiment(body: ExperimentRequest, services: CurrentServices) -> ExperimentObject:
    """Split an alias between versions: from the next request on, from `starts_at` on, or as a draft not yet.

    409 if the experiments that run on the alias at that time leave too few of its users.
    """
    created = await asyncio.to_thread(
        services.experiments.create,
        body.alias,
        body.arm_tuples(),
        salt=body.salt,
        traffic=body.traffic,
        starts_at=body.starts_at,
        ends_at=body.ends_at,
        plan=body.plan(),
        draft=body.draft,
    )
    return _experiment(created)


@router.get("/v1/experiments/{experiment}", dependencies=_EXPERIMENTS)
async def show_experiment(experiment: ExperimentPath, services: CurrentServices) -> ExperimentDetail:
    """One experiment with its verdict, effects with intervals that hold at every look, guardrails and counts."""
    report = await asyncio.to_thread(services.evaluation.report, experiment)
    return ExperimentDetail(**_experiment_fields(report.experiment), **dict(report_object(report)))


@router.post("/v1/experiments/{experiment}/start", dependencies=_EXPERIMENTS)
async def start_experiment(experiment: ExperimentPath, services: CurrentServices) -> ExperimentObject:
    """Start a draft: at once, or at its `starts_at` if that lies ahead."""
    return _experiment(await asyncio.to_thread(services.experiments.start, experiment))


@router.post("/v1/experiments/{experiment}/weights", dependencies=_EXPERIMENTS)
async def change_weights(
    experiment: ExperimentPath, body: WeightsRequest, services: CurrentServices
) -> ExperimentObject:
    """Give the arms of a running experiment other weights: a new stage begins, without what users did so far."""
    arms = [(arm.name, arm.version, arm.weight) for arm in body.arms]
    changed = await asyncio.to_thread(services.experiments.change_weights, experiment, arms, traffic=body.traffic)
    return await _staged(changed, services)


@router.post("/v1/experiments/{experiment}/stop", dependencies=_EXPERIMENTS)
async def stop_experiment(experiment: ExperimentPath, services: CurrentServices) -> ExperimentObject:
    """End an experiment: its alias answers with the version that it points to again. A draft never runs then."""
    return _experiment(await asyncio.to_thread(services.experiments.stop, experiment))


@router.post("/v1/experiments/{experiment}/promote", dependencies=_EXPERIMENTS)
async def promote_arm(
    experiment: ExperimentPath, body: PromotionRequest, services: CurrentServices
) -> ExperimentObject:
    """End an experiment: its alias answers with a treatment's version, for everybody. `undo` takes it back."""
    decided = await asyncio.to_thread(services.evaluation.promote, experiment, body.arm, reason=body.reason)
    return _experiment(decided)


@router.post("/v1/experiments/{experiment}/rollback", dependencies=_EXPERIMENTS)
async def roll_back_to_control(
    experiment: ExperimentPath, body: RollbackRequest, services: CurrentServices
) -> ExperimentObject:
    """End an experiment: its alias answers with the control's version, for everybody. `undo` takes it back."""
    return _experiment(await asyncio.to_thread(services.evaluation.roll_back, experiment, reason=body.reason))


@router.post("/v1/experiments/{experiment}/accept-feedback", dependencies=_EXPERIMENTS)
async def accept_feedback(
    experiment: ExperimentPath, body: AcceptRequest, services: CurrentServices
) -> ExperimentObject:
    """Let arms differ in how often outcomes are known: it no longer holds a promotion back in this stage."""
    return _experiment(await asyncio.to_thread(services.evaluation.accept_feedback, experiment, body.reason))


@router.post("/v1/experiments/{experiment}/accept-guardrail", dependencies=_EXPERIMENTS)
async def accept_guardrail(
    experiment: ExperimentPath, body: AcceptGuardrailRequest, services: CurrentServices
) -> ExperimentObject:
    """No longer wait for a guardrail to be shown to hold in this stage; a breach of it counts as before."""
    accept = services.evaluation.accept_guardrail
    return _experiment(await asyncio.to_thread(accept, experiment, body.guardrail, body.reason))


@router.post("/v1/experiments/{experiment}/accept-split", dependencies=_EXPERIMENTS)
async def accept_split(experiment: ExperimentPath, body: AcceptRequest, services: CurrentServices) -> ExperimentObject:
    """Take arms for comparable though users were not split as was meant, in the stages in which that was found."""
    return _experiment(await asyncio.to_thread(services.evaluation.accept_split, experiment, body.reason))


@router.post("/v1/experiments/{experiment}/undo", dependencies=_EXPERIMENTS)
async def undo_decision(experiment: ExperimentPath, services: CurrentServices) -> ExperimentObject:
    """Take the latest change of weights, promotion, rollback, acceptance or stop back that isn't yet.

    After a change of weights or a stop a new stage begins, without what users did so far.
    """
    return await _staged(await asyncio.to_thread(undo, services.registry, experiment), services)


@router.get("/v1/experiments/{experiment}/decisions", dependencies=_EXPERIMENTS)
async def list_decisions(
    experiment: ExperimentPath, services: CurrentServices, after: AfterNumber = 0, limit: PageLimit = 20
) -> Page[DecisionObject]:
    """What was done to an experiment and why, the oldest first."""
    found = await asyncio.to_thread(services.experiments.decisions, experiment, after=after, limit=limit + 1)
    return make_page([_decision(decision) for decision in found], limit, lambda item: item.id)


@router.get("/v1/adapters/{alias}/holdout", dependencies=_EXPERIMENTS)
async def show_holdout(alias: AliasPath, services: CurrentServices) -> HoldoutObject:
    """The percent of an alias's users that no experiment touches."""
    return HoldoutObject(id=alias, percent=await asyncio.to_thread(services.experiments.holdout, alias))


@router.put("/v1/adapters/{alias}/holdout", dependencies=_EXPERIMENTS)
async def set_holdout(alias: AliasPath, body: HoldoutRequest, services: CurrentServices) -> HoldoutObject:
    """Keep so many percent of an alias's users out of all its experiments; 409 while one runs on it."""
    await asyncio.to_thread(services.experiments.set_holdout, alias, body.percent)
    return HoldoutObject(id=alias, percent=body.percent)


def _experiment(experiment: Experiment) -> ExperimentObject:
    return ExperimentObject(**_experiment_fields(experiment))


async def _staged(experiment: Experiment, services: Services) -> ExperimentObject:
    """An experiment whose stage may have changed: of one that is not the first it says what that leaves out."""
    answer = _experiment(experiment)
    if experiment.stage > 1:
        with suppress(DatabaseBusyError):  # the act is done: an error would be taken for its failure, and it repeated
            answer.notes.append(await asyncio.to_thread(services.experiments.note_on_stage, experiment))
    return answer


def _decision(decision: Decision) -> DecisionObject:
    return DecisionObject(
        id=decision.id,
        experiment=decision.experiment_id,
        stage=decision.stage,
        made_at=int(decision.made_at.timestamp()),
        action=decision.action,
        by=decision.by,
        reason=decision.reason,
        numbers=dict(decision.numbers),
    )


def _experiment_fields(experiment: Experiment) -> dict[str, Any]:
    fields = {name: getattr(experiment, name) for name in _PLAIN_FIELDS}
    return fields | {
        "arms": [ArmObject(**_arm_fields(experiment.alias, arm)) for arm in experiment.arms],
        "metric": experiment.metric and MetricConfig(**asdict(experiment.metric)),
        "guardrails": [GuardrailConfig(**asdict(guardrail)) for guardrail in experiment.guardrails],
        "starts_at": _seconds(experiment.starts_at),
        "ends_at": _seconds(experiment.ends_at),
        "created_at": int(experiment.created_at.timestamp()),
        "stopped_at": _seconds(experiment.stopped_at),
        "notes": notes_on(experiment),
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _arm_fields(alias: str, arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "version": f"{alias}@v{arm.number}", "digest": arm.digest, "weight": arm.weight}
