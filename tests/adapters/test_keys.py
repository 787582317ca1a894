"""API keys: recognised by a secret that is kept nowhere, and by nothing else."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from adapters.database import Database
from adapters.errors import AuthenticationError, ConflictError, InvalidInputError, NotFoundError
from adapters.keys import KeyService, parse_duration, parse_scope
from adapters.records import SCOPES, ApiKey, KeyLimits
from adapters.tables import ApiKeyRow, utc_now
from tests.support.postgres import POSTGRES_URL


@pytest.fixture
def keys(database: Database) -> KeyService:
    """A service without keys."""
    return KeyService(database)


def _expire(keys: KeyService, key: ApiKey) -> None:
    with keys.database.write() as session:
        session.get_one(ApiKeyRow, key.id).expires_at = utc_now() - timedelta(seconds=1)


def test_key_is_recognised_when_its_secret_is_given(keys: KeyService) -> None:
    """All that it was made with comes back."""
    limits = KeyLimits(requests_per_minute=5, tokens_per_minute=6, max_concurrent=7)
    made, secret = keys.create(
        "web", scopes=["feedback", "chat"], aliases=["legal", "base"], expires_in=timedelta(days=1), limits=limits
    )
    keys.create("other", scopes=["chat"])
    found = keys.authenticate(secret)
    assert made == found == keys.list()[0]
    assert (("chat", "feedback"), ("base", "legal"), limits) == (made.scopes, made.aliases, made.limits)
    assert made.expires_at is not None
    assert timedelta(days=1) == made.expires_at - made.created_at


@pytest.mark.skipif(bool(POSTGRES_URL), reason="it dumps SQLite's file")
def test_database_holds_no_secret_when_a_key_is_made(keys: KeyService) -> None:
    """Whoever reads the file, the audit log included, can't call the server."""
    _, secret = keys.create("web", scopes=["chat"])
    with keys.database.engine.connect() as connection:
        dump = "\n".join(connection.connection.driver_connection.iterdump())  # type: ignore[union-attr]
    assert "web" in dump
    assert secret[16:] not in dump
    assert secret[-20:] not in dump


def test_secrets_differ_when_keys_are_made(keys: KeyService) -> None:
    """Each has 256 bits of its own behind an id of its own."""
    secrets = [keys.create("web", scopes=["chat"])[1] for _ in range(5)]
    assert {len("hs-") + 12 + len("-") + 43} == {len(secret) for secret in secrets}
    assert 5 == len({secret[:15] for secret in secrets}) == len({secret[16:] for secret in secrets})


@pytest.mark.parametrize("secret", [None, "", "unused", f"hs-{'0' * 12}-{'a' * 43}"])
def test_nobody_is_recognised_or_refused_when_no_key_was_ever_made(secret: str | None, keys: KeyService) -> None:
    """Clients send whatever they like where none is asked for."""
    assert None is keys.authenticate(secret)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda secret: None,
        lambda secret: "",
        lambda secret: "unused",
        lambda secret: secret[:-1],
        lambda secret: secret + "A",
        lambda secret: secret + "\n",
        lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        lambda secret: f"hs-{'0' * 12}{secret[15:]}",
        lambda secret: secret.upper(),
        lambda secret: "hs-\udcff",
    ],
)
def test_key_is_refused_when_the_secret_is_missing_or_wrong(
    spoil: Callable[[str], str | None], keys: KeyService
) -> None:
    """The message tells nothing about the keys that there are."""
    key, secret = keys.create("web", scopes=["chat"])
    with pytest.raises(AuthenticationError) as error:
        keys.authenticate(spoil(secret))
    assert key.id not in str(error.value)


def test_key_is_refused_when_it_is_expired_or_revoked(keys: KeyService) -> None:
    """Also the last one: a server that had keys never opens by itself again."""
    expired, expired_secret = keys.create("a", scopes=["chat"])
    revoked, revoked_secret = keys.create("b", scopes=["chat"])
    _expire(keys, expired)
    keys.revoke(revoked.id)
    with pytest.raises(AuthenticationError, match=f"{expired.id} has expired"):
        keys.authenticate(expired_secret)
    with pytest.raises(AuthenticationError, match=f"{revoked.id} was revoked"):
        keys.authenticate(revoked_secret)
    with pytest.raises(AuthenticationError, match="none was given"):
        keys.authenticate(None)


def test_secrets_are_compared_in_constant_time_when_the_id_is_unknown_too(
    keys: KeyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that comes sooner for unknown ids would tell which ids exist."""
    _, secret = keys.create("web", scopes=["chat"])
    compared: list[tuple[Any, Any]] = []
    compare = hmac.compare_digest

    def note(left: Any, right: Any) -> bool:
        compared.append((left, right))
        return compare(left, right)

    monkeypatch.setattr("adapters.keys.hmac.compare_digest", note)
    for given in (f"hs-{'0' * 12}-{'a' * 43}", "unused"):
        with pytest.raises(AuthenticationError):
            keys.authenticate(given)
    keys.authenticate(secret)
    assert 3 == len(compared)
    assert {64} == {len(side) for pair in compared for side in pair}


def test_revoke_refuses_when_the_key_is_unknown_or_revoked_already(keys: KeyService) -> None:
    """An operator is told that nothing was done."""
    key, _ = keys.create("web", scopes=["chat"])
    with pytest.raises(NotFoundError, match="key-nobody"):
        keys.revoke("key-nobody")
    assert keys.revoke(key.id).revoked_at is not None
    with pytest.raises(ConflictError, match="already"):
        keys.revoke(key.id)


def test_last_use_is_kept_when_it_is_noted(keys: KeyService) -> None:
    """A key that nobody uses can be found."""
    key, secret = keys.create("web", scopes=["chat"])
    assert key.last_used_at is None
    before = utc_now()
    keys.note_use(key.id)
    found = keys.authenticate(secret)
    assert found is not None
    assert found.last_used_at is not None
    assert before <= found.last_used_at <= utc_now()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": " web"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"scopes": []}, "scope"),
        ({"aliases": []}, "alias"),
        ({"aliases": ["LEGAL"]}, "alias"),
        ({"aliases": ["auto"]}, "alias"),
        ({"aliases": ["legal@v1"]}, "alias"),
        ({"aliases": ["legal"], "scopes": ["chat", "admin"]}, "alias"),
        ({"limits": KeyLimits(requests_per_minute=0)}, "requests_per_minute"),
        ({"limits": KeyLimits(tokens_per_minute=-1)}, "tokens_per_minute"),
        ({"limits": KeyLimits(max_concurrent=10**10)}, "max_concurrent"),
    ],
)
def test_create_refuses_when_something_is_out_of_bounds(options: dict[str, Any], param: str, keys: KeyService) -> None:
    """The option is named, and no key is made."""
    with pytest.raises(InvalidInputError) as error:
        keys.create(**{"name": "web", "scopes": ["chat"], **options})
    assert param == error.value.param
    assert [] == keys.list()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90m", timedelta(minutes=90)),
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("8w", timedelta(weeks=8)),
        ("3650d", timedelta(days=3650)),
    ],
)
def test_duration_is_parsed_when_it_has_a_unit(text: str, expected: timedelta) -> None:
    """Minutes, hours, days or weeks."""
    assert expected == parse_duration(text)


@pytest.mark.parametrize("text", ["", "30", "d", "0d", "-1d", "1.5d", "1y", "3651d", "999999w", "1d1h", " 1d"])
def test_duration_is_refused_when_it_has_another_shape(text: str) -> None:
    """The message shows what is expected."""
    with pytest.raises(InvalidInputError, match="expected such as 90m"):
        parse_duration(text)


def test_scope_is_parsed_when_it_exists() -> None:
    """Every scope by its name, and nothing else."""
    assert list(SCOPES) == [parse_scope(scope) for scope in SCOPES]
    with pytest.raises(InvalidInputError, match="no scope 'all'"):
        parse_scope("all")
