"""From a request to a job in the table; what the wire allows and this server does not is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import secrets
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidInputError, InvalidNameError
from adapters.jobs import JobOrder, JobService, RequestIdentity
from adapters.methods import ROW_KINDS, WIRE_METHODS
from adapters.records import BASE_MODEL_NAME, Actor, Job, check_alias_name
from server.event_streams import EventStreams
from server.fine_tuning_schemas import (
    CreateJobRequest,
    DpoHyperparameters,
    Hyperparameters,
    SupervisedHyperparameters,
)

__all__ = ["FineTuningService"]

_NOT_TRAINED = ("reinforcement",)
# What a method is trained with when a request names its type alone; the others have something that must be given.
_DEFAULTS: Mapping[str, Hyperparameters] = {
    "supervised": SupervisedHyperparameters(),
    "dpo": DpoHyperparameters(),
    "kto": DpoHyperparameters(),
    "reward": Hyperparameters(),
}
_MAX_SEED = 2**31
_MAX_REQUEST_KEY_CHARS = 255


class FineTuningService:
    """Accepts jobs for one base model.

    Args:
        jobs: The job table.
        base_name: What the base model is called beside `base`.
        max_rank: Highest LoRA rank that this server could serve.
        streams: Who follows jobs at the moment, whoever it is.
    """

    def __init__(self, jobs: JobService, *, base_name: str, max_rank: int, streams: EventStreams | None = None) -> None:
        self.jobs = jobs
        self.streams = streams or EventStreams()
        self._base_name = base_name
        self._max_rank = max_rank

    def acting_for(self, actor: Actor) -> FineTuningService:
        """The same service on somebody's behalf."""
        return FineTuningService(
            self.jobs.acting_for(actor), base_name=self._base_name, max_rank=self._max_rank, streams=self.streams
        )

    def accept(self, body: CreateJobRequest, *, request_key: str | None = None) -> Job:
        """Take the job that a request asks for, or find the one that the same request has made.

        Args:
            body: The request.
            request_key: What the client calls it by, so that sending it again makes no second job.

        Raises:
            InvalidInputError: something that is not supported here, or a file that does not exist; names the field.
            AliasForbiddenError: the key is limited to other aliases than the suffix names.
            ConflictError: the client called another request by this key.
            OverloadedError: too many jobs are waiting.
        """
        kind, chosen = self._method(body)
        order = JobOrder(
            model=self._base_name,
            training_file=body.training_file,
            validation_file=body.validation_file,
            method={"type": kind, kind: {"hyperparameters": chosen.model_dump(exclude_none=True)}},
            seed=secrets.randbelow(_MAX_SEED) if body.seed is None else body.seed,
            alias=None if body.suffix is None else _check_suffix(body.suffix),
            metadata=body.metadata,
            row_kinds=ROW_KINDS[WIRE_METHODS[kind]],
            start_from=None if body.model in (BASE_MODEL_NAME, self._base_name) else body.model,
            priority=body.priority,
            reward=getattr(chosen, "reward", None),
            integrations=_integrations(body),
            identity=None if request_key is None else _identify(body, request_key),
        )
        return self.jobs.create(order)

    def _method(self, body: CreateJobRequest) -> tuple[str, Hyperparameters]:
        """The type of training, and its hyperparameters."""
        method = body.method
        if method is None:
            older = body.hyperparameters or SupervisedHyperparameters()
            return "supervised", self._check(older, body, "hyperparameters")
        if method.type not in WIRE_METHODS:
            raise InvalidInputError(
                f"method.type: {method.type!r} is not trained by this server; expected {', '.join(WIRE_METHODS)}",
                param="method.type",
            )
        if body.hyperparameters is not None:
            raise InvalidInputError(
                f"hyperparameters: belong into method.{method.type}; give them in one place", param="hyperparameters"
            )
        for name in (*WIRE_METHODS, *_NOT_TRAINED):
            if name != method.type and getattr(method, name) is not None:
                raise InvalidInputError(
                    f"method.{name}: does not belong to method.type {method.type!r}", param=f"method.{name}"
                )
        given = getattr(method, method.type)
        chosen = _DEFAULTS.get(method.type) if given is None else given.hyperparameters
        if chosen is None:
            raise InvalidInputError(
                f"method.{method.type}: expected hyperparameters with reward, the version that judges the answers",
                param=f"method.{method.type}",
            )
        return method.type, self._check(chosen, body, f"method.{method.type}.hyperparameters")

    def _check(self, chosen: Hyperparameters, body: CreateJobRequest, where: str) -> Hyperparameters:
        if chosen.learning_rate is not None and chosen.learning_rate_multiplier != "auto":
            raise InvalidInputError(
                f"{where}: expected learning_rate or learning_rate_multiplier, found both",
                param=f"{where}.learning_rate",
            )
        if chosen.rank is not None and chosen.rank > self._max_rank:
            raise InvalidInputError(
                f"{where}: rank {chosen.rank} is above {self._max_rank}, the highest that this server serves",
                param=f"{where}.rank",
            )
        if chosen.validation_share is not None and body.validation_file is not None:
            raise InvalidInputError(
                f"{where}: validation_share holds rows of training_file out, but validation_file is given to validate "
                "with: give one of both",
                param=f"{where}.validation_share",
            )
        if getattr(chosen, "reference", None) == "start" and body.model in (BASE_MODEL_NAME, self._base_name):
            raise InvalidInputError(
                f"{where}: reference start is the version that training goes on from, but model is the base model",
                param=f"{where}.reference",
            )
        return chosen


def _integrations(body: CreateJobRequest) -> tuple[dict[str, Any], ...]:
    """The services that are to be told of the run.

    Raises:
        InvalidInputError: the library that talks to one is not installed on this server.
    """
    for integration in body.integrations or ():
        if importlib.util.find_spec(integration.type) is None:
            raise InvalidInputError(
                f"integrations: {integration.type} is not installed on this server; install it beside Hotswap "
                f"(pip install {integration.type}), or leave the list empty",
                param="integrations",
            )
    return tuple(integration.model_dump(exclude_none=True) for integration in body.integrations or ())


def _identify(body: CreateJobRequest, request_key: str) -> RequestIdentity:
    if not 1 <= len(request_key) <= _MAX_REQUEST_KEY_CHARS:
        raise InvalidInputError(
            f"header idempotency-key: expected 1 to {_MAX_REQUEST_KEY_CHARS} characters, found {len(request_key)}",
            param="idempotency-key",
        )
    return RequestIdentity(request_key, hashlib.sha256(body.model_dump_json().encode()).hexdigest())


def _check_suffix(suffix: str) -> str:
    try:
        return check_alias_name(suffix)
    except InvalidNameError as error:
        raise InvalidInputError(f"suffix: {error}", param="suffix") from None
