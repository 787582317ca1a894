"""From a request to a job in the table; what the wire allows and this server does not is refused."""

from __future__ import annotations

import secrets
from typing import Any

from adapters.errors import InvalidInputError, InvalidNameError
from adapters.jobs import JobOrder, JobService
from adapters.records import BASE_MODEL_NAME, Actor, Job, check_alias_name
from server.fine_tuning_schemas import CreateJobRequest, Hyperparameters, SupervisedMethod

__all__ = ["FineTuningService"]

# The types whose trainers exist; another gets its own member of `Method` and its own settings in the trainer.
_TRAINED_METHODS = ("supervised",)
_MAX_SEED = 2**31


class FineTuningService:
    """Accepts jobs for one base model.

    Args:
        jobs: The job table.
        base_name: What the base model is called beside `base`.
        max_rank: Highest LoRA rank that this server could serve.
    """

    def __init__(self, jobs: JobService, *, base_name: str, max_rank: int) -> None:
        self.jobs = jobs
        self._base_name = base_name
        self._max_rank = max_rank

    def acting_for(self, actor: Actor) -> FineTuningService:
        """The same service on somebody's behalf."""
        return FineTuningService(self.jobs.acting_for(actor), base_name=self._base_name, max_rank=self._max_rank)

    def accept(self, body: CreateJobRequest) -> Job:
        """Queue the job that a request asks for.

        Raises:
            InvalidInputError: something that is not supported here, or a file that does not exist; names the field.
            AliasForbiddenError: the key is limited to other aliases than the suffix names.
            OverloadedError: too many jobs are waiting.
        """
        if body.model not in (BASE_MODEL_NAME, self._base_name):
            raise InvalidInputError(
                f"model: expected the base model, {BASE_MODEL_NAME!r} or {self._base_name!r}, found "
                f"{body.model[:80]!r}; training goes on from no adapter",
                param="model",
            )
        if body.integrations:
            raise InvalidInputError("integrations: none are supported; leave the list empty", param="integrations")
        hyperparameters = self._hyperparameters(body)
        order = JobOrder(
            model=self._base_name,
            training_file=body.training_file,
            validation_file=body.validation_file,
            method=_method(hyperparameters),
            seed=secrets.randbelow(_MAX_SEED) if body.seed is None else body.seed,
            alias=None if body.suffix is None else _check_suffix(body.suffix),
            metadata=body.metadata,
        )
        return self.jobs.create(order)

    def _hyperparameters(self, body: CreateJobRequest) -> Hyperparameters:
        method = body.method
        if method is not None and method.type not in _TRAINED_METHODS:
            raise InvalidInputError(
                f"method.type: {method.type!r} is not trained by this server; expected {', '.join(_TRAINED_METHODS)}",
                param="method.type",
            )
        if method is not None and body.hyperparameters is not None:
            raise InvalidInputError(
                "hyperparameters: stand in method.supervised already; give them in one place", param="hyperparameters"
            )
        for name, given in (("dpo", method and method.dpo), ("reinforcement", method and method.reinforcement)):
            if given is not None:
                raise InvalidInputError(
                    f"method.{name}: does not belong to method.type 'supervised'", param=f"method.{name}"
                )
        if method is None:
            return self._check(body.hyperparameters or Hyperparameters(), "hyperparameters")
        chosen = (method.supervised or SupervisedMethod()).hyperparameters
        return self._check(chosen, "method.supervised.hyperparameters")

    def _check(self, chosen: Hyperparameters, where: str) -> Hyperparameters:
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
        return chosen


def _method(chosen: Hyperparameters) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": chosen.model_dump(exclude_none=True)}}


def _check_suffix(suffix: str) -> str:
    try:
        return check_alias_name(suffix)
    except InvalidNameError as error:
        raise InvalidInputError(f"suffix: {error}", param="suffix") from None
