"""What hangs on the clients of `sdk`: `adapters` and `experiments`, each sync and async. Knows no connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clients import calls
from clients.calls import ArmSpec, ExperimentSpec, WeightSpec
from clients.results import (
    Adapter,
    AdapterDetail,
    Change,
    Decision,
    Deleted,
    Experiment,
    ExperimentDetail,
    Holdout,
    Imported,
    Page,
    Pins,
    Shadow,
    ShadowDetail,
    Unloaded,
    Version,
    VersionDetail,
)

if TYPE_CHECKING:
    from clients.sdk import AsyncHotswap, Hotswap

__all__ = [
    "AdaptersResource",
    "AsyncAdaptersResource",
    "AsyncExperimentsResource",
    "AsyncShadowsResource",
    "ExperimentsResource",
    "ShadowsResource",
]

ExperimentState = Literal["draft", "running", "stopped", "decided"]
_USUAL = ExperimentSpec()


class AdaptersResource:
    """`hotswap.adapters`: aliases and versions. Every method raises `ApiError`, by status as `clients.errors` says.

    A version is `v2`, or the beginning of its digest, beside its alias, or both in one: `legal@v2`.
    """

    def __init__(self, client: Hotswap) -> None:
        self._client = client

    def list(self, *, after: str | None = None, limit: int = 20) -> Page[Adapter]:
        """The aliases behind a name, in the order of their names."""
        return self._client.send(calls.list_adapters(after, limit))

    def get(self, alias: str) -> AdapterDetail:
        """One alias with its present version, and its newest hundred."""
        return self._client.send(calls.show_adapter(alias))

    def versions(self, alias: str, *, after: int = 0, limit: int = 20) -> Page[Version]:
        """An alias's versions behind a number, in the order of their numbers."""
        return self._client.send(calls.list_versions(alias, after, limit))

    def version(self, alias: str, version: str | None = None) -> VersionDetail:
        """One version with its manifest."""
        return self._client.send(calls.show_version(alias, version))

    def history(self, alias: str, *, after: int = 0, limit: int = 20) -> Page[Change]:
        """The moves of an alias, the oldest first."""
        return self._client.send(calls.list_changes(alias, after, limit))

    def upload(self, source: Path | str, alias: str, *, promote: bool = True) -> Imported:
        """Send an adapter to be checked and published: a folder in PEFT's layout, or an archive that `export` wrote."""
        return self._client.send(calls.upload(source, alias, promote))

    def export(self, alias: str, version: str | None, target: Path | str) -> Path:
        """Write a version's files to a tar archive that must not exist yet; `version` None if the alias names it."""
        return self._client.download(calls.export_path(alias, version), Path(target))

    def promote(self, alias: str, version: str | None = None) -> Adapter:
        """Point an alias to one of its versions."""
        return self._client.send(calls.promote(alias, version))

    def rollback(self, alias: str) -> Adapter:
        """Point an alias back to where it was before its last publish or promotion."""
        return self._client.send(calls.rollback(alias))

    def pin(self, alias: str, version: str | None = None) -> Pins:
        """Keep a version in a slot; without one, whichever the alias points to."""
        return self._client.send(calls.pin(alias, version))

    def unpin(self, alias: str, version: str | None = None) -> Pins:
        """Undo that."""
        return self._client.send(calls.unpin(alias, version))

    def unload(self, alias: str, version: str | None = None) -> Unloaded:
        """Free a version's slot once its last request has ended."""
        return self._client.send(calls.unload(alias, version))

    def delete(self, alias: str, version: str | None = None) -> Deleted:
        """Delete one version; without one, the alias with all its versions."""
        return self._client.send(calls.delete(alias, version))


class AsyncAdaptersResource:
    """`AdaptersResource`, to be awaited."""

    def __init__(self, client: AsyncHotswap) -> None:
        self._client = client

    async def list(self, *, after: str | None = None, limit: int = 20) -> Page[Adapter]:
        """See `AdaptersResource.list`."""
        return await self._client.send(calls.list_adapters(after, limit))

    async def get(self, alias: str) -> AdapterDetail:
        """See `AdaptersResource.get`."""
        return await self._client.send(calls.show_adapter(alias))

    async def versions(self, alias: str, *, after: int = 0, limit: int = 20) -> Page[Version]:
        """See `AdaptersResource.versions`."""
        return await self._client.send(calls.list_versions(alias, after, limit))

    async def version(self, alias: str, version: str | None = None) -> VersionDetail:
        """See `AdaptersResource.version`."""
        return await self._client.send(calls.show_version(alias, version))

    async def history(self, alias: str, *, after: int = 0, limit: int = 20) -> Page[Change]:
        """See `AdaptersResource.history`."""
        return await self._client.send(calls.list_changes(alias, after, limit))

    async def upload(self, source: Path | str, alias: str, *, promote: bool = True) -> Imported:
        """See `AdaptersResource.upload`."""
        return await self._client.send(calls.upload(source, alias, promote))

    async def export(self, alias: str, version: str | None, target: Path | str) -> Path:
        """See `AdaptersResource.export`."""
        return await self._client.download(calls.export_path(alias, version), Path(target))

    async def promote(self, alias: str, version: str | None = None) -> Adapter:
        """See `AdaptersResource.promote`."""
        return await self._client.send(calls.promote(alias, version))

    async def rollback(self, alias: str) -> Adapter:
        """See `AdaptersResource.rollback`."""
        return await self._client.send(calls.rollback(alias))

    async def pin(self, alias: str, version: str | None = None) -> Pins:
        """See `AdaptersResource.pin`."""
        return await self._client.send(calls.pin(alias, version))

    async def unpin(self, alias: str, version: str | None = None) -> Pins:
        """See `AdaptersResource.unpin`."""
        return await self._client.send(calls.unpin(alias, version))

    async def unload(self, alias: str, version: str | None = None) -> Unloaded:
        """See `AdaptersResource.unload`."""
        return await self._client.send(calls.unload(alias, version))

    async def delete(self, alias: str, version: str | None = None) -> Deleted:
        """See `AdaptersResource.delete`."""
        return await self._client.send(calls.delete(alias, version))


class ExperimentsResource:
    """`hotswap.experiments`: splits of aliases and what came of them."""

    def __init__(self, client: Hotswap) -> None:
        self._client = client

    def list(
        self, *, state: ExperimentState | None = None, after: str | None = None, limit: int = 20
    ) -> Page[Experiment]:
        """The experiments behind one, in one state or all, the newest first."""
        return self._client.send(calls.list_experiments(state, after, limit))

    def get(self, experiment_id: str) -> ExperimentDetail:
        """One experiment with its verdict, its counts and its outcomes by arm."""
        return self._client.send(calls.show_experiment(experiment_id))

    def create(
        self, alias: str, arms: Sequence[ArmSpec], spec: ExperimentSpec = _USUAL, *, draft: bool = False
    ) -> Experiment:
        """Split an alias between versions, at once unless it is a draft; weights add up to 100."""
        return self._client.send(calls.create_experiment(alias, arms, spec, draft))

    def start(self, experiment_id: str) -> Experiment:
        """Start a draft: at once, or at its `starts_at` if that lies ahead."""
        return self._client.send(calls.start_experiment(experiment_id))

    def change_weights(
        self, experiment_id: str, arms: Sequence[WeightSpec], *, traffic: float | None = None
    ) -> Experiment:
        """Give all arms of a running experiment other weights: a new stage begins."""
        return self._client.send(calls.change_weights(experiment_id, arms, traffic))

    def stop(self, experiment_id: str) -> Experiment:
        """End an experiment."""
        return self._client.send(calls.stop_experiment(experiment_id))

    def promote(self, experiment_id: str, arm: str | None = None, *, reason: str | None = None) -> Experiment:
        """End an experiment: everybody gets a treatment's version, by default of the one that the verdict promotes."""
        return self._client.send(calls.promote_arm(experiment_id, arm, reason))

    def rollback(self, experiment_id: str, *, reason: str | None = None) -> Experiment:
        """End an experiment: everybody gets the control's version."""
        return self._client.send(calls.roll_back(experiment_id, reason))

    def accept_feedback(self, experiment_id: str, reason: str) -> Experiment:
        """Let arms differ in how often outcomes are known; says why that is harmless."""
        return self._client.send(calls.accept_feedback(experiment_id, reason))

    def accept_guardrail(self, experiment_id: str, guardrail: str, reason: str) -> Experiment:
        """No longer wait for a guardrail to be shown to hold; says why. A breach of it counts as before."""
        return self._client.send(calls.accept_guardrail(experiment_id, guardrail, reason))

    def accept_split(self, experiment_id: str, reason: str) -> Experiment:
        """Take arms for comparable though users were not split as was meant; says why that is harmless."""
        return self._client.send(calls.accept_split(experiment_id, reason))

    def undo(self, experiment_id: str) -> Experiment:
        """Take the latest change of weights, promotion, rollback, acceptance or stop back that is not yet."""
        return self._client.send(calls.undo_decision(experiment_id))

    def decisions(self, experiment_id: str, *, after: int = 0, limit: int = 20) -> Page[Decision]:
        """What was done to an experiment and why, the oldest first."""
        return self._client.send(calls.list_decisions(experiment_id, after, limit))

    def holdout(self, alias: str) -> Holdout:
        """The percent of an alias's users that no experiment touches."""
        return self._client.send(calls.holdout(alias))

    def set_holdout(self, alias: str, percent: float) -> Holdout:
        """Keep so many percent of an alias's users out of all its experiments."""
        return self._client.send(calls.set_holdout(alias, percent))


class AsyncExperimentsResource:
    """`ExperimentsResource`, to be awaited."""

    def __init__(self, client: AsyncHotswap) -> None:
        self._client = client

    async def list(
        self, *, state: ExperimentState | None = None, after: str | None = None, limit: int = 20
    ) -> Page[Experiment]:
        """See `ExperimentsResource.list`."""
        return await self._client.send(calls.list_experiments(state, after, limit))

    async def get(self, experiment_id: str) -> ExperimentDetail:
        """See `ExperimentsResource.get`."""
        return await self._client.send(calls.show_experiment(experiment_id))

    async def create(
        self, alias: str, arms: Sequence[ArmSpec], spec: ExperimentSpec = _USUAL, *, draft: bool = False
    ) -> Experiment:
        """See `ExperimentsResource.create`."""
        return await self._client.send(calls.create_experiment(alias, arms, spec, draft))

    async def start(self, experiment_id: str) -> Experiment:
        """See `ExperimentsResource.start`."""
        return await self._client.send(calls.start_experiment(experiment_id))

    async def change_weights(
        self, experiment_id: str, arms: Sequence[WeightSpec], *, traffic: float | None = None
    ) -> Experiment:
        """See `ExperimentsResource.change_weights`."""
        return await self._client.send(calls.change_weights(experiment_id, arms, traffic))

    async def stop(self, experiment_id: str) -> Experiment:
        """See `ExperimentsResource.stop`."""
        return await self._client.send(calls.stop_experiment(experiment_id))

    async def promote(self, experiment_id: str, arm: str | None = None, *, reason: str | None = None) -> Experiment:
        """See `ExperimentsResource.promote`."""
        return await self._client.send(calls.promote_arm(experiment_id, arm, reason))

    async def rollback(self, experiment_id: str, *, reason: str | None = None) -> Experiment:
        """See `ExperimentsResource.rollback`."""
        return await self._client.send(calls.roll_back(experiment_id, reason))

    async def accept_feedback(self, experiment_id: str, reason: str) -> Experiment:
        """See `ExperimentsResource.accept_feedback`."""
        return await self._client.send(calls.accept_feedback(experiment_id, reason))

    async def accept_guardrail(self, experiment_id: str, guardrail: str, reason: str) -> Experiment:
        """See `ExperimentsResource.accept_guardrail`."""
        return await self._client.send(calls.accept_guardrail(experiment_id, guardrail, reason))

    async def accept_split(self, experiment_id: str, reason: str) -> Experiment:
        """See `ExperimentsResource.accept_split`."""
        return await self._client.send(calls.accept_split(experiment_id, reason))

    async def undo(self, experiment_id: str) -> Experiment:
        """See `ExperimentsResource.undo`."""
        return await self._client.send(calls.undo_decision(experiment_id))

    async def decisions(self, experiment_id: str, *, after: int = 0, limit: int = 20) -> Page[Decision]:
        """See `ExperimentsResource.decisions`."""
        return await self._client.send(calls.list_decisions(experiment_id, after, limit))

    async def holdout(self, alias: str) -> Holdout:
        """See `ExperimentsResource.holdout`."""
        return await self._client.send(calls.holdout(alias))

    async def set_holdout(self, alias: str, percent: float) -> Holdout:
        """See `ExperimentsResource.set_holdout`."""
        return await self._client.send(calls.set_holdout(alias, percent))


class ShadowsResource:
    """`hotswap.shadows`: candidates that answer a copy of live requests. Every method raises `ApiError`."""

    def __init__(self, client: Hotswap) -> None:
        self._client = client

    def list(self, *, limit: int = 20) -> Sequence[Shadow]:
        """The newest shadows, the newest of them first."""
        return self._client.send(calls.list_shadows(limit)).data

    def start(self, alias: str, version: str | None = None, *, share: float) -> Shadow:
        """Have a version (`v2`, or `legal@v2` as the alias) answer a copy of so many percent of the requests.

        Raises:
            ConflictError: another shadow runs on the alias.
        """
        return self._client.send(calls.start_shadow(alias, version, share))

    def get(self, shadow_id: str) -> ShadowDetail:
        """One shadow, and its answers beside the live ones."""
        return self._client.send(calls.show_shadow(shadow_id))

    def stop(self, shadow_id: str) -> Shadow:
        """End a shadow."""
        return self._client.send(calls.stop_shadow(shadow_id))


class AsyncShadowsResource:
    """`ShadowsResource`, to be awaited."""

    def __init__(self, client: AsyncHotswap) -> None:
        self._client = client

    async def list(self, *, limit: int = 20) -> Sequence[Shadow]:
        """See `ShadowsResource.list`."""
        return (await self._client.send(calls.list_shadows(limit))).data

    async def start(self, alias: str, version: str | None = None, *, share: float) -> Shadow:
        """See `ShadowsResource.start`."""
        return await self._client.send(calls.start_shadow(alias, version, share))

    async def get(self, shadow_id: str) -> ShadowDetail:
        """See `ShadowsResource.get`."""
        return await self._client.send(calls.show_shadow(shadow_id))

    async def stop(self, shadow_id: str) -> Shadow:
        """See `ShadowsResource.stop`."""
        return await self._client.send(calls.stop_shadow(shadow_id))
