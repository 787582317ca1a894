"""The database's tables. Only the services of this package read or write them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    TypeDecorator,
    false,
    text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "KIND_KEY",
    "AliasChangeRow",
    "AliasRow",
    "AliasVersionRow",
    "ApiKeyRow",
    "ArmRow",
    "AuditRow",
    "ConversationRow",
    "DecisionRow",
    "ExperimentRow",
    "ExposureRow",
    "FeedbackRow",
    "FileRow",
    "JobCheckpointRow",
    "JobEventRow",
    "JobRow",
    "PinRow",
    "RouterMoveRow",
    "RouterRow",
    "RoutingPromptsRow",
    "RoutingRulesRow",
    "ShadowAnswerRow",
    "ShadowRow",
    "Table",
    "VersionRow",
    "utc_now",
]

KIND_KEY = "kind"


def utc_now() -> datetime:
    """The present moment with its time zone."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets the time zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach UTC to what the database returned."""
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    """Base class of all rows."""


class VersionRow(Table):
    """An immutable adapter version; its files lie in the store under the digest."""

    __tablename__ = "versions"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    base_fingerprint: Mapped[str] = mapped_column(String(64))
    rank: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(Integer)
    source: Mapped[str] = mapped_column(String(16))
    published_at: Mapped[datetime] = mapped_column(UtcDateTime)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)

    @property
    def kind(self) -> Literal["chat", "reward"]:
        """Kept among the metrics of a version that is not for chat; no metric is called so."""
        return "reward" if self.metrics.get(KIND_KEY) == "reward" else "chat"


class AliasVersionRow(Table):
    """Version N of an alias. Rows are added and removed, never changed."""

    __tablename__ = "alias_versions"
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(ForeignKey("versions.digest"), index=True)


class AliasRow(Table):
    """Where an alias points; promote and rollback change exactly this row.

    A removed alias stays with `number` None, so that its version numbers are never given to other content. `holdout` is
    the percent of its units that no experiment touches.
    """

    __tablename__ = "aliases"
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int | None] = mapped_column(Integer)
    last_number: Mapped[int] = mapped_column(Integer)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    holdout: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")


class AliasChangeRow(Table):
    """One move of an alias; append-only."""

    __tablename__ = "alias_changes"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), index=True)
    action: Mapped[str] = mapped_column(String(16))
    from_number: Mapped[int | None] = mapped_column(Integer)
    to_number: Mapped[int] = mapped_column(Integer)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class PinRow(Table):
    """A version that every server keeps in a slot. `number` 0 is whichever version the alias points to."""

    __tablename__ = "pins"
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    pinned_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ExperimentRow(Table):
    """A split of one alias. `state` is what was last written: what `starts_at` and `ends_at` make of it is computed.

    `stretches` are its places among the alias's units, from the moment that it is started or scheduled. `plan` is an
    `AnalysisPlan`.
    """

    __tablename__ = "experiments"
    __table_args__ = (Index("experiments_of_alias", "alias", "state"),)
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63))
    salt: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    stopped_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    traffic: Mapped[float] = mapped_column(Float)
    stretches: Mapped[list[list[float]] | None] = mapped_column(JSON(none_as_null=True))
    stage: Mapped[int] = mapped_column(Integer)
    starts_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ends_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)


class ArmRow(Table):
    """One arm of one stage of an experiment; `position` keeps the order in which arms were given. Never changed."""

    __tablename__ = "stage_arms"
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiments.id"), primary_key=True)
    stage: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(32))
    number: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64))
    weight: Mapped[float] = mapped_column(Float)
    stretches: Mapped[list[list[float]]] = mapped_column(JSON)


class DecisionRow(Table):
    """One act on an experiment, with its numbers; append-only."""

    __tablename__ = "decisions"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiments.id"), index=True)
    stage: Mapped[int] = mapped_column(Integer)
    made_at: Mapped[datetime] = mapped_column(UtcDateTime)
    action: Mapped[str] = mapped_column(String(32))
    by: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(String(1000))
    numbers: Mapped[dict[str, Any]] = mapped_column(JSON)


class ExposureRow(Table):
    """One request that was bound to what answers it, and how it ended. `forced` ones count in no experiment."""

    __tablename__ = "exposures"
    __table_args__ = (Index("exposures_of_stage", "experiment_id", "stage", "arm", "unit"),)
    response_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    served_at: Mapped[datetime] = mapped_column(UtcDateTime)
    alias: Mapped[str] = mapped_column(String(63), index=True)
    route: Mapped[str] = mapped_column(String(16))
    number: Mapped[int | None] = mapped_column(Integer)
    digest: Mapped[str | None] = mapped_column(String(64))
    experiment_id: Mapped[str | None] = mapped_column(String(32))
    arm: Mapped[str | None] = mapped_column(String(32))
    stage: Mapped[int | None] = mapped_column(Integer)
    forced: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    confidence: Mapped[float | None] = mapped_column(Float)
    unit: Mapped[str] = mapped_column(String(64))
    unit_source: Mapped[str] = mapped_column(String(16))
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    ttft_ms: Mapped[float | None] = mapped_column(Float)
    total_ms: Mapped[float] = mapped_column(Float)
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    error: Mapped[str | None] = mapped_column(String(500))


class FeedbackRow(Table):
    """An outcome for one response; the latest value for a metric replaces the one before."""

    __tablename__ = "feedback"
    response_id: Mapped[str] = mapped_column(ForeignKey("exposures.response_id"), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    comment: Mapped[str | None] = mapped_column(String(2000))
    reported_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ConversationRow(Table):
    """What was asked and answered under one response's id; kept for a while, where the operator wants it.

    `prompt_sha256` is the same for the same messages and tools.
    """

    __tablename__ = "conversations"
    __table_args__ = (Index("conversations_by_age", "kept_at", "size_bytes"),)
    response_id: Mapped[str] = mapped_column(ForeignKey("exposures.response_id"), primary_key=True)
    kept_at: Mapped[datetime] = mapped_column(UtcDateTime)
    size_bytes: Mapped[int] = mapped_column(Integer)
    prompt_sha256: Mapped[str] = mapped_column(String(64))
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    tools: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    answers: Mapped[list[dict[str, Any]]] = mapped_column(JSON)


class ShadowRow(Table):
    """A version that answers a sampled copy of an alias's requests; the partial index allows one running an alias."""

    __tablename__ = "shadows"
    __table_args__ = (
        Index(
            "one_running_shadow_per_alias",
            "alias",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), index=True)
    number: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64))
    share: Mapped[float] = mapped_column(Float)
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    stopped_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ShadowAnswerRow(Table):
    """One copy of a live request, and how it ended beside the live answer. `answer` is there where that is kept."""

    __tablename__ = "shadow_answers"
    response_id: Mapped[str] = mapped_column(ForeignKey("exposures.response_id"), primary_key=True)
    shadow_id: Mapped[str] = mapped_column(ForeignKey("shadows.id"), index=True)
    made_at: Mapped[datetime] = mapped_column(UtcDateTime)
    outcome: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(500))
    live_tokens: Mapped[int] = mapped_column(Integer)
    live_finish: Mapped[str] = mapped_column(String(32))
    tokens: Mapped[int] = mapped_column(Integer)
    finish: Mapped[str | None] = mapped_column(String(32))
    is_same: Mapped[bool | None] = mapped_column(Boolean)
    overlap: Mapped[float | None] = mapped_column(Float)
    answer: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class ApiKeyRow(Table):
    """One API key, without its secret: the database holds the secret's hash alone. Rows are never deleted."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    aliases: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    tokens_per_minute: Mapped[int | None] = mapped_column(Integer)
    max_concurrent: Mapped[int | None] = mapped_column(Integer)


class AuditRow(Table):
    """One administrative act; append-only."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    acted_at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)
    request_id: Mapped[str | None] = mapped_column(String(64))


class FileRow(Table):
    """An uploaded or made file; its content lies in the home folder under its id. `sequence` orders by arrival."""

    __tablename__ = "files"
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    kind: Mapped[str | None] = mapped_column(String(16))
    owner: Mapped[str | None] = mapped_column(String(64))
    alias: Mapped[str | None] = mapped_column(String(63))


class JobRow(Table):
    """One training run. Clients write `status` (cancel, pause, resume), the holder of `claim` writes the rest.

    `claim` names one attempt, on `device`; it is held until `lease_until`, which its holder keeps moving on.
    `request_key` is what the client `owner` called its request by, so that the same request makes one job alone;
    `request_sha256` is what it asked for.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("one_job_per_request", "owner", "request_key", unique=True),)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    status: Mapped[str] = mapped_column(String(20), index=True)
    model: Mapped[str] = mapped_column(String(255))
    alias: Mapped[str] = mapped_column(String(63))
    training_file: Mapped[str] = mapped_column(String(40), index=True)
    validation_file: Mapped[str | None] = mapped_column(String(40))
    method: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    estimated_finish: Mapped[datetime | None] = mapped_column(UtcDateTime)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(80))
    result_file: Mapped[str | None] = mapped_column(String(40))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    claim: Mapped[str | None] = mapped_column(String(40))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    num_attempts: Mapped[int] = mapped_column(Integer)
    device: Mapped[str | None] = mapped_column(String(120))
    is_validated: Mapped[bool] = mapped_column(Boolean, server_default=true())
    priority: Mapped[int] = mapped_column(Integer, server_default="0")
    start_from: Mapped[str | None] = mapped_column(String(130))
    integrations: Mapped[list[dict[str, Any]]] = mapped_column(JSON, server_default="[]")
    owner: Mapped[str | None] = mapped_column(String(64))
    request_key: Mapped[str | None] = mapped_column(String(255))
    request_sha256: Mapped[str | None] = mapped_column(String(64))


class JobEventRow(Table):
    """What happened in a job, in the order of `sequence`; append-only."""

    __tablename__ = "job_events"
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    level: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(2000))
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class JobCheckpointRow(Table):
    """A state of a job that training can go on from; its files lie in the job's folder under the step.

    `digest` is its adapter in the store, for as long as that is kept; such a version has no number.
    """

    __tablename__ = "job_checkpoints"
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    step: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    metrics: Mapped[dict[str, float]] = mapped_column(JSON)
    digest: Mapped[str | None] = mapped_column(String(64), index=True)


class RoutingPromptsRow(Table):
    """Some of the prompts that a version was trained on, for the router; never of one that shall not keep any."""

    __tablename__ = "routing_prompts"
    digest: Mapped[str] = mapped_column(ForeignKey("versions.digest"), primary_key=True)
    prompts: Mapped[list[str]] = mapped_column(JSON)
    sha256: Mapped[str] = mapped_column(String(64))
    kept_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RouterRow(Table):
    """One trained router. Rows are never changed, but for `content`, which only the newest ones keep."""

    __tablename__ = "routers"
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    sources: Mapped[dict[str, Any]] = mapped_column(JSON)
    content: Mapped[bytes | None] = mapped_column(LargeBinary)
    trained_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RouterMoveRow(Table):
    """Which router counts from here on, the latest row being the present; append-only.

    `sources_sha256` is what there was to be trained from then: nothing is trained until that changes, so that a
    rollback lasts. Without a number nothing is routed by learning.
    """

    __tablename__ = "router_moves"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    action: Mapped[str] = mapped_column(String(16))
    number: Mapped[int | None] = mapped_column(ForeignKey("routers.number"))
    sources_sha256: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(String(500))
    moved_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RoutingRulesRow(Table):
    """All rules in order, as a whole; the latest row counts. Append-only."""

    __tablename__ = "routing_rules"
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    rules: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    made_at: Mapped[datetime] = mapped_column(UtcDateTime)
