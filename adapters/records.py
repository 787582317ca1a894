"""The nouns of Hotswap as plain immutable records, and the grammar of their names.

Read this file and you know the system. It knows neither SQL nor HTTP nor tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from adapters.errors import InvalidNameError, NotFoundError

__all__ = [
    "BASE_MODEL_NAME",
    "BUILT_IN_METRICS",
    "COMMAND_LINE",
    "EXPERIMENT_STATES",
    "SCOPES",
    "Actor",
    "AdapterVersion",
    "Alias",
    "AliasChange",
    "AnalysisPlan",
    "ApiKey",
    "Arm",
    "AuditAction",
    "AuditEntry",
    "Binding",
    "CheckpointName",
    "Decision",
    "DecisionAction",
    "Experiment",
    "ExperimentState",
    "Exposure",
    "Feedback",
    "Guardrail",
    "Job",
    "JobCheckpoint",
    "JobError",
    "JobEvent",
    "JobStatus",
    "KeyLimits",
    "Metric",
    "ModelName",
    "NumberedVersion",
    "Scope",
    "StoredFile",
    "Stretch",
    "Unit",
    "UnitSource",
    "VersionKind",
    "check_alias_name",
    "checkpoint_name",
    "parse_checkpoint_name",
    "parse_model_name",
    "version_name",
]

BASE_MODEL_NAME = "base"
_RESERVED_NAMES = frozenset({BASE_MODEL_NAME, "auto"})
_ALIAS_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NUMBER_PATTERN = re.compile(r"v([1-9][0-9]{0,8})")
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{8,64}")

_CHECKPOINT_PATTERN = re.compile(r"([^:@]+):([0-9a-f]{12}):ckpt-step-([1-9][0-9]{0,8})")
_JOB_PREFIX = "ftjob-"
_JOB_ID_CHARS = 12

Route = Literal["base", "alias", "version", "checkpoint", "experiment", "holdout", "rule", "router", "abstained"]
VersionKind = Literal["chat", "reward"]
ChangeAction = Literal["publish", "promote", "rollback"]
JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Scope = Literal["chat", "feedback", "train", "adapters", "experiments", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ExperimentState = Literal["draft", "running", "stopped", "decided"]
EXPERIMENT_STATES: tuple[ExperimentState, ...] = get_args(ExperimentState)
Direction = Literal["increase", "decrease"]
MetricKind = Literal["share", "number"]
UnitSource = Literal["user", "header", "conversation", "request"]
DecisionAction = Literal[
    "create",
    "start",
    "change_weights",
    "stop",
    "promote",
    "roll_back",
    "verdict",
    "accept_feedback",
    "accept_guardrail",
    "accept_split",
    "undo",
]
# What every exposure is measured by; any other metric is one that clients report as feedback.
BUILT_IN_METRICS = frozenset(
    {"error_rate", "ttft_ms", "total_ms", "completion_tokens", "length_finish_rate", "feedback_rate"}
)
Stretch = tuple[float, float]  # [low, high) of the positions from 0 to 100
AuditAction = Literal[
    "publish",
    "import",
    "promote",
    "rollback",
    "remove",
    "pin",
    "unpin",
    "unload",
    "create_experiment",
    "start_experiment",
    "change_weights",
    "stop_experiment",
    "decide_experiment",
    "accept_feedback",
    "accept_guardrail",
    "accept_split",
    "undo_decision",
    "set_holdout",
    "start_shadow",
    "stop_shadow",
    "create_key",
    "revoke_key",
    "create_job",
    "cancel_job",
    "pause_job",
    "resume_job",
    "delete_file",
    "set_prompts",
    "set_routing_rules",
    "rollback_router",
]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """Immutable LoRA weights and their manifest, named by the SHA-256 of their content.

    One of kind `reward` scores answers and writes none.
    """

    digest: str
    base_fingerprint: str
    rank: int
    size_bytes: int
    source: str
    published_at: datetime
    metrics: Mapping[str, Any] = field(default_factory=dict)
    kind: VersionKind = "chat"


@dataclass(frozen=True, slots=True)
class NumberedVersion:
    """One version under the name it was published for: `legal@v2`."""

    alias: str
    number: int
    version: AdapterVersion

    @property
    def label(self) -> str:
        """The name a client can call: `alias@vN`."""
        return f"{self.alias}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that a client calls, and the version that it points to."""

    name: str
    current: NumberedVersion
    updated_at: datetime
    num_versions: int
    experiment_id: str | None = None


@dataclass(frozen=True, slots=True)
class AliasChange:
    """One move of an alias; the list of them is its history."""

    alias: str
    action: ChangeAction
    from_number: int | None
    to_number: int
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of an experiment: a pinned version and its share of the units, in percent.

    `stretches` are the positions of its units; their lengths add up to its weight.
    """

    name: str
    number: int
    digest: str
    weight: float
    stretches: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured by unit, in which direction it gets better, and of which kind its values are.

    The kind is of what clients report: a `share` lies between 0 and 1, as yes and no do. Built-in ones have their own.
    """

    name: str
    direction: Direction
    kind: MetricKind = "number"


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A metric that may not get worse against the control by more than `margin`.

    The margin is in the metric's own unit; if `is_relative`, it is a share of the control's mean: 0.1 is 10 %. The
    kind is that of a `Metric`.
    """

    metric: str
    direction: Direction
    margin: float
    is_relative: bool = False
    kind: MetricKind = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisPlan:
    """How an experiment is read, fixed before its first exposure.

    `smallest_effect` is the least difference of the metric's means that matters. `planned_units` is what the
    intervals are made narrowest for; with `analysis` fixed, the number of units at which one looks, once.
    """

    metric: Metric | None = None
    guardrails: tuple[Guardrail, ...] = ()
    alpha: float = 0.05
    smallest_effect: float | None = None
    planned_units: int | None = None
    analysis: Literal["sequential", "fixed"] = "sequential"
    allocation: Literal["fixed", "thompson"] = "fixed"
    auto_promote: bool = False
    auto_rollback: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment(AnalysisPlan):
    """A split of one alias between pinned versions; the first arm is the control.

    Two positions of a unit decide: that on the alias says whether the unit is in the experiment, which has `stretches`
    there of `traffic` percent in all, and that by `salt` says which arm it gets. With every change of weights a new
    `stage` begins, from 1. The state is that of the moment of reading: `starts_at` and `ends_at` take effect by
    themselves.
    """

    id: str
    alias: str
    salt: str
    arms: tuple[Arm, ...]
    state: ExperimentState
    created_at: datetime
    traffic: float = 100.0
    stretches: tuple[Stretch, ...] = ()
    stage: int = 1
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    stopped_at: datetime | None = None
    config_hash: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One act on an experiment, with the numbers that led to it; the list of them only grows.

    `by` is the actor, `schedule` for a start or an end at its time, or what acted by itself.
    """

    id: int
    experiment_id: str
    stage: int
    made_at: datetime
    action: DecisionAction
    by: str
    reason: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Unit:
    """Whom experiments keep together: a user, or a conversation. `key` is a hash, `source` what it was made from."""

    key: str
    source: UnitSource


@dataclass(frozen=True, slots=True)
class Binding:
    """What answers one request, fixed at admission and kept to its last token. `digest` None means the base model.

    `confidence` is the router's, for what it chose. `forced` marks a tester's choice of the arm, which never counts.
    """

    alias: str
    route: Route
    digest: str | None = None
    number: int | None = None
    experiment_id: str | None = None
    arm: str | None = None
    checkpoint: str | None = None
    confidence: float | None = None
    stage: int | None = None
    forced: bool = False

    @property
    def version_label(self) -> str:
        """`alias@vN`, the name of a checkpoint, or `base`."""
        if self.checkpoint is not None:
            return self.checkpoint
        return self.alias if self.number is None else f"{self.alias}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Exposure:
    """One answered (or failed) request: what served it and how it went. Written whatever happens.

    `bound_at` is when it was bound to what answers it, by which users are ordered; None is the moment of writing.
    """

    response_id: str
    binding: Binding
    unit: str
    unit_source: UnitSource
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    total_ms: float
    finish_reason: str | None
    error: str | None
    bound_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """An outcome that a client reports for one response."""

    response_id: str
    metric: str
    value: float
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a client uploaded or a job made. `filename` is data: it is never part of a path.

    `kind` says what the rows of training data are; results have none.
    """

    id: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    created_at: datetime
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, as clients read it. `param` is the field of the request at fault, where there is one."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One training run. `method` is what the client asked for; `fine_tuned_model` is the label of what came of it.

    `model` is the base model's name, or the label of the version that training goes on from; `start_from` then names
    that version by its digest, `legal@<digest>`. A job with a higher `priority` is trained earlier; `queue_position` is
    its place among those that wait, from 1, and None for one that doesn't.
    """

    id: str
    status: JobStatus
    model: str
    alias: str
    training_file: str
    validation_file: str | None
    method: Mapping[str, Any]
    seed: int
    metadata: Mapping[str, str]
    created_at: datetime
    finished_at: datetime | None = None
    estimated_finish: datetime | None = None
    trained_tokens: int | None = None
    fine_tuned_model: str | None = None
    result_file: str | None = None
    error: JobError | None = None
    start_from: str | None = None
    priority: int = 0
    queue_position: int | None = None
    integrations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened in a job: a sentence, or the metrics of a step with their sentence."""

    id: str
    created_at: datetime
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """A state of a job at the end of a step, from which its training can go on.

    `name` is what `model` calls its adapter by, for as long as that `is_kept`.
    """

    id: str
    job_id: str
    step: int
    created_at: datetime
    metrics: Mapping[str, float]
    name: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may take; None is no limit. Tokens are those of prompts and answers."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key to the server, without its secret. `aliases` None means that it may use all of them."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    aliases: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)

    def is_valid(self, now: datetime) -> bool:
        """Whether the key opens anything at this moment."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class Actor:
    """On whose behalf the database is read or written: an API key's id, `local`, `job ftjob-...`, or `command line`.

    `aliases` None means that it sees all of them; to others those that are not named don't exist.
    """

    id: str
    request_id: str | None = None
    aliases: frozenset[str] | None = None

    def can_see(self, alias: str) -> bool:
        """Whether an alias of this name exists as far as this actor is concerned."""
        return self.aliases is None or alias in self.aliases


COMMAND_LINE = Actor("command line")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One administrative act: who did what to which name, and the HTTP request that asked for it, if one did."""

    acted_at: datetime
    actor: str
    action: AuditAction
    subject: str
    detail: Mapping[str, Any]
    request_id: str | None


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed model name: alias alone, alias with a version number, or alias with a digest prefix."""

    alias: str
    number: int | None = None
    digest_prefix: str | None = None


@dataclass(frozen=True, slots=True)
class CheckpointName:
    """The parsed name of a checkpoint: of the job for `alias` whose id begins with `job_prefix`, after `step` steps."""

    alias: str
    job_prefix: str
    step: int


def check_alias_name(name: str) -> str:
    """Return `name` if it may be an alias.

    Raises:
        InvalidNameError: the name is reserved or has other characters than the grammar allows.
    """
    if name in _RESERVED_NAMES:
        raise InvalidNameError(f"the name {name!r} is reserved", param="alias")
    if not _ALIAS_PATTERN.fullmatch(name):
        raise InvalidNameError(
            f"{name[:80]!r} is not an alias: expected 1 to 63 of a-z, 0-9, '.', '_', '-', starting with a letter "
            "or digit",
            param="alias",
        )
    return name


def parse_checkpoint_name(name: str) -> CheckpointName | None:
    """Split the name of a checkpoint into its parts; None for a name of any other kind.

    Raises:
        InvalidNameError: the alias breaks the grammar.
    """
    found = _CHECKPOINT_PATTERN.fullmatch(name)
    if found is None:
        return None
    alias, job, step = found.groups()
    return CheckpointName(check_alias_name(alias), f"{_JOB_PREFIX}{job}", int(step))


def checkpoint_name(alias: str, job_id: str, step: int) -> str:
    """What `model` calls the state of a job after a step: `legal:0f3c7a91b2de:ckpt-step-60`."""
    return f"{alias}:{job_id.removeprefix(_JOB_PREFIX)[:_JOB_ID_CHARS]}:ckpt-step-{step}"


def parse_model_name(name: str) -> ModelName:
    """Split `legal`, `legal@v2` or `legal@3fa2b1c9...` into its parts.

    Raises:
        InvalidNameError: the alias or what follows the @ breaks the grammar.
    """
    alias, at, version = name.partition("@")
    check_alias_name(alias)
    if not at:
        return ModelName(alias)
    if number := _NUMBER_PATTERN.fullmatch(version):
        return ModelName(alias, number=int(number.group(1)))
    if _DIGEST_PATTERN.fullmatch(version):
        return ModelName(alias, digest_prefix=version)
    raise InvalidNameError(
        f"{version[:80]!r} is not a version of {alias!r}: expected v1, v2, ... or at least 8 hex digits of a digest",
        param="model",
    )


def version_name(alias: str, version: str | None) -> str:
    """Join an alias and one of its versions to the name that everything shows: `legal` and `v2` are `legal@v2`.

    The version may be given with its alias, as `legal@v2`. Without one it is the alias's own name.

    Raises:
        NotFoundError: the version is given as another alias's.
    """
    if version is None:
        return alias
    owner, at, number = version.rpartition("@")
    if at and owner != alias:
        raise NotFoundError(f"{version[:80]!r} is no version of {alias[:80]!r}")
    return f"{alias}@{number}"
