"""The wire of what OpenAI's API has no objects for: adapters, versions, their history, experiments.

Request bodies refuse unknown fields; moments are seconds since 1970, as in OpenAI's objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from adapters.experiment_config import (
    ALIAS_PATTERN,
    ARM_PATTERN,
    METRIC_PATTERN,
    VERSION_PATTERN,
    ExperimentConfig,
    GuardrailConfig,
    MetricConfig,
)
from adapters.manifest import Manifest
from adapters.paging import cut_page
from adapters.records import DecisionAction, ExperimentState, VersionKind

__all__ = [
    "ALIAS_PATTERN",
    "EXPERIMENT_PATTERN",
    "VERSION_PATTERN",
    "AcceptGuardrailRequest",
    "AcceptRequest",
    "AdapterDetail",
    "AdapterObject",
    "AfterNumber",
    "AliasPath",
    "ArmObject",
    "ChangeObject",
    "DecisionObject",
    "DeletedObject",
    "ExperimentObject",
    "ExperimentPath",
    "ExperimentRequest",
    "FeedbackObject",
    "HoldoutObject",
    "HoldoutRequest",
    "ImportedObject",
    "NearPromptObject",
    "Page",
    "PageLimit",
    "PinObject",
    "PinRequest",
    "ProbabilityObject",
    "PromoteRequest",
    "PromotionRequest",
    "ResidencyObject",
    "RollbackRequest",
    "RouteObject",
    "UnloadObject",
    "VersionDetail",
    "VersionObject",
    "VersionPath",
    "WeightsRequest",
    "make_page",
]

EXPERIMENT_PATTERN = r"^exp-[0-9a-f]{12}$"
_VERSION = "v1, v2, ..., or the beginning of a digest; with or without its alias: legal@v2."
_Item = TypeVar("_Item")

AliasPath = Annotated[str, Path(pattern=ALIAS_PATTERN, description="An alias.", examples=["legal"])]
VersionPath = Annotated[
    str,
    Path(pattern=VERSION_PATTERN, description=_VERSION, examples=["v2"]),
]
ExperimentPath = Annotated[
    str, Path(pattern=EXPERIMENT_PATTERN, description="An experiment's id.", examples=["exp-5b06e77e8b0a"])
]
PageLimit = Annotated[int, Query(ge=1, le=100, description="How many to return at most.")]
AfterNumber = Annotated[int, Query(ge=0, le=2**31 - 1, description="The number to go on behind; 0 is the beginning.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PromoteRequest(_Body):
    """Body of a promotion."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "v2"}]})
    version: str = Field(pattern=VERSION_PATTERN, description=_VERSION)


class PinRequest(_Body):
    """Body of pin, unpin and unload: one version, or without it the alias and whatever it points to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "v2"}, {}]})
    version: str | None = Field(None, pattern=VERSION_PATTERN, description=_VERSION)


class ExperimentRequest(ExperimentConfig):
    """Body of POST /v1/experiments."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "alias": "support",
                    "arms": [
                        {"name": "A", "version": "v1", "weight": 50},
                        {"name": "B", "version": "v2", "weight": 50},
                    ],
                    "metric": {"name": "solved", "direction": "increase"},
                    "guardrails": [{"metric": "error_rate", "direction": "decrease", "margin": 0.01}],
                }
            ]
        }
    )
    draft: bool = Field(False, description="Only write it down; POST .../start starts it.")


class WeightBody(_Body):
    """The share of one arm in the next stage."""

    name: str = Field(pattern=ARM_PATTERN, description="An arm that there is, or a new one.")
    weight: float = Field(ge=0.01, le=100, allow_inf_nan=False, description="Share of the users, in percent.")
    version: str | None = Field(None, pattern=VERSION_PATTERN, description=f"For a new arm: {_VERSION}")


class WeightsRequest(_Body):
    """Body of a change of weights. Arms that are not named leave the experiment."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"arms": [{"name": "A", "weight": 90}, {"name": "B", "weight": 10}]}]}
    )
    arms: list[WeightBody] = Field(min_length=2, max_length=16, description="The control first; weights add up to 100.")
    traffic: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="Percent of the alias's users; as it is if not given."
    )


class RollbackRequest(_Body):
    """Body of an experiment's rollback by hand."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"reason": "users complain"}]})
    reason: str | None = Field(
        None, min_length=1, max_length=1000, description="Why, for the log; else the verdict's sentence."
    )


class PromotionRequest(RollbackRequest):
    """Body of an experiment's promotion by hand."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"arm": "B"}]})
    arm: str | None = Field(
        None, pattern=ARM_PATTERN, description="The treatment; else the one that the verdict promotes."
    )


class AcceptRequest(_Body):
    """Body of a word that an experiment's arms may differ: in how often outcomes are known, or in their split."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "B's button is lower on the page"}]})
    reason: str = Field(min_length=1, max_length=1000, description="Why the difference is harmless, for the log.")


class AcceptGuardrailRequest(AcceptRequest):
    """Body of a word that a guardrail is no longer waited for."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"guardrail": "completion_tokens", "reason": "every answer is one token"}]}
    )
    guardrail: str = Field(pattern=METRIC_PATTERN, description="The guardrail's metric.")


class HoldoutRequest(_Body):
    """Body of PUT /v1/adapters/{alias}/holdout."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"percent": 5}]})
    percent: float = Field(ge=0, le=50, allow_inf_nan=False, description="Of the alias's users; 0 is no holdout.")


class Page(BaseModel, Generic[_Item]):
    """A stretch of a list; `after` with `last_id` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[_Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def make_page(items: Sequence[_Item], limit: int, id_of: Callable[[_Item], object]) -> Page[_Item]:
    """The first `limit` of what was read, one more than that if there is more; `id_of` names what `after` takes."""
    data, has_more = cut_page(items, limit)
    first, last = (str(id_of(data[0])), str(id_of(data[-1]))) if data else (None, None)
    return Page(data=data, first_id=first, last_id=last, has_more=has_more)


class ResidencyObject(BaseModel):
    """Where a version was about a second ago.

    `slot`: in this one, ready. `draining`: unloaded, but requests still run on it. `loading`: on its way. `host`: in
    the host's memory. `store`: on the disk alone.
    """

    place: Literal["slot", "draining", "loading", "host", "store"]
    slot: int | None = Field(description="Number of the slot that holds it.")
    num_requests: int = Field(description="Requests that run on it.")
    pinned: bool = Field(description="Whether it keeps its slot.")


class VersionObject(BaseModel):
    """An immutable adapter version under one alias."""

    id: str = Field(description="The name to call it by.", examples=["legal@v2"])
    object: Literal["adapter.version"] = "adapter.version"
    alias: str
    number: int
    digest: str = Field(description="SHA-256 of the manifest, which holds the hash of every file.")
    base_fingerprint: str
    rank: int
    size_bytes: int
    source: str
    kind: VersionKind = Field(description="chat, or reward: it scores answers for training and writes none.")
    published_at: int
    metrics: dict[str, Any]
    residency: ResidencyObject | None = Field(description="Null while there is no engine.")


class VersionDetail(VersionObject):
    """A version with its manifest."""

    manifest: Manifest


class AdapterObject(BaseModel):
    """An alias and the version that it points to."""

    id: str = Field(examples=["legal"])
    object: Literal["adapter"] = "adapter"
    version: str = Field(description="The version that answers.", examples=["legal@v2"])
    updated_at: int
    num_versions: int
    experiment_id: str | None = Field(description="The experiment that splits the alias at present.")
    pinned: list[str] = Field(
        description="Pins: the alias itself, which follows it, or versions of it.", examples=[["legal"]]
    )


class AdapterDetail(AdapterObject):
    """An alias with its present version in full, and its newest hundred versions."""

    current: VersionDetail
    versions: list[VersionObject] = Field(description="The newest first, at most 100.")


class ImportedObject(VersionObject):
    """A version that was imported."""

    is_live: bool = Field(description="Whether the alias points to it.")


class ChangeObject(BaseModel):
    """One move of an alias."""

    id: int = Field(description="Its place in the history, from 1.")
    object: Literal["adapter.change"] = "adapter.change"
    alias: str
    action: str
    from_version: str | None
    to_version: str
    changed_at: int


class PinObject(BaseModel):
    """What is pinned of an alias, after a change."""

    id: str
    object: Literal["adapter.pins"] = "adapter.pins"
    pinned: list[str]


class UnloadObject(BaseModel):
    """A version that leaves its slot as soon as its last request has ended."""

    id: str
    object: Literal["adapter.unload"] = "adapter.unload"
    digest: str


class DeletedObject(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["adapter.deleted"] = "adapter.deleted"
    deleted: Literal[True] = True
    versions: list[str]


class FeedbackObject(BaseModel):
    """An outcome that was recorded."""

    id: str = Field(description="The response's id.")
    object: Literal["feedback"] = "feedback"
    metric: str


class ProbabilityObject(BaseModel):
    """How likely a request belongs to one alias, from 0 to 1."""

    alias: str
    probability: float


class NearPromptObject(BaseModel):
    """A training prompt that is like a text; `similarity` is from 0 to 1, by the words that they share."""

    alias: str
    text: str
    similarity: float


class RouteObject(BaseModel):
    """Where a request for `auto` goes, and why."""

    object: Literal["route"] = "route"
    alias: str = Field(description="What answers; base where the router abstains.", examples=["legal"])
    route: Literal["rule", "router", "abstained"]
    confidence: float | None = Field(description="Probability of the alias; of the likeliest where it abstains.")
    threshold: float = Field(description="The least probability by which an alias is chosen.")
    rule: str | None = Field(description="The rule that decided.")
    router: int | None = Field(description="Number of the router at present.")
    reason: str
    probabilities: list[ProbabilityObject] = Field(description="The likeliest first; what they lack of 1 is of none.")
    nearest: list[NearPromptObject] | None = Field(description="Null for keys without the scope adapters or admin.")


class ArmObject(BaseModel):
    """One arm of an experiment."""

    name: str
    version: str
    digest: str
    weight: float


class ExperimentObject(BaseModel):
    """A split of one alias between pinned versions."""

    id: str
    object: Literal["experiment"] = "experiment"
    alias: str
    state: ExperimentState
    arms: list[ArmObject] = Field(description="Those of the present stage; the first is the control.")
    salt: str
    traffic: float = Field(description="Percent of the alias's users that are in the experiment.")
    stage: int = Field(description="Counts the changes of weights, from 1.")
    metric: MetricConfig | None
    guardrails: list[GuardrailConfig]
    alpha: float
    smallest_effect: float | None
    planned_units: int | None
    analysis: Literal["sequential", "fixed"]
    allocation: Literal["fixed", "thompson"]
    auto_promote: bool
    auto_rollback: bool
    starts_at: int | None
    ends_at: int | None
    created_at: int
    stopped_at: int | None
    config_hash: str = Field(description="SHA-256 of what decides who gets what and how it is read.")
    notes: list[str] = Field(
        description="What may be a slip in the plan; as the answer to `weights` and `undo` also what a stage that is "
        "not the first leaves out of the verdict."
    )


class DecisionObject(BaseModel):
    """One act on an experiment, with the numbers that led to it."""

    id: int
    object: Literal["experiment.decision"] = "experiment.decision"
    experiment: str
    stage: int
    made_at: int
    action: DecisionAction
    by: str = Field(description="A key, `local`, `command line`, `schedule`, or what acted by itself.")
    reason: str
    numbers: dict[str, Any]


class HoldoutObject(BaseModel):
    """The users of an alias that no experiment touches."""

    id: str = Field(description="The alias.")
    object: Literal["adapter.holdout"] = "adapter.holdout"
    percent: float
