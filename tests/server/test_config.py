"""Server settings: defaults, bounds, and flag over environment over file."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from adapters.database import Database
from adapters.errors import ConfigurationError
from adapters.keys import KeyService
from adapters.records import ApiKey
from server.config import ServeSettings, check_bind, check_port


def test_settings_are_the_defaults_when_nothing_is_given(tmp_path: Path) -> None:
    """The defaults are valid, and listen on this machine alone."""
    settings = ServeSettings.load(tmp_path)
    assert (settings.host, settings.port, settings.slots) == ("127.0.0.1", 8000, 8)


def test_setting_is_taken_from_the_nearest_source_when_several_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flag, then environment, then the file's [serve] table; a flag that is None counts as not given."""
    (tmp_path / "hotswap.toml").write_text('base = "x"\n[serve]\nport = 2001\nslots = 3\nmax_batch = 5\n')
    monkeypatch.setenv("HOTSWAP_SERVE_PORT", "2002")
    monkeypatch.setenv("HOTSWAP_SERVE_SLOTS", "4")
    settings = ServeSettings.load(tmp_path, port=2003, slots=None)
    assert (settings.port, settings.slots, settings.max_batch) == (2003, 4, 5)


@pytest.mark.parametrize("text", ["legal,support", "legal support", " legal, support,legal "])
def test_pinned_aliases_are_taken_from_every_source_when_given(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list in the file, a text in the environment, several flags; each name counts once."""
    assert () == ServeSettings.load(tmp_path).pinned
    (tmp_path / "hotswap.toml").write_text('[serve]\npinned = ["medical"]\n')
    assert ("medical",) == ServeSettings.load(tmp_path).pinned
    monkeypatch.setenv("HOTSWAP_SERVE_PINNED", text)
    assert ("legal", "support") == ServeSettings.load(tmp_path).pinned
    assert ("a", "b") == ServeSettings.load(tmp_path, pinned=["a", "b"]).pinned


NUMBERS = [name for name, field in ServeSettings.model_fields.items() if field.annotation in (int, float)]


def test_every_number_has_bounds_when_it_is_a_setting(tmp_path: Path) -> None:
    """Both ends of every number are enforced, and the error names setting and value."""
    assert len(NUMBERS) > 5
    for name in NUMBERS:
        for value in (-1, 10**12):
            with pytest.raises(ConfigurationError, match=rf"setting serve\.{name}: .*found {value}"):
                ServeSettings.load(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host": "example.com"}, r"serve\.host"),
        ({"log_level": "loud"}, r"serve\.log_level"),
        ({"ports": 1}, r"serve\.ports: Extra inputs"),
        ({"pinned": ["a", "b"], "slots": 2}, r"pinned names 2 aliases, but of 2 slots one must stay free"),
        ({"pinned": [1]}, r"serve\.pinned"),
        ({"max_tokens": 64, "max_context": 64}, r"max_tokens \(64\) must be less than max_context \(64\)"),
        ({"max_queued_tokens": 2047}, r"max_queued_tokens \(2047\) must not be less than max_context \(2048\)"),
        ({"timeout_s": float("nan")}, r"serve\.timeout_s"),
    ],
)
def test_settings_are_refused_when_one_is_wrong(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The message says which, and why."""
    with pytest.raises(ConfigurationError, match=message):
        ServeSettings.load(tmp_path, **flags)


def test_settings_are_refused_when_the_file_has_an_unknown_key(tmp_path: Path) -> None:
    """A misspelt key is an error, not a default."""
    (tmp_path / "hotswap.toml").write_text("[serve]\nprot = 2001\n")
    with pytest.raises(ConfigurationError, match="prot"):
        ServeSettings.load(tmp_path)


def _keys(database: Database, *, is_valid: bool) -> list[ApiKey]:
    service = KeyService(database)
    key, _ = service.create("web", scopes=["chat"])
    if not is_valid:
        service.revoke(key.id)
    return service.list()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_bind_is_refused_when_others_can_reach_it_and_no_key_is_valid(
    host: str, tmp_path: Path, database: Database
) -> None:
    """The error says what to do; a revoked key is as good as none."""
    settings = ServeSettings.load(tmp_path, host=host)
    for keys in ([], _keys(database, is_valid=False)):
        with pytest.raises(ConfigurationError, match=rf"serve\.host: {host} .*hotswap keys create NAME") as error:
            check_bind(settings, keys)
        assert "host" == error.value.param
    check_bind(settings, _keys(database, is_valid=True))


def test_bind_is_taken_when_it_is_loopback(tmp_path: Path) -> None:
    """No key is needed where only this machine can call."""
    settings = ServeSettings.load(tmp_path)
    check_bind(settings, [])
    assert settings.is_loopback


def test_port_is_refused_when_another_program_listens_on_it(tmp_path: Path) -> None:
    """The message names the port and what to do; once the other one is gone, the port can be had."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = ServeSettings.load(tmp_path, port=other.getsockname()[1])
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{settings.port}; stop it, or give another port"):
            check_port(settings)
    check_port(settings)
