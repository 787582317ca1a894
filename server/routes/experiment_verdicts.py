"""/v1/experiments/{experiment}: what a person decides on a verdict, promote, rollback, accept-feedback."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from adapters.experiment_config import ARM_PATTERN
from adapters.records import Experiment
from server.auth import needs
from server.resources import ExperimentPath
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()
_EXPERIMENTS = [needs("experiments")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RollbackRequest(_Body):
    """Body of a rollback by hand."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})
    reason: str | None = Field(
        None, min_length=1, max_length=1000, description="Why, for the log; else the verdict's sentence."
    )


class PromotionRequest(RollbackRequest):
    """Body of a promotion by hand."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"arm": "B"}]})
    arm: str | None = Field(
        None, pattern=ARM_PATTERN, description="The treatment; else the one that the verdict promotes."
    )


class AcceptRequest(_Body):
    """Body of a word that arms may differ in how often outcomes are known."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "B's button is lower on the page"}]})
    reason: str = Field(min_length=1, max_length=1000, description="Why the difference is harmless, for the log.")


class DecidedObject(BaseModel):
    """An experiment that has ended, and the version that its alias answers with."""

    id: str
    object: Literal["experiment.decided"] = "experiment.decided"
    alias: str
    state: str


class AcceptedObject(BaseModel):
    """A difference in feedback that somebody took on, for the present stage."""

    id: str
    object: Literal["experiment.accepted"] = "experiment.accepted"
    reason: str


@router.post("/v1/experiments/{experiment}/promote", dependencies=_EXPERIMENTS)
async def promote_arm(experiment: ExperimentPath, body: PromotionRequest, services: CurrentServices) -> DecidedObject:
    """End an experiment: its alias answers with a treatment's version, for everybody. `undo` takes it back."""
    return _decided(await asyncio.to_thread(services.evaluation.promote, experiment, body.arm, reason=body.reason))


@router.post("/v1/experiments/{experiment}/rollback", dependencies=_EXPERIMENTS)
async def roll_experiment_back(
    experiment: ExperimentPath, body: RollbackRequest, services: CurrentServices
) -> DecidedObject:
    """End an experiment: its alias answers with the control's version, for everybody. `undo` takes it back."""
    return _decided(await asyncio.to_thread(services.evaluation.roll_back, experiment, reason=body.reason))


@router.post("/v1/experiments/{experiment}/accept-feedback", dependencies=_EXPERIMENTS)
async def accept_feedback(experiment: ExperimentPath, body: AcceptRequest, services: CurrentServices) -> AcceptedObject:
    """Let arms differ in how often outcomes are known: it no longer holds a promotion back in this stage."""
    await asyncio.to_thread(services.evaluation.accept_feedback, experiment, body.reason)
    return AcceptedObject(id=experiment, reason=body.reason)


def _decided(experiment: Experiment) -> DecidedObject:
    return DecidedObject(id=experiment.id, alias=experiment.alias, state=experiment.state)
