"""Pins: an alias that is followed, or one version; bounded, and gone with what they name."""

from __future__ import annotations

import pytest

from adapters.database import open_database
from adapters.errors import ConflictError, InvalidInputError, InvalidNameError, NotFoundError
from adapters.pins import PinService
from adapters.registry import Registry
from tests.support.versions import publish_text


@pytest.fixture
def pins(registry: Registry) -> PinService:
    """Pins over the registry's database."""
    return PinService(registry.database)


def _digest(registry: Registry, name: str) -> str:
    return registry.find(name).version.digest


def test_pin_follows_the_alias_when_it_names_no_version(pins: PinService, registry: Registry) -> None:
    """What the alias points to is wanted, before and after it moves."""
    publish_text(registry, "one")
    pins.pin("legal", max_versions=3)
    assert (_digest(registry, "legal@v1"),) == pins.digests()
    publish_text(registry, "two")
    assert (_digest(registry, "legal@v2"),) == pins.digests()
    assert frozenset({"legal"}) == pins.names()


@pytest.mark.parametrize("by_digest", [False, True])
def test_pin_stays_with_its_version_when_the_alias_moves(by_digest: bool, pins: PinService, registry: Registry) -> None:
    """A version that is named by its digest is the same pin as by its number."""
    version = publish_text(registry, "one").version
    pins.pin(f"legal@{version.digest[:12]}" if by_digest else "legal@v1", max_versions=3)
    publish_text(registry, "two")
    assert (version.digest,) == pins.digests()
    assert frozenset({"legal@v1"}) == pins.names()
    pins.unpin("legal@v1")
    assert () == pins.digests()


def test_digests_begin_with_those_of_the_settings_when_there_are_both(pins: PinService, registry: Registry) -> None:
    """Each version once; an alias of the settings that is gone is left out."""
    for alias in ("legal", "medical", "support"):
        publish_text(registry, alias, alias=alias)
    pins.pin("legal", max_versions=9)
    pins.pin("support", max_versions=9)
    names = ("medical@v1", "support@v1", "legal@v1")
    expected = tuple(_digest(registry, name) for name in names)
    assert expected == pins.digests(("medical", "support", "gone"))


def test_pin_is_refused_and_changes_nothing_when_it_is_one_too_many(pins: PinService, registry: Registry) -> None:
    """Versions count, not names: two names for one version take one slot; those of the settings count too."""
    for alias, content in (("legal", "one"), ("twin", "one"), ("support", "two"), ("medical", "three")):
        publish_text(registry, content, alias=alias)
    pins.pin("legal", max_versions=2, always=["support"])
    pins.pin("twin", max_versions=2, always=["support"])
    with pytest.raises(ConflictError, match="3 versions would be pinned; at most 2 can be"):
        pins.pin("medical", max_versions=2, always=["support"])
    assert frozenset({"legal", "twin"}) == pins.names()


@pytest.mark.parametrize("name", ["nobody", "legal@v7"])
def test_pin_and_unpin_are_refused_when_there_is_no_such_version(
    name: str, pins: PinService, registry: Registry
) -> None:
    """Nothing is written for a name that stands for nothing."""
    publish_text(registry, "one")
    with pytest.raises(NotFoundError):
        pins.pin(name, max_versions=3)
    with pytest.raises(NotFoundError):
        pins.unpin(name)
    with pytest.raises(InvalidNameError):
        pins.unpin("LEGAL")
    assert frozenset() == pins.names()


def test_pin_and_unpin_are_done_once_when_repeated(pins: PinService, registry: Registry) -> None:
    """Both say what is wanted, so saying it again changes nothing."""
    publish_text(registry, "one")
    for _ in range(2):
        pins.pin("legal", max_versions=1)
    assert frozenset({"legal"}) == pins.names()
    for _ in range(2):
        pins.unpin("legal")
    assert frozenset() == pins.names()


def test_pins_go_with_what_they_name_when_it_is_removed(pins: PinService, registry: Registry) -> None:
    """A later alias or version of that name is not pinned by accident."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    for name in ("legal", "legal@v1", "legal@v2"):
        pins.pin(name, max_versions=9)
    registry.remove("legal@v1")
    assert frozenset({"legal", "legal@v2"}) == pins.names()
    registry.remove("legal")
    assert frozenset() == pins.names()


def test_pins_are_there_when_the_database_is_opened_again(pins: PinService, registry: Registry) -> None:
    """What was wanted before a restart is wanted after it."""
    publish_text(registry, "one")
    pins.pin("legal", max_versions=1)
    again = open_database(registry.database.engine.url.render_as_string(hide_password=False))
    assert frozenset({"legal"}) == PinService(again).names()
    again.close()


@pytest.mark.parametrize("name", ["tone", "tone@v1"])
def test_pin_is_refused_when_the_version_is_a_reward_model(name: str, pins: PinService, registry: Registry) -> None:
    """A slot is for what answers."""
    publish_text(registry, "one", alias="tone", kind="reward")
    with pytest.raises(InvalidInputError, match="tone@v1 is a reward model"):
        pins.pin(name, max_versions=3)
    assert frozenset() == pins.names()
    pins.unpin(name)
