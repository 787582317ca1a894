"""What the API answers, as typed records. Fields that a later server adds are ignored."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Adapter",
    "AdapterDetail",
    "Arm",
    "ArmReport",
    "Change",
    "Comparison",
    "Decision",
    "Deleted",
    "Effect",
    "Experiment",
    "ExperimentDetail",
    "Feedback",
    "Guardrail",
    "Health",
    "Holdout",
    "Imported",
    "Interval",
    "Margin",
    "Metric",
    "Moment",
    "NearPrompt",
    "Page",
    "Pins",
    "PrimaryMetric",
    "Probability",
    "Readiness",
    "Residency",
    "Route",
    "Split",
    "Treatment",
    "Unloaded",
    "Verdict",
    "Version",
    "VersionDetail",
]

_Item = TypeVar("_Item")


def _from_seconds(value: Any) -> Any:
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int) else value


Moment = Annotated[datetime, BeforeValidator(_from_seconds)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(_Record, Generic[_Item]):
    """A stretch of a list. `last_id` as the next call's `after` goes on where it ends, as long as `has_more`."""

    data: list[_Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Residency(_Record):
    """Where a version was about a second ago."""

    place: Literal["slot", "draining", "loading", "host", "store"]
    slot: int | None
    num_requests: int
    pinned: bool


class Version(_Record):
    """An immutable adapter version; `id` is the name to call it by: `legal@v2`."""

    id: str
    alias: str
    number: int
    digest: str
    base_fingerprint: str
    rank: int
    size_bytes: int
    source: str
    kind: str
    published_at: Moment
    metrics: dict[str, Any]
    residency: Residency | None


class VersionDetail(Version):
    """A version with its manifest: base model, alpha, targets, data, settings, hashes."""

    manifest: dict[str, Any]


class Imported(Version):
    """A version that was imported; `is_live` says whether its alias points to it."""

    is_live: bool


class Adapter(_Record):
    """An alias and the version that it points to."""

    id: str
    version: str
    updated_at: Moment
    num_versions: int
    experiment_id: str | None
    pinned: list[str]


class AdapterDetail(Adapter):
    """An alias with its present version in full, and its newest hundred versions."""

    current: VersionDetail
    versions: list[Version]


class Change(_Record):
    """One move of an alias."""

    id: int
    alias: str
    action: str
    from_version: str | None
    to_version: str
    changed_at: Moment


class Pins(_Record):
    """What is pinned of an alias."""

    id: str
    pinned: list[str]


class Unloaded(_Record):
    """A version that leaves its slot as soon as its last request has ended."""

    id: str
    digest: str


class Deleted(_Record):
    """The labels of what was deleted."""

    id: str
    versions: list[str]


class Arm(_Record):
    """One arm of an experiment; `weight` is its share in percent."""

    name: str
    version: str
    digest: str
    weight: float


class PrimaryMetric(_Record):
    """What decides an experiment, and in which direction it gets better."""

    name: str
    direction: Literal["increase", "decrease"]
    kind: Literal["share", "number"] = "number"


class Margin(_Record):
    """By how much a metric may get worse against the control; if `is_relative`, as a share of the control's mean."""

    metric: str
    direction: Literal["increase", "decrease"]
    margin: float
    is_relative: bool
    kind: Literal["share", "number"] = "number"


class Experiment(_Record):
    """A split of one alias between pinned versions."""

    id: str
    alias: str
    state: Literal["draft", "running", "stopped", "decided"]
    arms: list[Arm]
    salt: str
    traffic: float
    stage: int
    metric: PrimaryMetric | None
    guardrails: list[Margin]
    alpha: float
    smallest_effect: float | None
    planned_units: int | None
    analysis: Literal["sequential", "fixed"]
    allocation: Literal["fixed", "thompson"]
    auto_promote: bool
    auto_rollback: bool
    starts_at: Moment | None
    ends_at: Moment | None
    created_at: Moment
    stopped_at: Moment | None
    config_hash: str
    notes: list[str]


class Decision(_Record):
    """One act on an experiment, with the numbers that led to it."""

    id: int
    experiment: str
    stage: int
    made_at: Moment
    action: str
    by: str
    reason: str
    numbers: dict[str, Any]


class Holdout(_Record):
    """The percent of an alias's users that no experiment touches."""

    id: str
    percent: float


class Interval(_Record):
    """An estimate with its two-sided confidence interval; it holds at all looks at once."""

    estimate: float
    low: float
    high: float
    confidence: float


class Metric(_Record):
    """One metric in one arm, over users; `difference` is against the first arm.

    With the scale `ratio` the mean is a geometric one, and differences are relative: 0.1 is 10 % more.
    """

    metric: str
    role: Literal["primary", "guardrail", "other"]
    scale: Literal["share", "ratio", "number"]
    num_outcomes: int
    num_units: int
    num_missing: int
    mean: float
    interval: Interval | None
    difference: Interval | None


class ArmReport(Arm):
    """One arm and what came of it."""

    num_exposures: int
    num_units: int
    num_errors: int
    metrics: list[Metric]


class Comparison(_Record):
    """One metric of a treatment against the control."""

    metric: str
    direction: Literal["increase", "decrease"]
    scale: Literal["share", "ratio", "number"]
    difference: Interval | None


class Guardrail(Comparison):
    """A guardrail: held if worse than the margin is ruled out, breached if anything better is."""

    margin: float | None
    state: Literal["held", "breached", "open", "no_data", "no_variation"]


class Treatment(_Record):
    """A treatment against the control.

    `gaps` say how much more often its requests have a value of a metric at all, `feedback` any feedback.
    """

    arm: str
    version: str
    outcome: Literal["better", "worse", "equivalent", "open", "no_data"]
    primary: Comparison | None
    guardrails: list[Guardrail]
    gaps: list[Comparison]
    feedback: Comparison | None


class Split(_Record):
    """Users by arm against the weights in `stage`; `fired`: chance does not explain it, and nothing is promoted.

    `stages` are those in which it has fired and that nobody has accepted, `accepted` those that a person has.
    """

    counts: list[int]
    weights: list[float]
    p_value: float | None
    fired: bool
    stage: int
    stages: list[int]
    accepted: list[int]


class Verdict(_Record):
    """What the numbers allow, in one plain sentence; `arm` is the treatment that is meant."""

    kind: Literal["promote", "roll_back", "continue", "inconclusive"]
    arm: str | None
    sentence: str
    notes: list[str]
    next_step: str


class Effect(_Record):
    """The primary metric's effect after so many users of a treatment and the control."""

    arm: str
    num_units: int
    at: Moment
    interval: Interval


class ExperimentDetail(Experiment):
    """An experiment with what came of its present stage; `confidence` is that of every interval."""

    confidence: float
    verdict: Verdict
    report: list[ArmReport]
    treatments: list[Treatment]
    split: Split
    history: list[Effect]


class Shadow(_Record):
    """A candidate that answers a copy of `share` percent of an alias's requests."""

    id: str
    alias: str
    version: str
    digest: str
    share: float
    state: Literal["running", "stopped"]
    created_at: Moment
    stopped_at: Moment | None


class ShadowList(_Record):
    """Shadows, the newest first."""

    data: list[Shadow]


class ShadowMean(_Record):
    """A mean with the bounds of its 95 % interval, where there are some; it is made for all looks at once."""

    mean: float
    low: float | None
    high: float | None


class ShadowDetail(Shadow):
    """A shadow and what came of it; differences are shadow minus live, over the requests that both answered."""

    num_answered: int
    num_dropped: int
    num_failed: int
    num_kept: int
    num_units: int
    dropped_because: dict[str, int]
    failed_because: dict[str, int]
    same_share: ShadowMean | None
    mean_overlap: float | None
    live_tokens: float | None
    shadow_tokens: float | None
    token_difference: ShadowMean | None
    cut_difference: ShadowMean | None


class Feedback(_Record):
    """An outcome that was recorded for the response `id`."""

    id: str
    metric: str


class Probability(_Record):
    """How likely a request belongs to one alias, from 0 to 1."""

    alias: str
    probability: float


class NearPrompt(_Record):
    """A training prompt that is like a text; `similarity` is from 0 to 1."""

    alias: str
    text: str
    similarity: float


class Route(_Record):
    """Where a request for `auto` goes, and why. `nearest` is None without the scope `adapters` or `admin`."""

    alias: str
    route: str
    confidence: float | None
    threshold: float
    rule: str | None
    router: int | None
    reason: str
    probabilities: list[Probability]
    nearest: list[NearPrompt] | None


class Health(_Record):
    """The API process is alive."""

    status: str


class Readiness(_Record):
    """The engine takes requests; how busy it is."""

    status: str
    running: int
    waiting: int
    in_flight: int
    resident_versions: list[str]
