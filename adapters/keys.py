"""API keys: made, listed, revoked and recognised. Knows no HTTP.

A secret reads `hs-<12 hex digits>-<43 characters>`: the digits name the row, the rest is 32 random bytes. The database
holds its SHA-256 alone. A slow password hash protects secrets that can be guessed; 256 random bits can't be, and every
request has to be checked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database
from adapters.errors import AuthenticationError, ConflictError, InvalidInputError, NotFoundError
from adapters.records import BASE_MODEL_NAME, SCOPES, ApiKey, KeyLimits, Scope, check_alias_name
from adapters.tables import ApiKeyRow, utc_now

__all__ = ["KeyService", "parse_duration", "parse_scope"]

_SECRET = re.compile(r"hs-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_UNKNOWN_SHA256 = hashlib.sha256(b"").hexdigest()  # of no secret
_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MAX_DURATION = timedelta(days=3650)
_MAX_NAME_CHARS = 64
_MAX_ALIASES = 1000
_MAX_LIMIT = 1_000_000_000


class KeyService:
    """Keys over one database; safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        name: str,
        *,
        scopes: Collection[Scope],
        aliases: Collection[str] | None = None,
        expires_in: timedelta | None = None,
        limits: KeyLimits | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key.

        Args:
            name: For people; need not be unique.
            scopes: What it may do.
            aliases: The aliases it may use, `base` among them if the base model is; None is all.
            expires_in: From now; None is never.
            limits: What it may take.

        Returns:
            The key, and its secret, which is kept nowhere.

        Raises:
            InvalidInputError: a name, scope, alias or limit is out of bounds.
        """
        limits = limits or KeyLimits()
        _check_name(name)
        _check_scopes(scopes, aliases)
        _check_limits(limits)
        number = secrets.token_hex(6)
        secret = f"hs-{number}-{secrets.token_urlsafe(32)}"
        now = utc_now()
        row = ApiKeyRow(
            id=_id_of(number),
            name=name,
            secret_sha256=_hash(secret),
            scopes=sorted(set(scopes), key=SCOPES.index),
            aliases=None if aliases is None else sorted(set(aliases)),
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            max_concurrent=limits.max_concurrent,
        )
        with self.database.write() as session:
            session.add(row)
            record_act(session, "create_key", row.id, name=name, scopes=row.scopes, aliases=row.aliases)
        return _to_key(row), secret

    def list(self) -> list[ApiKey]:
        """All keys, the expired and the revoked too, oldest first."""
        with self.database.read() as session:
            rows = session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return [_to_key(row) for row in rows]

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for good; no request that begins after this is answered to it.

        Raises:
            NotFoundError: no key has this id.
            ConflictError: it is revoked already.
        """
        with self.database.write() as session:
            row = session.get(ApiKeyRow, key_id)
            if row is None:
                raise NotFoundError(f"there is no key {key_id[:80]!r}: expected an id such as key-1f2e3d4c5b6a")
            if row.revoked_at is not None:
                raise ConflictError(f"key {row.id} was revoked at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC already")
            row.revoked_at = utc_now()
            record_act(session, "revoke_key", row.id, name=row.name)
            return _to_key(row)

    def authenticate(self, secret: str | None) -> ApiKey | None:
        """Recognise a key by its secret; None where no key was ever made, so that none can be asked for.

        A revoked or expired key still counts as made: taking back the last one must not open the server.

        Raises:
            AuthenticationError: there are keys, and this is the secret of none that is valid.
        """
        with self.database.read() as session:
            row = None if secret is None else _find(session, secret)
            if row is None and session.scalar(select(ApiKeyRow.id).limit(1)) is None:
                return None
        if row is None:
            given = "none was given" if secret is None else "the one given is not valid"
            raise AuthenticationError(f"an API key is required as 'Authorization: Bearer hs-...'; {given}")
        key = _to_key(row)
        if not key.is_valid(utc_now()):
            raise AuthenticationError(f"API key {key.id} {'has expired' if key.revoked_at is None else 'was revoked'}")
        return key

    def note_use(self, key_id: str) -> None:
        """Write that the key was used just now."""
        with self.database.write() as session:
            session.get_one(ApiKeyRow, key_id).last_used_at = utc_now()


def parse_duration(text: str) -> timedelta:
    """Parse `90m`, `12h`, `30d` or `8w`.

    Raises:
        InvalidInputError: another shape, or more than ten years.
    """
    match = _DURATION.fullmatch(text)
    duration = timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None
    if duration is None or duration > _MAX_DURATION:
        raise InvalidInputError(
            f"{text[:40]!r} is not a time: expected such as 90m, 12h, 30d or 8w, at most 3650d", param="expires"
        )
    return duration


def parse_scope(text: str) -> Scope:
    """Return the scope of this name.

    Raises:
        InvalidInputError: there is none.
    """
    for scope in SCOPES:
        if scope == text:
            return scope
    raise InvalidInputError(f"there is no scope {text[:40]!r}: expected {', '.join(SCOPES)}", param="scope")


def _find(session: Session, secret: str) -> ApiKeyRow | None:
    """The row whose secret this is; takes no less time for an unknown id than for a wrong secret."""
    match = _SECRET.fullmatch(secret)
    row = session.get(ApiKeyRow, _id_of(match[1])) if match else None
    is_equal = hmac.compare_digest(_hash(secret), _UNKNOWN_SHA256 if row is None else row.secret_sha256)
    return row if is_equal else None


def _id_of(number: str) -> str:
    return f"key-{number}"


def _hash(secret: str) -> str:
    # A header may hold any bytes; a text made of them need not be valid Unicode.
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= _MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        raise InvalidInputError(
            f"{name[:80]!r} is no name for a key: expected 1 to {_MAX_NAME_CHARS} printable characters", param="name"
        )


def _check_scopes(scopes: Collection[Scope], aliases: Collection[str] | None) -> None:
    if not scopes:
        raise InvalidInputError(f"a key needs at least one scope of {', '.join(SCOPES)}", param="scope")
    if aliases is None:
        return
    if "admin" in scopes:
        raise InvalidInputError(
            "a key with the scope admin can't be limited to aliases: what it reads names all of them", param="alias"
        )
    if not 1 <= len(aliases) <= _MAX_ALIASES:
        raise InvalidInputError(f"expected 1 to {_MAX_ALIASES} aliases, found {len(aliases)}", param="alias")
    for alias in aliases:
        if alias != BASE_MODEL_NAME:
            check_alias_name(alias)


def _check_limits(limits: KeyLimits) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        value = getattr(limits, name)
        if value is not None and not 1 <= value <= _MAX_LIMIT:
            raise InvalidInputError(f"{name} must be between 1 and {_MAX_LIMIT}, found {value}", param=name)


def _to_key(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        scopes=tuple(parse_scope(scope) for scope in row.scopes),
        aliases=None if row.aliases is None else tuple(row.aliases),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        limits=KeyLimits(row.requests_per_minute, row.tokens_per_minute, row.max_concurrent),
    )
