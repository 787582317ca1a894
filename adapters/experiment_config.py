"""What an experiment may be asked to be: its fields as clients and files give them, and the rules between them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from adapters.assignment import RESERVED_SALTS
from adapters.errors import InvalidInputError
from adapters.experiment_metrics import is_share_metric
from adapters.records import BUILT_IN_METRICS, AnalysisPlan, Guardrail, Metric
from adapters.statistics import DEFAULT_PLANNED_UNITS

__all__ = [
    "ALIAS_PATTERN",
    "VERSION_PATTERN",
    "ArmConfig",
    "ExperimentConfig",
    "GuardrailConfig",
    "MetricConfig",
    "check_arms",
    "check_feedback_name",
    "check_feedback_value",
    "check_plan",
    "check_salt",
    "check_times",
    "check_traffic",
    "notes_on",
    "parse_arm",
    "parse_weight",
]

ALIAS_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
ARM_PATTERN = r"^[A-Za-z0-9]{1,32}$"
METRIC_PATTERN = r"^[a-zA-Z][a-zA-Z0-9_.-]{0,63}$"
VERSION_PATTERN = r"^([a-z0-9][a-z0-9._-]{0,62}@)?(v[1-9][0-9]{0,8}|[0-9a-f]{8,64})$"
_BETTER_LOW = ("error_rate", "ttft_ms", "total_ms", "length_finish_rate")  # of no use to anybody when higher
_MAX_ARMS = 16
_MAX_GUARDRAILS = 10
_MAX_SALT_CHARS = 64
_MIN_WEIGHT = 0.01
_LATEST = 253_402_300_799  # the end of the year 9999
_WEIGHT_TOLERANCE = 1e-6


def _to_moment(value: object) -> object:
    """Seconds since 1970 as a moment; anything else is left to be judged."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LATEST:
        return datetime.fromtimestamp(value, UTC)
    return value


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_to_moment, json_schema_input_type=Annotated[int, Field(ge=0, le=_LATEST)]),
]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ArmConfig(_Config):
    """One arm of an experiment."""

    name: str = Field(pattern=ARM_PATTERN, description="Letters and digits.")
    version: str = Field(
        pattern=VERSION_PATTERN,
        description="v1, v2, ..., or the beginning of a digest; with or without its alias: legal@v2.",
    )
    weight: float = Field(
        ge=_MIN_WEIGHT, le=100, allow_inf_nan=False, description="Share of the experiment's users, in percent."
    )


class MetricConfig(_Config):
    """What decides the experiment, and in which direction it gets better."""

    name: str = Field(pattern=METRIC_PATTERN, description="A built-in metric, or one that is reported as feedback.")
    direction: Literal["increase", "decrease"] = "increase"
    kind: Literal["share", "number"] = Field(
        "number", description="Of what clients report: `share` if every value lies between 0 and 1, as yes and no do."
    )


class GuardrailConfig(_Config):
    """A metric that may not get worse against the control by more than a margin."""

    metric: str = Field(pattern=METRIC_PATTERN)
    direction: Literal["increase", "decrease"] = Field("decrease", description="In which direction it gets better.")
    margin: float = Field(gt=0, le=1e12, allow_inf_nan=False, description="By how much it may get worse.")
    is_relative: bool = Field(False, description="Whether the margin is a share of the control's mean: 0.1 is 10 %.")
    kind: Literal["share", "number"] = Field(
        "number", description="Of what clients report: `share` if every value lies between 0 and 1, as yes and no do."
    )


class ExperimentConfig(_Config):
    """An experiment in full. Only the alias and the arms have to be given."""

    alias: str = Field(pattern=ALIAS_PATTERN, description="The alias to split.")
    arms: list[ArmConfig] = Field(
        min_length=2, max_length=_MAX_ARMS, description="The control first; weights add up to 100."
    )
    salt: str | None = Field(None, min_length=1, max_length=64, description="Decides who gets which arm; else random.")
    traffic: float = Field(
        100.0,
        ge=_MIN_WEIGHT,
        le=100,
        allow_inf_nan=False,
        description="Percent of the alias's users that are in the experiment.",
    )
    metric: MetricConfig | None = Field(None, description="The primary metric: what decides.")
    guardrails: list[GuardrailConfig] = Field([], max_length=_MAX_GUARDRAILS, description="What must not get worse.")
    alpha: float = Field(
        0.05, ge=0.0001, le=0.5, allow_inf_nan=False, description="Probability of seeing a difference where none is."
    )
    smallest_effect: float | None = Field(
        None, gt=0, le=1e12, allow_inf_nan=False, description="The least difference of means that matters."
    )
    planned_units: int | None = Field(None, ge=2, le=10**9, description="Users that are expected, in all arms.")
    analysis: Literal["sequential", "fixed"] = Field(
        "sequential", description="sequential: look whenever you like. fixed: look once, at `planned_units`."
    )
    allocation: Literal["fixed", "thompson"] = Field("fixed", description="Whether weights follow the better arm.")
    auto_promote: bool = Field(False, description="Whether the alias moves to a winner by itself.")
    auto_rollback: bool = Field(False, description="Whether a breached guardrail ends the experiment by itself.")
    starts_at: Moment | None = Field(None, description="When it starts by itself, in seconds since 1970.")
    ends_at: Moment | None = Field(None, description="When it ends by itself, in seconds since 1970.")

    def plan(self) -> AnalysisPlan:
        """How the experiment is to be read."""
        return AnalysisPlan(
            metric=None if self.metric is None else Metric(self.metric.name, self.metric.direction, self.metric.kind),
            guardrails=tuple(
                Guardrail(item.metric, item.direction, item.margin, item.is_relative, item.kind)
                for item in self.guardrails
            ),
            alpha=self.alpha,
            smallest_effect=self.smallest_effect,
            planned_units=self.planned_units,
            analysis=self.analysis,
            allocation=self.allocation,
            auto_promote=self.auto_promote,
            auto_rollback=self.auto_rollback,
        )

    def arm_tuples(self) -> list[tuple[str, str, float]]:
        """Name, version and weight of each arm."""
        return [(arm.name, arm.version, arm.weight) for arm in self.arms]


def parse_arm(text: str) -> tuple[str, str, float]:
    """Parse `A@v1=50`, or `A@legal@v1=50`, into name, version and weight in percent.

    Raises:
        InvalidInputError: the text has another shape.
    """
    name, version, weight = _split_arm(text)
    if not (name and version and weight):
        raise InvalidInputError(
            f"{text[:80]!r} is not an arm: expected NAME@VERSION=PERCENT, such as A@v1=50", param="arms"
        )
    return name, version, weight


def parse_weight(text: str) -> tuple[str, str | None, float]:
    """Parse `A=50`, or `C@v3=50` for a new arm, into name, version and weight in percent.

    Raises:
        InvalidInputError: the text has another shape.
    """
    name, version, weight = _split_arm(text)
    if not (name and weight) or version == "":
        raise InvalidInputError(
            f"{text[:80]!r} is no weight: expected NAME=PERCENT, such as A=50, or NAME@VERSION=PERCENT for a new arm",
            param="arms",
        )
    return name, version, weight


def _split_arm(text: str) -> tuple[str, str | None, float | None]:
    """Name, version (None without an @) and weight (None if it is no percentage)."""
    head, _, percent = text.partition("=")
    name, at, version = head.partition("@")
    try:
        weight = float(percent)
    except ValueError:
        weight = math.nan
    return name, version if at else None, weight if 0 < weight <= 100 else None


def check_arms(arms: Sequence[tuple[str, str | None, float]]) -> None:
    """Refuse arms that don't split anything, or not all of it.

    Raises:
        InvalidInputError: fewer than two or more than 16, a name twice or of other characters, or weights that don't
            add up to 100.
    """
    names = [name for name, _, _ in arms]
    if not 2 <= len(arms) <= _MAX_ARMS or len(set(names)) != len(names):
        raise InvalidInputError(
            f"expected two or more arms with different names, every one of them, at most {_MAX_ARMS}, found {names}",
            param="arms",
        )
    if not all(re.fullmatch(ARM_PATTERN, name) for name in names):
        raise InvalidInputError(f"arm names are 1 to 32 letters and digits, found {names}", param="arms")
    if not all(_MIN_WEIGHT <= weight <= 100 for _, _, weight in arms):  # false for NaN too
        found = [weight for *_, weight in arms]
        raise InvalidInputError(f"weights are from {_MIN_WEIGHT} to 100, found {found}", param="arms")
    total = sum(weight for _, _, weight in arms)
    if abs(total - 100) > _WEIGHT_TOLERANCE:
        raise InvalidInputError(f"the arms' weights must add up to 100, found {total:g}", param="arms")


def check_traffic(traffic: float) -> None:
    """Refuse a share that is none.

    Raises:
        InvalidInputError: not above 0 and up to 100.
    """
    if not _MIN_WEIGHT <= traffic <= 100:
        raise InvalidInputError(f"traffic is from {_MIN_WEIGHT} to 100 percent, found {traffic:g}", param="traffic")


def check_plan(plan: AnalysisPlan) -> None:
    """Refuse a plan that can't be followed.

    Raises:
        InvalidInputError: says which field asks for what.
    """
    if not 0.0001 <= plan.alpha <= 0.5:
        raise InvalidInputError(f"alpha is from 0.0001 to 0.5, found {plan.alpha:g}", param="alpha")
    if plan.analysis == "fixed" and plan.planned_units is None:
        raise InvalidInputError("a fixed analysis looks once, so planned_units must say when", param="planned_units")
    if plan.analysis == "fixed" and plan.allocation == "thompson":
        raise InvalidInputError(
            "thompson changes the weights every day, and each change begins the sample of a fixed analysis anew: "
            "expected analysis sequential, or allocation fixed",
            param="allocation",
        )
    if plan.metric is None and (plan.auto_promote or plan.allocation == "thompson"):
        param = "auto_promote" if plan.auto_promote else "allocation"
        raise InvalidInputError(f"{param} follows the metric, and none is given", param=param)
    _check_directions(plan)
    if plan.auto_rollback and not plan.guardrails:
        raise InvalidInputError("auto_rollback follows the guardrails, and none is given", param="auto_rollback")
    guarded = [guardrail.metric for guardrail in plan.guardrails]
    if len(set(guarded)) != len(guarded):
        raise InvalidInputError(f"expected one guardrail a metric, found {guarded}", param="guardrails")
    for guardrail in plan.guardrails:
        _check_guardrail(plan, guardrail)
    if not all(0 < guardrail.margin < math.inf for guardrail in plan.guardrails):
        raise InvalidInputError("the margin of a guardrail is above 0", param="guardrails")


def notes_on(plan: AnalysisPlan) -> list[str]:
    """What somebody who makes a plan may not have meant, in sentences; nothing of it is an error."""
    notes = []
    names = [*([plan.metric.name] if plan.metric else []), *(guardrail.metric for guardrail in plan.guardrails)]
    for name in dict.fromkeys(names):
        close = get_close_matches(name.lower(), sorted(BUILT_IN_METRICS), n=1)
        # a part of a name is too far off for the comparison: ttft, tokens
        close = close or [known for known in sorted(BUILT_IN_METRICS) if name.lower() in known.split("_")]
        if name not in BUILT_IN_METRICS and close:
            notes.append(
                f"{name!r} is no built-in metric, so it is taken as feedback that you report; did you mean "
                f"{close[0]!r}?"
            )
    if plan.metric is not None and plan.planned_units is None:
        notes.append(
            f"The plan has no planned_units: intervals are made narrowest at {DEFAULT_PLANNED_UNITS:,} users, and are "
            "wider than need be before. How many it takes: hotswap experiments power"
        )
    return notes


def _check_directions(plan: AnalysisPlan) -> None:
    named = [(item.metric, item.direction) for item in plan.guardrails]
    if plan.metric is not None:
        named.insert(0, (plan.metric.name, plan.metric.direction))
    for name, direction in named:
        if name in _BETTER_LOW and direction == "increase":
            raise InvalidInputError(
                f"{name!r} gets better as it gets lower: expected direction decrease, found increase", param="direction"
            )


def _check_guardrail(plan: AnalysisPlan, guardrail: Guardrail) -> None:
    if guardrail.is_relative and is_share_metric(guardrail.metric, guardrail.kind):
        raise InvalidInputError(
            f"a margin relative to the share {guardrail.metric!r} is nought where the control's is, and could never "
            "hold: give it in points, such as 0.01",
            param="guardrails",
        )
    if plan.metric is not None and plan.metric.name == guardrail.metric and plan.metric.kind != guardrail.kind:
        raise InvalidInputError(
            f"{guardrail.metric!r} is a {plan.metric.kind} as the metric and a {guardrail.kind} as a guardrail; "
            "expected one kind",
            param="guardrails",
        )


def check_salt(salt: str) -> None:
    """Refuse a salt that says something else already: who is in an experiment, or in none.

    Raises:
        InvalidInputError: it begins as those of an alias do, or is none or too long.
    """
    if not 1 <= len(salt) <= _MAX_SALT_CHARS or salt.startswith(RESERVED_SALTS):
        raise InvalidInputError(
            f"a salt has 1 to {_MAX_SALT_CHARS} characters and does not begin with "
            f"{' or '.join(map(repr, RESERVED_SALTS))}, found {salt[:80]!r}",
            param="salt",
        )


def check_feedback_value(plan: AnalysisPlan, metric: str, value: float) -> None:
    """Refuse a value that a metric of the plan can't have.

    Raises:
        InvalidInputError: the plan says that it is a share, and the value lies outside 0 to 1.
    """
    named = [(item.metric, item.kind) for item in plan.guardrails]
    if plan.metric is not None:
        named.append((plan.metric.name, plan.metric.kind))
    if (metric, "share") in named and not 0 <= value <= 1:
        raise InvalidInputError(
            f"{metric!r} is a share in this response's experiment: expected a value from 0 to 1, found {value:g}",
            param="value",
        )


def check_times(starts_at: datetime | None, ends_at: datetime | None, now: datetime) -> None:
    """Refuse times at which nothing can happen.

    Raises:
        InvalidInputError: the end is past, or not after the start.
    """
    if ends_at is not None and ends_at <= max(now, starts_at or now):
        raise InvalidInputError(
            f"ends_at must be after the start and ahead of now, found {ends_at:%Y-%m-%d %H:%M:%S} UTC", param="ends_at"
        )


def check_feedback_name(metric: str) -> None:
    """Refuse feedback under the name of what is measured anyway.

    Raises:
        InvalidInputError: the metric is built in.
    """
    if metric in BUILT_IN_METRICS:
        raise InvalidInputError(
            f"{metric!r} is measured by the server itself; report feedback under another name", param="metric"
        )
