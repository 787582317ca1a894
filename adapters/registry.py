"""The registry: which versions exist, which names point where, and how they came to.

Versions never change; names move, one row in one transaction. The server reads it for every request, so a move needs no
message to anybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from adapters.assignment import assign_arm, holds, is_held_out, traffic_position
from adapters.audit import record_act
from adapters.checkpoint_adapters import check_not_needed, find_checkpoint_digest, is_checkpoint
from adapters.database import Database, actor_of
from adapters.errors import (
    AdapterManifestError,
    AliasForbiddenError,
    ConflictError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
)
from adapters.experiment_rows import find_running, find_unfinished
from adapters.gate_report import GateReport
from adapters.manifest import Manifest
from adapters.records import (
    BASE_MODEL_NAME,
    Actor,
    AdapterVersion,
    Alias,
    AliasChange,
    Arm,
    Binding,
    ChangeAction,
    Experiment,
    ModelName,
    NumberedVersion,
    VersionKind,
    check_alias_name,
    parse_checkpoint_name,
    parse_model_name,
)
from adapters.routing.store import drop_prompts, keep_prompts
from adapters.store import ArtifactStore
from adapters.tables import KIND_KEY, AliasChangeRow, AliasRow, AliasVersionRow, PinRow, ShadowRow, VersionRow, utc_now

__all__ = ["ARM_HEADER", "Registry", "check_can_chat", "find_version", "has_been_at", "move_alias"]

ARM_HEADER = "x-hotswap-arm"
_MAX_NAMES_SHOWN = 20
_KIND_NAMES: dict[VersionKind, str] = {"chat": "a version for chat", "reward": "a reward model"}


class Registry:
    """Versions and aliases over a database and a store; safe to use from several threads and processes."""

    def __init__(self, database: Database, store: ArtifactStore) -> None:
        self.database = database
        self.store = store

    def acting_for(self, actor: Actor) -> Registry:
        """The same registry on somebody's behalf: what the actor may not see does not exist in it."""
        return Registry(self.database.acting_for(actor), self.store)

    def can_see(self, name: str) -> bool:
        """Whether an alias of this name, or the base model, may exist for whoever the registry acts for."""
        return self.database.actor.can_see(name)

    def publish(
        self,
        source: Path,
        manifest: Manifest,
        *,
        alias: str,
        promote: bool | Callable[[int | None], bool] = True,
        action: Literal["publish", "import"] = "publish",
        also: Callable[[Session, NumberedVersion], None] | None = None,
        prompts: Sequence[str] = (),
    ) -> tuple[NumberedVersion, bool]:
        """Store a checked adapter as the next version of `alias`, and move the alias to it.

        The alias stays where it is when `promote` is False, an experiment is running on it, or it points to a version
        of another kind; a new alias then points nowhere, and its versions are called by their own names. Publishing
        content that the alias has already gives the same number again.

        Args:
            source: A folder in PEFT's layout.
            manifest: What to record about it.
            alias: The name to publish under.
            promote: Whether to move the alias; a function is asked in the transaction, with the number that the alias
                points to by then, None if it points nowhere.
            action: What the audit log calls it.
            also: Writes further rows in the same transaction; if it raises, nothing is registered.
            prompts: What the version was trained on, of which a sample is kept for the router. They are no part of the
                version: its digest does not know them.

        Returns:
            The version, and whether the alias points to it afterwards.

        Raises:
            AliasForbiddenError: the actor is limited to other aliases.
        """
        check_alias_name(alias)
        if not self.database.actor.can_see(alias):
            raise AliasForbiddenError(f"this API key may not publish under {alias!r}", param="alias")
        with self.store.held():
            digest, size_bytes = self.store.add(source, manifest)
            with self.database.write() as session:
                if session.get(VersionRow, digest) is None:
                    session.add(_version_row(digest, size_bytes, manifest))
                number = _number_of(session, alias, digest) or _append_version(session, alias, digest)
                keep_prompts(session, digest, prompts)
                row = session.get_one(AliasRow, alias)
                may_move = promote(row.number) if callable(promote) else promote
                is_fit = _is_of_same_kind(session, row, manifest.kind)
                if may_move and is_fit and not find_running(session, alias):
                    move_alias(session, row, number, "publish")
                published, is_live = _load_numbered(session, alias, number), row.number == number
                record_act(session, action, published.label, digest=digest, is_live=is_live)
                if also is not None:
                    also(session, published)
                return published, is_live

    def promote(self, name: str) -> Alias:
        """Point an alias to one of its versions: `legal@v2`.

        Raises:
            NotFoundError: no such version.
            ConflictError: an experiment is running on the alias, it points to a version of another kind, the name gives
                no version, or others moved the alias.
            IntegrityError: the version's stored files are damaged; the alias stays where it is.
        """
        parsed = parse_model_name(name)
        if parsed.number is None and parsed.digest_prefix is None:
            raise ConflictError(f"say which version to promote, for example {parsed.alias}@v1")
        return self._move_alias(parsed.alias, "promote", lambda session: find_version(session, parsed))

    def rollback(self, alias: str) -> Alias:
        """Point an alias back to where it was before its last publish or promote; repeated calls go further back.

        Raises:
            NotFoundError: no such alias.
            ConflictError: nothing to go back to, an experiment is running on the alias, or others moved it.
            IntegrityError: that version's stored files are damaged; the alias stays where it is.
        """
        return self._move_alias(alias, "rollback", lambda session: _find_earlier(session, alias))

    def _move_alias(
        self, alias: str, action: Literal["promote", "rollback"], choose: Callable[[Session], NumberedVersion]
    ) -> Alias:
        """Move an alias to what `choose` finds, whose files are hashed before: a transaction makes all writers wait."""
        with self.store.held():  # nobody removes them meanwhile
            with self.database.read() as session:
                chosen = choose(session)
                _movable_alias(session, alias)
            self.store.verify(chosen.version.digest)
            with self.database.write() as session:
                row = _movable_alias(session, alias)
                if choose(session) != chosen:
                    raise ConflictError(f"{alias!r} was moved by somebody else at the same time; look where it is")
                _check_kind(session, row, chosen)
                record_act(session, action, alias, from_number=row.number, to_number=chosen.number)
                move_alias(session, row, chosen.number, action)
                return _load_alias(session, alias)

    def remove(self, name: str) -> list[str]:
        """Delete one version (`legal@v1`), or an alias with all its versions (`legal`).

        Returns:
            The labels of what was removed.

        Raises:
            NotFoundError: no such alias or version.
            ConflictError: the alias points to the version, an experiment is running on the alias, or a job that is not
                at its end goes on from a version.
        """
        parsed = parse_model_name(name)
        # Alone: a publisher of equal content must not find the files between the commit and their deletion.
        with self.store.held(alone=True):
            with self.database.write() as session:
                targets = _detach(session, parsed)
                orphans = _drop_versions(session, targets)
                digests = {target.label: target.version.digest for target in targets}
                record_act(session, "remove", name, digests=digests)
            for digest in orphans:
                self.store.remove(digest)
        return [target.label for target in targets]

    def resolve(self, model: str, *, unit: str, arm: str | None = None) -> Binding:
        """Bind a request to what will answer it, to its last token.

        Args:
            model: `base`, an alias, `alias@vN`, `alias@<digest>`, or the name of a job's checkpoint.
            unit: The key that experiments split by.
            arm: A tester's choice among the arms that answer for an alias at present: `B`, or `exp-.../B` where several
                experiments have one of that name. It overrules every assignment, and is never counted.

        Raises:
            InvalidNameError: the name breaks the grammar.
            NotFoundError: no such alias or version.
            InvalidInputError: the version is a reward model, or there is no such arm.
        """
        if arm is not None and (model == BASE_MODEL_NAME or "@" in model or ":" in model):
            raise InvalidInputError(f"{model[:80]!r} is no alias that an experiment could split", param=ARM_HEADER)
        if model == BASE_MODEL_NAME and self.database.actor.can_see(model):
            return Binding(BASE_MODEL_NAME, "base")
        with self.database.read() as session:
            if model == BASE_MODEL_NAME:
                raise _absent(session, model)
            if checkpoint := parse_checkpoint_name(model):
                digest = find_checkpoint_digest(session, checkpoint)
                return Binding(checkpoint.alias, "checkpoint", digest, checkpoint=model)
            parsed = parse_model_name(model)
            if parsed.number is not None or parsed.digest_prefix is not None:
                found = find_version(session, parsed)
                check_can_chat(found)
                return Binding(parsed.alias, "version", found.version.digest, found.number)
            # An experiment must not answer for an alias that the actor can't see.
            row = _get_alias(session, parsed.alias)
            if arm is not None:
                return _bind_to_arm(session, parsed.alias, arm)
            is_out = row.holdout > 0 and is_held_out(row.name, row.holdout, unit)
            if not is_out and (bound := _bind_by_experiment(session, parsed.alias, unit)):
                return bound
            current = find_version(session, parsed)
            check_can_chat(current)
            return Binding(parsed.alias, "holdout" if is_out else "alias", current.version.digest, current.number)

    def find(self, name: str) -> NumberedVersion:
        """The version that a name stands for; an alias alone stands for the one that it points to."""
        with self.database.read() as session:
            return find_version(session, parse_model_name(name))

    def gate_report(self, label: str) -> GateReport | None:
        """What the gate found about a version; None of one that nobody judged, that is gone, or that is damaged."""
        try:
            return self.store.read_manifest(self.find(label).version.digest).gate
        except (NotFoundError, IntegrityError, AdapterManifestError):
            return None

    def aliases(self, *, after: str = "", limit: int | None = None) -> list[Alias]:
        """The aliases behind a name, at most `limit`, in the order of their names; all of them if neither is given."""
        with self.database.read() as session:
            names = _alias_names(session, after=after, limit=limit)
            return [_load_alias(session, name) for name in names]

    def unpromoted(self) -> list[str]:
        """Names with versions of which none has been promoted: they point nowhere."""
        with self.database.read() as session:
            has_version = select(AliasVersionRow.alias).where(AliasVersionRow.alias == AliasRow.name).exists()
            names = session.scalars(select(AliasRow.name).where(AliasRow.number.is_(None), has_version))
            return sorted(name for name in names if actor_of(session).can_see(name))

    def alias(self, name: str) -> Alias:
        """One alias.

        Raises:
            NotFoundError: no such alias, or it points nowhere.
        """
        with self.database.read() as session:
            return _load_alias(session, name)

    def has_alias(self, name: str) -> bool:
        """Whether there is an alias of this name, which may be any text."""
        with self.database.read() as session:
            row = session.get(AliasRow, name)
            return row is not None and row.number is not None and actor_of(session).can_see(name)

    def names(self) -> frozenset[str]:
        """The aliases that point somewhere."""
        with self.database.read() as session:
            return frozenset(_alias_names(session))

    def versions(self, alias: str, *, after: int = 0, limit: int | None = None) -> list[NumberedVersion]:
        """An alias's versions behind a number, at most `limit`, in the order of their numbers.

        Empty if there is no such alias.
        """
        with self.database.read() as session:
            is_seen = actor_of(session).can_see(alias)
            return _list_versions(session, alias, after=after, limit=limit) if is_seen else []

    def history(self, alias: str, *, after: int = 0, limit: int | None = None) -> list[AliasChange]:
        """The moves of an alias, oldest first, without the first `after` ones and at most `limit`."""
        with self.database.read() as session:
            is_seen = actor_of(session).can_see(alias)
            rows = _changes(session, alias, after=after, limit=limit) if is_seen else []
            return [AliasChange(r.alias, _action(r), r.from_number, r.to_number, r.changed_at) for r in rows]


def _bind_by_experiment(session: Session, alias: str, unit: str) -> Binding | None:
    """The arm that a unit has in the experiment that it is in, if it is in one that runs."""
    if not (running := find_running(session, alias)):
        return None
    position = traffic_position(alias, unit)
    for experiment in running:
        if holds(experiment.stretches, position):
            return _bind_arm(experiment, assign_arm(experiment.arms, experiment.salt, unit))
    return None


def _bind_to_arm(session: Session, alias: str, wanted: str) -> Binding:
    experiment_id, _, name = wanted.rpartition("/")
    found = [
        (experiment, arm)
        for experiment in find_running(session, alias)
        for arm in experiment.arms
        if arm.name == name and experiment_id in ("", experiment.id)
    ]
    if len(found) != 1:
        listed = ", ".join(f"{item.id}/{arm.name}" for item in find_running(session, alias) for arm in item.arms)
        called = f"{len(found)} arms of {alias!r} are" if found else f"no arm of {alias!r} is"
        there = f"it has {listed}" if listed else "no experiment runs on it"
        raise InvalidInputError(f"{called} called {wanted[:80]!r}; {there}", param=ARM_HEADER)
    return replace(_bind_arm(*found[0]), forced=True)


def _bind_arm(experiment: Experiment, arm: Arm) -> Binding:
    return Binding(
        experiment.alias, "experiment", arm.digest, arm.number, experiment.id, arm.name, stage=experiment.stage
    )


def check_can_chat(found: NumberedVersion) -> None:
    """Refuse a version that writes no answers.

    Raises:
        InvalidInputError: it is a reward model.
    """
    if found.version.kind == "reward":
        raise InvalidInputError(
            f"{found.label} is a reward model: it scores answers for training and writes none; use it as the reward of "
            "hotswap train --method rloo or grpo",
            param="model",
        )


def _append_version(session: Session, alias: str, digest: str) -> int:
    row = session.get(AliasRow, alias)
    if row is None:
        row = AliasRow(name=alias, number=None, last_number=0, updated_at=utc_now())
        session.add(row)
    row.last_number += 1
    session.add(AliasVersionRow(alias=alias, number=row.last_number, digest=digest))
    session.flush()
    return row.last_number


def has_been_at(session: Session, alias: str, number: int) -> bool:
    """Whether an alias pointed to a version before it came to where it is, so that going there is going back."""
    return number in _trail(session, alias)[:-1]


def move_alias(session: Session, row: AliasRow, number: int, action: ChangeAction) -> None:
    """Point an alias to a version and write it into its history; nothing if it points there already."""
    if row.number == number:
        return
    moved_at = utc_now()
    session.add(
        AliasChangeRow(alias=row.name, action=action, from_number=row.number, to_number=number, changed_at=moved_at)
    )
    row.number, row.updated_at = number, moved_at
    session.flush()


def _is_of_same_kind(session: Session, row: AliasRow, kind: VersionKind) -> bool:
    """Whether an alias may point to a version of this kind: one that answers must not come to name a judge, or back."""
    return row.number is None or _load_numbered(session, row.name, row.number).version.kind == kind


def _check_kind(session: Session, row: AliasRow, chosen: NumberedVersion) -> None:
    kind = chosen.version.kind
    if not _is_of_same_kind(session, row, kind):
        raise ConflictError(
            f"{chosen.label} is {_KIND_NAMES[kind]} and {row.name!r} points to v{row.number}, which is not; "
            "publish it under an alias of its own"
        )


def _trail(session: Session, alias: str) -> list[int]:
    """The numbers that the alias went through and has not rolled back from; the last is where it points."""
    existing = {version.number for version in _list_versions(session, alias)}
    trail: list[int] = []
    for change in _changes(session, alias):
        if change.action == "rollback":
            while trail and trail[-1] != change.to_number:
                trail.pop()
        else:
            trail.append(change.to_number)
    kept = [number for number in trail if number in existing]
    # A removed version between two visits to another leaves the same number twice: one place to be.
    return [number for number, _ in itertools.groupby(kept)]


def _find_earlier(session: Session, alias: str) -> NumberedVersion:
    """Where an alias was before its last publish or promotion."""
    _get_alias(session, alias)
    trail = _trail(session, alias)
    if len(trail) < 2:
        raise ConflictError(
            f"{alias!r} has no earlier version to roll back to; promote another of its versions instead, or publish a "
            "better one"
        )
    return _load_numbered(session, alias, trail[-2])


def _detach(session: Session, name: ModelName) -> list[NumberedVersion]:
    """What `name` asks to remove, once nothing points to it any more."""
    row = _movable_alias(session, name.alias)
    if name.number is None and name.digest_prefix is None:
        row.number, row.updated_at = None, utc_now()
        session.execute(delete(PinRow).where(PinRow.alias == name.alias))
        return _list_versions(session, name.alias)
    target = find_version(session, name)
    if target.number == row.number:
        raise ConflictError(f"{name.alias!r} points to v{row.number}; promote another version first")
    return [target]


def _drop_versions(session: Session, targets: list[NumberedVersion]) -> list[str]:
    for target in targets:
        _check_is_no_arm(session, target)
        check_not_needed(session, target)
        session.delete(session.get_one(AliasVersionRow, (target.alias, target.number)))
        session.execute(delete(PinRow).where(PinRow.alias == target.alias, PinRow.number == target.number))
    session.flush()
    orphans = []
    for digest in {target.version.digest for target in targets}:
        if session.scalar(select(func.count()).where(AliasVersionRow.digest == digest)) == 0:
            drop_prompts(session, digest)
            session.delete(session.get_one(VersionRow, digest))
            if not is_checkpoint(session, digest):
                orphans.append(digest)
    return orphans


def _check_is_no_arm(session: Session, target: NumberedVersion) -> None:
    for experiment in find_unfinished(session, target.alias):
        if target.number in (arm.number for arm in experiment.arms):
            raise ConflictError(
                f"{target.label} is an arm of the {experiment.state} experiment {experiment.id}; stop that first"
            )
    if shadow := _running_shadow(session, target):
        raise ConflictError(f"{target.label} is the running shadow {shadow}; stop that first")


def _running_shadow(session: Session, version: NumberedVersion) -> str | None:
    """The id of the shadow that has a version answer copies of its alias's requests, if one runs."""
    return session.scalar(
        select(ShadowRow.id).where(
            ShadowRow.alias == version.alias, ShadowRow.number == version.number, ShadowRow.state == "running"
        )
    )


def _movable_alias(session: Session, alias: str) -> AliasRow:
    row = _get_alias(session, alias)
    if running := find_running(session, alias):
        raise ConflictError(f"experiment {running[0].id} is running on {alias!r}; stop it first")
    return row


def _get_alias(session: Session, alias: str) -> AliasRow:
    """An alias that points somewhere, or has versions that nobody has promoted yet."""
    row = session.get(AliasRow, alias)
    if row is None or not actor_of(session).can_see(alias):
        raise _absent(session, alias)
    if row.number is None and not _list_versions(session, alias, limit=1):
        raise _absent(session, alias)
    return row


def _absent(session: Session, alias: str) -> NotFoundError:
    """The same words for a name that does not exist and for one that the actor may not see."""
    names = [BASE_MODEL_NAME] if actor_of(session).can_see(BASE_MODEL_NAME) else []
    known = ", ".join([*names, *_alias_names(session)][:_MAX_NAMES_SHOWN])
    return NotFoundError(f"there is no adapter {alias!r}; known: {known or 'none'}")


def _pointed_to(row: AliasRow) -> int:
    if row.number is None:
        label = f"{row.name}@v{row.last_number}"
        raise NotFoundError(
            f"no version of {row.name!r} has been promoted; call one by its name, or promote it: {label}"
        )
    return row.number


def _alias_names(session: Session, *, after: str = "", limit: int | None = None) -> list[str]:
    statement = select(AliasRow.name).where(AliasRow.number.is_not(None), AliasRow.name > after)
    names = (name for name in session.scalars(statement.order_by(AliasRow.name)) if actor_of(session).can_see(name))
    return list(itertools.islice(names, limit))


def _number_of(session: Session, alias: str, digest: str) -> int | None:
    statement = select(AliasVersionRow.number).where(AliasVersionRow.alias == alias, AliasVersionRow.digest == digest)
    return session.scalar(statement)


def find_version(session: Session, name: ModelName) -> NumberedVersion:
    """The version that a parsed name stands for; an alias alone stands for the one that it points to.

    Raises:
        NotFoundError: no such alias or version.
    """
    row = _get_alias(session, name.alias)
    if name.digest_prefix is None:
        return _load_numbered(session, name.alias, name.number or _pointed_to(row))
    versions = _list_versions(session, name.alias)
    matches = [v for v in versions if v.version.digest.startswith(name.digest_prefix)]
    if len(matches) != 1:
        raise NotFoundError(f"{len(matches)} versions of {name.alias!r} have a digest that begins {name.digest_prefix}")
    return matches[0]


def _load_numbered(session: Session, alias: str, number: int) -> NumberedVersion:
    row = session.get(AliasVersionRow, (alias, number))
    if row is None:
        known = ", ".join(f"v{v.number}" for v in _list_versions(session, alias))
        raise NotFoundError(f"{alias!r} has no version v{number}; it has {known}")
    return NumberedVersion(alias, number, _to_version(session.get_one(VersionRow, row.digest)))


def _list_versions(session: Session, alias: str, *, after: int = 0, limit: int | None = None) -> list[NumberedVersion]:
    statement = (
        select(AliasVersionRow.number, VersionRow)
        .join(VersionRow, VersionRow.digest == AliasVersionRow.digest)
        .where(AliasVersionRow.alias == alias, AliasVersionRow.number > after)
        .order_by(AliasVersionRow.number)
        .limit(limit)
    )
    return [NumberedVersion(alias, number, _to_version(row)) for number, row in session.execute(statement)]


def _load_alias(session: Session, name: str) -> Alias:
    row = _get_alias(session, name)
    running = find_running(session, name)
    return Alias(
        name=name,
        current=_load_numbered(session, name, _pointed_to(row)),
        updated_at=row.updated_at,
        num_versions=len(_list_versions(session, name)),
        experiment_id=running[0].id if running else None,
    )


def _changes(session: Session, alias: str, *, after: int = 0, limit: int | None = None) -> list[AliasChangeRow]:
    statement = select(AliasChangeRow).where(AliasChangeRow.alias == alias).order_by(AliasChangeRow.id)
    # SQLite has no OFFSET without a LIMIT; SQLAlchemy fills one in.
    return list(session.scalars(statement.offset(after).limit(limit)))


def _action(row: AliasChangeRow) -> ChangeAction:
    assert row.action in ("publish", "promote", "rollback")
    return row.action  # type: ignore[return-value]


def _version_row(digest: str, size_bytes: int, manifest: Manifest) -> VersionRow:
    metrics = {name: value for name, value in manifest.metrics.items() if name != KIND_KEY}
    return VersionRow(
        digest=digest,
        base_fingerprint=manifest.base.fingerprint,
        rank=manifest.rank,
        size_bytes=size_bytes,
        source=manifest.source,
        published_at=utc_now(),
        metrics=metrics if manifest.kind == "chat" else metrics | {KIND_KEY: manifest.kind},
    )


def _to_version(row: VersionRow) -> AdapterVersion:
    return AdapterVersion(
        digest=row.digest,
        base_fingerprint=row.base_fingerprint,
        rank=row.rank,
        size_bytes=row.size_bytes,
        source=row.source,
        published_at=row.published_at,
        metrics={name: value for name, value in row.metrics.items() if name != KIND_KEY},
        kind=row.kind,
    )
