"""/v1/shadows: versions that answer a copy of live requests, and how their answers compare."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from adapters.shadows import Shadow, ShadowReport
from adapters.statistics import MeanEstimate
from server.auth import needs
from server.resources import ALIAS_PATTERN, VERSION_PATTERN, PageLimit
from server.services import CurrentServices
from server.wire import Wire

__all__ = ["router"]

router = APIRouter(dependencies=[needs("experiments")])

ShadowPath = Annotated[str, Path(pattern=r"^shadow-[0-9a-f]{12}$", description="A shadow's id.")]


class ShadowRequest(Wire):
    """Body of POST /v1/shadows."""

    alias: str = Field(pattern=ALIAS_PATTERN)
    version: str = Field(pattern=VERSION_PATTERN, description="The candidate: v3, or the beginning of its digest.")
    share: float = Field(
        gt=0, le=100, allow_inf_nan=False, description="How many percent of the alias's requests it gets a copy of."
    )


class ShadowObject(BaseModel):
    """A candidate that answers a copy of some of an alias's requests; nobody gets its answers."""

    id: str
    object: Literal["shadow"] = "shadow"
    alias: str
    version: str
    digest: str
    share: float
    state: Literal["running", "stopped"]
    created_at: int
    stopped_at: int | None


class ShadowMean(BaseModel):
    """A mean over requests that both have answered, with the bounds of its 95 % interval where there are some.

    The interval takes a user's requests for one observation, and is made for all looks at once.
    """

    mean: float
    low: float | None
    high: float | None


class ShadowDetail(ShadowObject):
    """A shadow and what came of it; differences are shadow minus live."""

    num_answered: int
    num_dropped: int = Field(description="Copies that the engine had no room or no time for.")
    num_failed: int
    num_kept: int = Field(description="Answers whose text is kept, since their conversation is.")
    num_units: int = Field(description="Users whose requests both have answered.")
    dropped_because: dict[str, int]
    failed_because: dict[str, int]
    same_share: ShadowMean | None = Field(description="The share of answers that equal the live one.")
    mean_overlap: float | None = Field(description="How many words the answers share, 0 to 1.")
    live_tokens: float | None
    shadow_tokens: float | None
    token_difference: ShadowMean | None
    cut_difference: ShadowMean | None = Field(description="Of the shares that ended at their limit of tokens.")


class ShadowList(BaseModel):
    """Shadows, the newest first."""

    object: Literal["list"] = "list"
    data: list[ShadowObject]


@router.get("/v1/shadows")
async def list_shadows(services: CurrentServices, limit: PageLimit = 20) -> ShadowList:
    """The newest shadows, the newest of them first."""
    found = await asyncio.to_thread(services.shadows.list, limit=limit)
    return ShadowList(data=[ShadowObject(**_fields(shadow)) for shadow in found])


@router.post("/v1/shadows", status_code=201)
async def start_shadow(body: ShadowRequest, services: CurrentServices) -> ShadowObject:
    """Have a version answer a copy of some of an alias's requests; 409 while another one does."""
    started = await asyncio.to_thread(services.shadows.start, body.alias, body.version, share=body.share)
    await services.shadow_keeper.reconcile()
    return ShadowObject(**_fields(started))


@router.get("/v1/shadows/{shadow}")
async def show_shadow(shadow: ShadowPath, services: CurrentServices) -> ShadowDetail:
    """One shadow, and its answers beside the live ones."""
    return _detail(await asyncio.to_thread(services.shadows.report, shadow))


@router.post("/v1/shadows/{shadow}/stop")
async def stop_shadow(shadow: ShadowPath, services: CurrentServices) -> ShadowObject:
    """End a shadow; what it has answered stays."""
    stopped = await asyncio.to_thread(services.shadows.stop, shadow)
    await services.shadow_keeper.reconcile()
    return ShadowObject(**_fields(stopped))


def _fields(shadow: Shadow) -> dict[str, Any]:
    return {
        "id": shadow.id,
        "alias": shadow.alias,
        "version": shadow.label,
        "digest": shadow.digest,
        "share": shadow.share,
        "state": shadow.state,
        "created_at": int(shadow.created_at.timestamp()),
        "stopped_at": None if shadow.stopped_at is None else int(shadow.stopped_at.timestamp()),
    }


def _detail(report: ShadowReport) -> ShadowDetail:
    return ShadowDetail(
        **_fields(report.shadow),
        num_answered=report.num_answered,
        num_dropped=report.num_dropped,
        num_failed=report.num_failed,
        num_kept=report.num_kept,
        num_units=report.num_units,
        dropped_because=report.dropped_because,
        failed_because=report.failed_because,
        same_share=_mean(report.same_share),
        mean_overlap=report.mean_overlap,
        live_tokens=report.live_tokens,
        shadow_tokens=report.shadow_tokens,
        token_difference=_mean(report.token_difference),
        cut_difference=_mean(report.cut_difference),
    )


def _mean(estimate: MeanEstimate | None) -> ShadowMean | None:
    if estimate is None:
        return None
    interval = estimate.interval
    return ShadowMean(
        mean=estimate.mean,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
    )
