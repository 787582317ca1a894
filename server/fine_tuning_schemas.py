"""The wire of files and fine-tuning jobs, as OpenAI's clients send and read it. Unknown fields are errors."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from adapters.gate_report import GateReport
from adapters.records import Job, JobCheckpoint, JobEvent, StoredFile

__all__ = [
    "CheckpointsQuery",
    "CreateJobRequest",
    "DpoHyperparameters",
    "EventsQuery",
    "FilesQuery",
    "Hyperparameters",
    "JobsQuery",
    "RewardedHyperparameters",
    "SupervisedHyperparameters",
    "checkpoint_body",
    "event_body",
    "file_body",
    "job_body",
    "page_body",
]

_Auto = Literal["auto"]
_Id = Annotated[str, StringConstraints(min_length=1, max_length=80)]
_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^,]*$")]
_ModuleName = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$", max_length=200)]
_MAX_STEPS = 10_000_000
_MAX_SCHEMA_CHARS = 20_000
_VERSION_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}@(v[1-9][0-9]{0,8}|[0-9a-f]{8,64})$"


def _check_schema_length(value: Any) -> Any:
    length = len(value if isinstance(value, str) else json.dumps(value))
    if length > _MAX_SCHEMA_CHARS:
        raise ValueError(f"expected at most {_MAX_SCHEMA_CHARS} characters, found {length}")
    return value


_Schema = Annotated[
    dict[str, Any] | Annotated[str, StringConstraints(min_length=2)], AfterValidator(_check_schema_length)
]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(_Wire):
    """Those that every method has: the wire's, and knobs of `hotswap train`.

    "auto" or None is what the server is set to. `checkpoint_steps` is the distance between two checkpoints; without it
    there is one at the end of each epoch.
    """

    n_epochs: Annotated[int, Field(strict=True, ge=1, le=1000)] | _Auto = "auto"
    batch_size: Annotated[int, Field(strict=True, ge=1, le=1024)] | _Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(strict=True, gt=0, le=1000, allow_inf_nan=False)] | _Auto = "auto"
    learning_rate: float | None = Field(None, strict=True, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] | None = None
    max_steps: int | None = Field(None, strict=True, ge=1, le=_MAX_STEPS)
    gradient_accumulation: int | None = Field(None, strict=True, ge=1, le=1024)
    warmup_steps: int | None = Field(None, strict=True, ge=0, le=1_000_000)
    weight_decay: float | None = Field(None, strict=True, ge=0, le=1)
    rank: int | None = Field(None, strict=True, ge=1, le=256)
    alpha: float | None = Field(None, strict=True, gt=0, le=4096)
    rslora: StrictBool | None = None
    keep_prompts: StrictBool | None = None
    targets: Annotated[list[_ModuleName], Field(max_length=200)] | None = None
    init: Literal["default", "gaussian", "loftq"] | None = None
    max_length: int | None = Field(None, strict=True, ge=8, le=131_072)
    gradient_checkpointing: StrictBool | None = None
    eval_steps: int | None = Field(None, strict=True, ge=1, le=_MAX_STEPS)
    patience: int | None = Field(None, strict=True, ge=1, le=1000)
    promote: Literal["always", "gate", "never"] | None = None
    checkpoint_steps: int | None = Field(None, strict=True, ge=1, le=_MAX_STEPS)
    validation_share: float | None = Field(None, strict=True, gt=0, le=0.5)


class AnsweringHyperparameters(Hyperparameters):
    """Of methods whose versions answer: what the gate asks of the answers, which each domain knows for itself.

    A schema may be given as an object or as its text. Whether an expression or a schema is one is found out with the
    files: it fails the job.
    """

    gate_forgetting: float | None = Field(None, strict=True, ge=0, le=100)
    gate_format_regex: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    gate_format_schema: _Schema | None = None
    gate_format_share: float | None = Field(None, strict=True, ge=0, le=1)


class SupervisedHyperparameters(AnsweringHyperparameters):
    """Of supervised fine-tuning."""

    neftune: float | None = Field(None, strict=True, gt=0, le=100)
    dropout: float | None = Field(None, strict=True, ge=0, lt=1)


class DpoHyperparameters(AnsweringHyperparameters):
    """Of methods that hold the model to a reference: the version that it starts from, or the base model."""

    beta: Annotated[float, Field(strict=True, gt=0, le=2, allow_inf_nan=False)] | _Auto = "auto"
    reference: Literal["base", "start"] | None = None


class RewardedHyperparameters(DpoHyperparameters):
    """Of reinforcement by a reward version. A function is for the command line alone: no program comes by this way."""

    reward: Annotated[str, StringConstraints(pattern=_VERSION_NAME, max_length=130)]
    generations: int | None = Field(None, strict=True, ge=2, le=64)
    max_answer_tokens: int | None = Field(None, strict=True, ge=1, le=4096)
    temperature: float | None = Field(None, strict=True, gt=0, le=2)


class SupervisedMethod(_Wire):
    """Supervised fine-tuning."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DpoMethod(_Wire):
    """Direct preference optimisation, or KTO on labelled answers."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class RewardMethod(_Wire):
    """A reward version from preferences."""

    hyperparameters: Hyperparameters = Hyperparameters()


class RewardedMethod(_Wire):
    """Reinforcement by a reward version."""

    hyperparameters: RewardedHyperparameters


class Method(_Wire):
    """How to train. What belongs to a type that is not trained here is not looked into: the type is the error."""

    type: Annotated[str, StringConstraints(max_length=40)]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    kto: DpoMethod | None = None
    reward: RewardMethod | None = None
    rloo: RewardedMethod | None = None
    grpo: RewardedMethod | None = None
    reinforcement: dict[str, Any] | None = None


class WandbIntegration(_Wire):
    """Where Weights & Biases shows the run."""

    project: _Name
    name: _Name | None = None
    entity: _Name | None = None
    tags: Annotated[list[_Tag], Field(max_length=16)] | None = None


class Integration(_Wire):
    """A service that is told how the run goes on."""

    type: Literal["wandb"]
    wandb: WandbIntegration


class CreateJobRequest(_Wire):
    """A fine-tuning job. `hyperparameters` is the wire's older place for those of supervised training."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    training_file: _Id
    validation_file: _Id | None = None
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: int | None = Field(None, strict=True, ge=0, le=2**32 - 1)
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    priority: int = Field(0, strict=True, ge=-100, le=100)


class FilesQuery(_Wire):
    """Which page of the files."""

    after: _Id | None = None
    limit: int = Field(1000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, StringConstraints(max_length=40)] | None = None


class JobsQuery(_Wire):
    """Which page of the jobs; `metadata` holds what stands as `metadata[key]=value`."""

    after: _Id | None = None
    limit: int = Field(20, ge=1, le=100)
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] = {}


class EventsQuery(_Wire):
    """Which page of a job's events, or all of them as they happen."""

    after: _Id | None = None
    limit: int = Field(20, ge=1, le=100)
    stream: bool = False


class CheckpointsQuery(_Wire):
    """Which page of a job's checkpoints."""

    after: _Id | None = None
    limit: int = Field(10, ge=1, le=100)


def page_body(items: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """One page of a list."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}


def file_body(file: StoredFile) -> dict[str, Any]:
    """A file; it is kept only if it was found good, so it is always processed."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def job_body(job: Job, gate: GateReport | None) -> dict[str, Any]:
    """A job, and what the gate found about its version. Hyperparameters are as they were asked for, "auto" too."""
    chosen = job.method[job.method["type"]]["hyperparameters"]
    wire = ("n_epochs", "batch_size", "learning_rate_multiplier")
    error = job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at.timestamp()),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(job.estimated_finish),
        "status": job.status,
        "error": None if error is None else {"code": error.code, "message": error.message, "param": error.param},
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "hotswap",
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": job.trained_tokens,
        "hyperparameters": {name: chosen[name] for name in wire},
        "method": job.method,
        "seed": job.seed,
        "metadata": job.metadata,
        "integrations": [dict(integration) for integration in job.integrations],
        "priority": job.priority,
        "queue_position": job.queue_position,
        "gate": None if gate is None else {"verdict": gate.verdict, "reason": gate.reason, **gate.model_dump()},
    }


def event_body(event: JobEvent) -> dict[str, Any]:
    """Something that happened in a job."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at.timestamp()),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data,
    }


def checkpoint_body(checkpoint: JobCheckpoint) -> dict[str, Any]:
    """A checkpoint; `model` of a chat request knows the name in `fine_tuned_model_checkpoint` while it `is_kept`."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at.timestamp()),
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
        "is_kept": checkpoint.is_kept,
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
