"""Every call of the API as a value: method, path, body, and how its answer is read. Knows no connection.

Both clients of `sdk` send the same calls; only how they wait differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from clients import results
from clients.errors import UnexpectedAnswerError

__all__ = [
    "ArmSpec",
    "Call",
    "ExperimentSpec",
    "GuardrailSpec",
    "WeightSpec",
    "accept_feedback",
    "accept_guardrail",
    "accept_split",
    "change_weights",
    "create_experiment",
    "delete",
    "export_path",
    "feedback",
    "health",
    "holdout",
    "list_adapters",
    "list_changes",
    "list_decisions",
    "list_experiments",
    "list_versions",
    "pin",
    "promote",
    "promote_arm",
    "readiness",
    "roll_back",
    "rollback",
    "route",
    "set_holdout",
    "show_adapter",
    "show_experiment",
    "show_version",
    "start_experiment",
    "stop_experiment",
    "undo_decision",
    "unload",
    "unpin",
    "upload",
]

_Result = TypeVar("_Result", bound=BaseModel)
_UPLOADED = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "manifest": "manifest.json",
}
_OPTIONAL = "manifest"


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One arm of an experiment to be started: its name, a version, its share in percent."""

    name: str
    version: str
    weight: float


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """The share of one arm in the next stage; a new arm has a version."""

    name: str
    weight: float
    version: str | None = None


@dataclass(frozen=True, slots=True)
class GuardrailSpec:
    """A metric that may not get worse against the control by more than `margin`, or by that share if `is_relative`."""

    metric: str
    margin: float
    direction: Literal["increase", "decrease"] = "decrease"
    is_relative: bool = False
    kind: Literal["share", "number"] = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSpec:
    """All that an experiment may be told beside its alias and arms; the server's documentation has each field."""

    salt: str | None = None
    traffic: float = 100.0
    metric: str | None = None
    direction: Literal["increase", "decrease"] = "increase"
    kind: Literal["share", "number"] = "number"
    guardrails: Sequence[GuardrailSpec] = ()
    alpha: float = 0.05
    smallest_effect: float | None = None
    planned_units: int | None = None
    analysis: Literal["sequential", "fixed"] = "sequential"
    allocation: Literal["fixed", "thompson"] = "fixed"
    auto_promote: bool = False
    auto_rollback: bool = False
    starts_at: datetime | None = None
    ends_at: datetime | None = None

    def body(self) -> dict[str, Any]:
        """The fields as the API takes them."""
        fields = asdict(self)
        direction, kind = fields.pop("direction"), fields.pop("kind")
        moments = {name: fields[name] and int(fields[name].timestamp()) for name in ("starts_at", "ends_at")}
        metric = None if self.metric is None else {"name": self.metric, "direction": direction, "kind": kind}
        return fields | moments | {"metric": metric, "guardrails": [asdict(item) for item in self.guardrails]}


@dataclass(frozen=True, slots=True)
class Call(Generic[_Result]):
    """One request, to be sent as often as retries need."""

    result: type[_Result]
    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    form: dict[str, str] | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @contextmanager
    def options(self) -> Iterator[dict[str, Any]]:
        """What httpx sends; files are open inside the block, from their beginning."""
        with ExitStack() as stack:
            given: dict[str, Any] = {"params": {key: value for key, value in self.params.items() if value is not None}}
            if self.body is not None:
                given["json"] = self.body
            if self.form is not None:
                given["data"] = self.form
                given["files"] = {name: stack.enter_context(path.open("rb")) for name, path in self.files.items()}
            yield given

    def read(self, response: httpx.Response) -> _Result:
        """The answer as a record.

        Raises:
            UnexpectedAnswerError: it has another shape.
        """
        try:
            return self.result.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise UnexpectedAnswerError(
                f"{self.method} {self.path}: {where} of the answer is not as expected: {first['msg']}",
                status=response.status_code,
                code=None,
                request_id=response.headers.get("x-request-id"),
            ) from None


def health() -> Call[results.Health]:
    """GET /health."""
    return Call(results.Health, "GET", "/health")


def readiness() -> Call[results.Readiness]:
    """GET /ready."""
    return Call(results.Readiness, "GET", "/ready")


def feedback(response_id: str, metric: str, value: float, comment: str | None) -> Call[results.Feedback]:
    """POST /v1/feedback."""
    body = {"id": response_id, "metric": metric, "value": value, "comment": comment}
    return Call(results.Feedback, "POST", "/v1/feedback", body=body)


def route(
    text: str | None, messages: Sequence[Mapping[str, str]] | None, metadata: Mapping[str, str] | None
) -> Call[results.Route]:
    """POST /v1/route."""
    given = {"input": text, "messages": messages, "metadata": metadata}
    return Call(results.Route, "POST", "/v1/route", body={name: v for name, v in given.items() if v is not None})


def list_adapters(after: str | None, limit: int) -> Call[results.Page[results.Adapter]]:
    """GET /v1/adapters."""
    return Call(results.Page[results.Adapter], "GET", "/v1/adapters", {"after": after, "limit": limit})


def show_adapter(alias: str) -> Call[results.AdapterDetail]:
    """GET /v1/adapters/{alias}."""
    return Call(results.AdapterDetail, "GET", _adapter(alias))


def delete(alias: str, version: str | None) -> Call[results.Deleted]:
    """DELETE /v1/adapters/{alias}, or of one version DELETE /v1/adapters/{alias}/versions/{version}."""
    alias, version = _split(alias, version)
    path = _adapter(alias) if version is None else _version(alias, version)
    return Call(results.Deleted, "DELETE", path)


def list_changes(alias: str, after: int, limit: int) -> Call[results.Page[results.Change]]:
    """GET /v1/adapters/{alias}/history."""
    params = {"after": after, "limit": limit}
    return Call(results.Page[results.Change], "GET", _adapter(alias, "history"), params)


def list_versions(alias: str, after: int, limit: int) -> Call[results.Page[results.Version]]:
    """GET /v1/adapters/{alias}/versions."""
    params = {"after": after, "limit": limit}
    return Call(results.Page[results.Version], "GET", _adapter(alias, "versions"), params)


def show_version(alias: str, version: str | None) -> Call[results.VersionDetail]:
    """GET /v1/adapters/{alias}/versions/{version}."""
    return Call(results.VersionDetail, "GET", _version(alias, version))


def export_path(alias: str, version: str | None) -> str:
    """The path of GET /v1/adapters/{alias}/versions/{version}/export."""
    return f"{_version(alias, version)}/export"


def upload(source: Path | str, alias: str, promote: bool) -> Call[results.Imported]:
    """POST /v1/adapters; of a folder the manifest goes along if there is one, an archive goes as it is.

    Raises:
        FileNotFoundError: there is no such folder or archive, or a file is missing in it.
    """
    form = {"alias": alias, "promote": "true" if promote else "false"}
    return Call(results.Imported, "POST", "/v1/adapters", form=form, files=_files_of(Path(source)))


def promote(alias: str, version: str | None) -> Call[results.Adapter]:
    """POST /v1/adapters/{alias}/promote."""
    alias, version = _split(alias, version)
    return Call(results.Adapter, "POST", _adapter(alias, "promote"), body={"version": _given(alias, version)})


def rollback(alias: str) -> Call[results.Adapter]:
    """POST /v1/adapters/{alias}/rollback."""
    return Call(results.Adapter, "POST", _adapter(alias, "rollback"))


def pin(alias: str, version: str | None) -> Call[results.Pins]:
    """POST /v1/adapters/{alias}/pin."""
    alias, version = _split(alias, version)
    return Call(results.Pins, "POST", _adapter(alias, "pin"), body={"version": version})


def unpin(alias: str, version: str | None) -> Call[results.Pins]:
    """POST /v1/adapters/{alias}/unpin."""
    alias, version = _split(alias, version)
    return Call(results.Pins, "POST", _adapter(alias, "unpin"), body={"version": version})


def unload(alias: str, version: str | None) -> Call[results.Unloaded]:
    """POST /v1/adapters/{alias}/unload."""
    alias, version = _split(alias, version)
    return Call(results.Unloaded, "POST", _adapter(alias, "unload"), body={"version": version})


def list_experiments(state: str | None, after: str | None, limit: int) -> Call[results.Page[results.Experiment]]:
    """GET /v1/experiments."""
    params = {"state": state, "after": after, "limit": limit}
    return Call(results.Page[results.Experiment], "GET", "/v1/experiments", params)


def show_experiment(experiment_id: str) -> Call[results.ExperimentDetail]:
    """GET /v1/experiments/{id}."""
    return Call(results.ExperimentDetail, "GET", f"/v1/experiments/{_part(experiment_id)}")


def create_experiment(
    alias: str, arms: Sequence[ArmSpec], spec: ExperimentSpec, draft: bool
) -> Call[results.Experiment]:
    """POST /v1/experiments."""
    body = {"alias": alias, "arms": [asdict(arm) for arm in arms], "draft": draft, **spec.body()}
    return Call(results.Experiment, "POST", "/v1/experiments", body=body)


def start_experiment(experiment_id: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/start."""
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/start")


def change_weights(experiment_id: str, arms: Sequence[WeightSpec], traffic: float | None) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/weights."""
    body = {"arms": [asdict(arm) for arm in arms], "traffic": traffic}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/weights", body=body)


def promote_arm(experiment_id: str, arm: str | None, reason: str | None) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/promote."""
    body = {"arm": arm, "reason": reason}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/promote", body=body)


def roll_back(experiment_id: str, reason: str | None) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/rollback."""
    body = {"reason": reason}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/rollback", body=body)


def accept_feedback(experiment_id: str, reason: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/accept-feedback."""
    body = {"reason": reason}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/accept-feedback", body=body)


def accept_guardrail(experiment_id: str, guardrail: str, reason: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/accept-guardrail."""
    body = {"guardrail": guardrail, "reason": reason}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/accept-guardrail", body=body)


def accept_split(experiment_id: str, reason: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/accept-split."""
    body = {"reason": reason}
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/accept-split", body=body)


def undo_decision(experiment_id: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/undo."""
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/undo")


def list_decisions(experiment_id: str, after: int, limit: int) -> Call[results.Page[results.Decision]]:
    """GET /v1/experiments/{id}/decisions."""
    params = {"after": after, "limit": limit}
    path = f"/v1/experiments/{_part(experiment_id)}/decisions"
    return Call(results.Page[results.Decision], "GET", path, params)


def holdout(alias: str) -> Call[results.Holdout]:
    """GET /v1/adapters/{alias}/holdout."""
    return Call(results.Holdout, "GET", _adapter(alias, "holdout"))


def set_holdout(alias: str, percent: float) -> Call[results.Holdout]:
    """PUT /v1/adapters/{alias}/holdout."""
    return Call(results.Holdout, "PUT", _adapter(alias, "holdout"), body={"percent": percent})


def stop_experiment(experiment_id: str) -> Call[results.Experiment]:
    """POST /v1/experiments/{id}/stop."""
    return Call(results.Experiment, "POST", f"/v1/experiments/{_part(experiment_id)}/stop")


def list_shadows(limit: int) -> Call[results.ShadowList]:
    """GET /v1/shadows."""
    return Call(results.ShadowList, "GET", "/v1/shadows", {"limit": limit})


def start_shadow(alias: str, version: str | None, share: float) -> Call[results.Shadow]:
    """POST /v1/shadows."""
    alias, version = _split(alias, version)
    body = {"alias": alias, "version": _given(alias, version), "share": share}
    return Call(results.Shadow, "POST", "/v1/shadows", body=body)


def show_shadow(shadow_id: str) -> Call[results.ShadowDetail]:
    """GET /v1/shadows/{id}."""
    return Call(results.ShadowDetail, "GET", f"/v1/shadows/{_part(shadow_id)}")


def stop_shadow(shadow_id: str) -> Call[results.Shadow]:
    """POST /v1/shadows/{id}/stop."""
    return Call(results.Shadow, "POST", f"/v1/shadows/{_part(shadow_id)}/stop")


def _files_of(source: Path) -> dict[str, Path]:
    if source.is_file():
        return {"archive": source}
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: expected an adapter's folder in PEFT's layout, or an archive of an export")
    files = {part: source / name for part, name in _UPLOADED.items()}
    if not files[_OPTIONAL].exists():
        del files[_OPTIONAL]
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected an adapter in PEFT's layout")
    return files


def _split(alias: str, version: str | None) -> tuple[str, str | None]:
    """An alias with its version given apart, or in one: `legal@v2`."""
    if version is None and "@" in alias:
        alias, _, version = alias.partition("@")
    return alias, version


def _version(alias: str, version: str | None) -> str:
    alias, version = _split(alias, version)
    return _adapter(alias, "versions", _given(alias, version))


def _given(alias: str, version: str | None) -> str:
    if version is None:
        raise ValueError(f"say which version of {alias!r}: {alias}@v1, or version='v1'")
    return version


def _adapter(*parts: str) -> str:
    return "/".join(["/v1/adapters", *map(_part, parts)])


def _part(text: str) -> str:
    """One part of a path. An empty one, or dots, would lead to another route."""
    if text in ("", ".", ".."):
        raise ValueError(f"expected a name, found {text!r}")
    return quote(text, safe="")
