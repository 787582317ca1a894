"""The router over a real database: trained by itself, followed by every process, rolled back, closed to strangers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import ConflictError
from adapters.experiments import ExperimentService
from adapters.records import Actor
from adapters.registry import Registry
from adapters.routing import training
from adapters.routing.embeddings import TokenEmbeddings, open_embeddings
from adapters.routing.rules import parse_rules
from adapters.routing.service import RoutingService
from adapters.tables import RouterRow
from tests.support.routing import (
    ABOUT_BREAD,
    ABOUT_LEASE,
    ABOUT_NOTHING,
    COOKING,
    LEGAL,
    MUSIC,
    NOTHING,
    PROMPTS,
)
from tests.support.versions import publish_text


@pytest.fixture
def service(registry: Registry) -> RoutingService:
    """A router without embeddings; nothing is published yet."""
    return RoutingService(registry, None, background=NOTHING)


@pytest.fixture
def trained(registry: Registry, service: RoutingService) -> RoutingService:
    """A router of three aliases."""
    for alias, prompts in PROMPTS.items():
        publish_text(registry, f"{alias} one", alias=alias, prompts=prompts)
    service.reconcile()
    return service


@pytest.fixture
def tiny_embeddings(tiny_folders: dict[str, Path]) -> TokenEmbeddings:
    """Those of a tiny base model."""
    found = open_embeddings(tiny_folders["llama"])
    assert found is not None
    return found


def _chosen(service: RoutingService, *turns: str) -> tuple[str, str]:
    decision = service.route(turns)
    return decision.alias, decision.route


def test_router_chooses_the_alias_when_a_text_is_like_its_prompts(trained: RoutingService) -> None:
    """With a confidence and the number of the router; a text of nobody's goes to the base model."""
    decision = trained.route([ABOUT_LEASE])
    assert ("legal", "router", 1) == (decision.alias, decision.route, decision.router)
    assert decision.confidence is not None
    assert 0.5 <= decision.confidence == pytest.approx(decision.probabilities["legal"])
    nothing = trained.route([ABOUT_NOTHING])
    assert ("base", "abstained") == (nothing.alias, nothing.route)
    assert nothing.confidence is not None
    assert nothing.confidence < 0.5


def test_router_abstains_when_its_threshold_is_not_reached(registry: Registry, trained: RoutingService) -> None:
    """The same text, the same router, another threshold."""
    confidence = trained.route([ABOUT_LEASE]).confidence
    assert confidence is not None
    strict = RoutingService(registry, None, background=NOTHING, threshold=(1 + confidence) / 2)
    strict.reconcile()
    assert ("base", "abstained") == _chosen(strict, ABOUT_LEASE)
    assert ("legal", "router") == _chosen(trained, ABOUT_LEASE)


@pytest.mark.parametrize("aliases", [(), ("legal",)])
def test_router_abstains_when_there_is_nothing_to_choose_between(
    aliases: tuple[str, ...], registry: Registry, service: RoutingService
) -> None:
    """And says so."""
    for alias in aliases:
        publish_text(registry, alias, alias=alias, prompts=PROMPTS[alias])
    service.reconcile()
    decision = service.route([ABOUT_LEASE])
    assert ("base", "abstained", None) == (decision.alias, decision.route, decision.confidence)
    assert f"two aliases with training prompts or more, found {', '.join(aliases) or 'none'}" in decision.reason


def test_conversation_stays_when_a_turn_says_little(trained: RoutingService) -> None:
    """It moves when the topic does; without any turn there is nothing to route."""
    assert ("legal", "router") == _chosen(trained, ABOUT_LEASE, "and then")
    assert ("cooking", "router") == _chosen(trained, ABOUT_LEASE, "and then", ABOUT_BREAD)
    assert ("base", "abstained") == _chosen(trained)


# Following the registry ----------------------------------------------------------------------------------------------


def _promote(registry: Registry) -> None:
    publish_text(registry, "legal two", alias="legal", prompts=MUSIC, promote=False)
    registry.promote("legal@v2")


def _publish(registry: Registry) -> None:
    publish_text(registry, "legal two", alias="legal", prompts=MUSIC)


@pytest.mark.parametrize("move", [_promote, _publish])
def test_router_is_trained_anew_when_an_alias_moves(
    move: Callable[[Registry], None], registry: Registry, trained: RoutingService
) -> None:
    """From the prompts of the version that the alias points to then; another process follows, and a rollback undoes."""
    other = RoutingService(registry, None, background=NOTHING)
    other.reconcile()
    registry.remove("music")
    move(registry)
    for process in (trained, other):
        process.reconcile()
        assert ("base", "abstained") == _chosen(process, ABOUT_LEASE)
        assert ("legal", "router") == _chosen(process, "which chords for this guitar melody")
    registry.rollback("legal")
    other.reconcile()
    assert ("legal", "router") == _chosen(other, ABOUT_LEASE)


def test_removed_alias_is_never_chosen_when_the_router_still_knows_it(
    registry: Registry, trained: RoutingService
) -> None:
    """Not even before the next training; and its prompts are forgotten at once."""
    registry.remove("legal")
    assert ("base", "abstained") == _chosen(trained, ABOUT_LEASE)
    assert "legal" not in {near.alias for near in trained.nearest(LEGAL[0])}
    trained.reconcile()
    assert {"cooking", "music"} == set(trained.route([ABOUT_LEASE]).probabilities)


def test_nothing_is_trained_when_nothing_has_changed(registry: Registry, trained: RoutingService) -> None:
    """However often and by however many processes it is looked at."""
    trained.reconcile()
    RoutingService(registry, None, background=NOTHING).reconcile()
    publish_text(registry, "legal two", alias="legal", promote=False, prompts=MUSIC)
    trained.reconcile()
    assert [1] == [router.number for router in trained.history(limit=9)]


def test_versions_have_equal_digests_when_prompts_are_kept_or_not(registry: Registry, service: RoutingService) -> None:
    """Prompts are no part of a version; published again without, it keeps those that it had."""
    kept = publish_text(registry, "one", alias="legal", prompts=LEGAL)
    again = publish_text(registry, "one", alias="legal")
    plain = publish_text(registry, "one", alias="cooking")
    assert kept.version.digest == again.version.digest == plain.version.digest
    publish_text(registry, "two", alias="cooking", prompts=COOKING)
    service.reconcile()
    assert ("legal", "router") == _chosen(service, ABOUT_LEASE)


def test_alias_without_prompts_is_never_chosen_when_it_keeps_none(registry: Registry, trained: RoutingService) -> None:
    """It can be given some later on."""
    publish_text(registry, "private", alias="private")
    trained.reconcile()
    assert "private" not in trained.route([ABOUT_LEASE]).probabilities
    assert 2 == trained.keep_prompts("private", ["zebra quantum volcano", "xylophone volcano zebra"])
    trained.reconcile()
    assert "private" in trained.route([ABOUT_LEASE]).probabilities
    trained.forget_prompts("private")
    trained.reconcile()
    assert "private" not in trained.route([ABOUT_LEASE]).probabilities


def test_earlier_router_counts_until_an_alias_moves_when_rolled_back(
    registry: Registry, trained: RoutingService
) -> None:
    """A rollback lasts although there is something else to train from; further back there is nothing."""
    publish_text(registry, "legal two", alias="legal", prompts=MUSIC)
    trained.reconcile()
    assert 1 == trained.rollback()
    other = RoutingService(registry, None, background=NOTHING)
    for process in (trained, other):
        process.reconcile()
        assert ("legal", "router") == _chosen(process, ABOUT_LEASE)
    assert [(2, False), (1, True)] == [(router.number, router.is_current) for router in trained.history(limit=9)]
    with pytest.raises(ConflictError, match="no earlier router"):
        trained.rollback()
    publish_text(registry, "cooking two", alias="cooking", prompts=COOKING)
    other.reconcile()
    assert 3 == other.snapshot.number


def test_earlier_router_is_that_which_counted_when_rolled_back_twice(
    registry: Registry, trained: RoutingService
) -> None:
    """A router that was rolled back from is not gone back to."""
    publish_text(registry, "legal two", alias="legal", prompts=MUSIC)
    trained.reconcile()
    assert 1 == trained.rollback()
    publish_text(registry, "cooking two", alias="cooking", prompts=COOKING[:4])
    trained.reconcile()
    assert 3 == trained.snapshot.number
    assert 1 == trained.rollback()


@pytest.mark.parametrize("content", [b"other", None])
def test_router_is_trained_anew_when_what_is_stored_is_of_no_use(
    content: bytes | None, registry: Registry, trained: RoutingService
) -> None:
    """Damaged, which its hash tells, or gone: whoever only reads abstains and says why, the next training mends it."""
    with registry.database.write() as session:
        session.get_one(RouterRow, 1).content = content
    other = RoutingService(registry, None, background=NOTHING)
    other.read()
    assert "router 1 is " in other.route([ABOUT_LEASE]).reason
    other.reconcile()
    assert ("legal", "router") == _chosen(other, ABOUT_LEASE)
    assert 2 == other.snapshot.number
    trained.reconcile()
    assert 2 == trained.snapshot.number


def test_rules_and_rollbacks_are_followed_when_training_fails(
    registry: Registry, trained: RoutingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be trained must not keep a process from what its operator orders."""
    other = RoutingService(registry, None, background=NOTHING)
    other.reconcile()
    publish_text(registry, "legal two", alias="legal", prompts=MUSIC)

    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(training, "train_router", fail)
    trained.set_rules(parse_rules(_rules({"alias": "music", "matches": "."})))
    with pytest.raises(MemoryError):
        other.reconcile()
    assert ("music", "rule") == _chosen(other, ABOUT_LEASE)


def test_two_servers_train_once_each_when_their_base_models_differ(
    registry: Registry, trained: RoutingService, tiny_embeddings: TokenEmbeddings
) -> None:
    """Else they would train in turn for ever; the one that came first abstains and says why."""
    other = RoutingService(registry, tiny_embeddings, background=NOTHING)
    for process in (other, trained, other, trained):
        process.reconcile()
    assert 2 == len(trained.history(limit=9))
    assert ("legal", "router") == _chosen(other, ABOUT_LEASE)
    assert "another base model" in trained.route([ABOUT_LEASE]).reason
    with pytest.raises(ConflictError, match="no earlier router"):
        other.rollback()


def test_older_alias_is_chosen_when_another_has_its_prompts(registry: Registry, trained: RoutingService) -> None:
    """A second alias of the same data takes nothing from what is in use; whoever may use it alone gets it."""
    publish_text(registry, "again", alias="a-legal", prompts=LEGAL)
    trained.reconcile()
    assert ("legal", "router") == _chosen(trained, ABOUT_LEASE)
    limited = trained.acting_for(Actor("key-1", aliases=frozenset({"a-legal", "base"})))
    assert ("a-legal", "router") == _chosen(limited, ABOUT_LEASE)
    assert {"a-legal"} == set(limited.route([ABOUT_LEASE]).probabilities)
    registry.remove("legal")
    assert ("a-legal", "router") == _chosen(trained, ABOUT_LEASE)


def test_nothing_is_trained_when_all_aliases_share_their_prompts(registry: Registry, service: RoutingService) -> None:
    """There is nothing to choose between, and that is said."""
    for alias in ("one", "two"):
        publish_text(registry, alias, alias=alias, prompts=LEGAL)
    service.reconcile()
    assert "one, two share theirs" in service.route([ABOUT_LEASE]).reason


def test_forgotten_prompts_are_in_no_router_when_asked_for(registry: Registry, trained: RoutingService) -> None:
    """A stored router holds words of its prompts: it goes with them, and nobody can roll back to it."""
    trained.forget_prompts("music")
    with registry.database.read() as session:
        assert session.get_one(RouterRow, 1).content is None
    assert [] == [near for near in trained.nearest(MUSIC[0]) if near.alias == "music"]
    trained.reconcile()
    assert ("legal", "router") == _chosen(trained, ABOUT_LEASE)
    with pytest.raises(ConflictError, match="no earlier router"):
        trained.rollback()


def test_nearest_prompts_are_left_out_when_others_have_taken_their_place(
    registry: Registry, trained: RoutingService
) -> None:
    """The router knows places, and in those stand other texts; what shares no word is not near."""
    assert "legal" in {near.alias for near in trained.nearest(LEGAL[0])}
    trained.keep_prompts("legal", MUSIC)
    assert "legal" not in {near.alias for near in trained.nearest(LEGAL[0])}
    assert [] == trained.nearest("qqqq")


# Rules and keys ------------------------------------------------------------------------------------------------------


def _rules(*rules: dict[str, object]) -> dict[str, object]:
    return {"rules": list(rules)}


def test_rule_goes_before_the_router_when_it_holds(registry: Registry, trained: RoutingService) -> None:
    """In every process, at its next look; the first of several."""
    rules = _rules({"name": "a", "alias": "music", "matches": "landlord"}, {"alias": "cooking", "matches": "."})
    trained.set_rules(parse_rules(rules))
    other = RoutingService(registry, None, background=NOTHING)
    other.reconcile()
    for process in (trained, other):
        decision = process.route([ABOUT_LEASE])
        assert ("music", "rule", "a", None) == (decision.alias, decision.route, decision.rule, decision.confidence)
    trained.set_rules(())
    assert ("legal", "router") == _chosen(trained, ABOUT_LEASE)


def test_rule_is_passed_over_when_its_alias_may_not_answer(registry: Registry, trained: RoutingService) -> None:
    """Whether it is hidden from the key or not there at all."""
    rules = _rules({"alias": "absent", "matches": "."}, {"alias": "music", "matches": "."})
    trained.set_rules(parse_rules(rules))
    limited = trained.acting_for(Actor("key-1", aliases=frozenset({"legal"})))
    assert ("music", "rule") == _chosen(trained, ABOUT_LEASE)
    assert ("legal", "router") == _chosen(limited, ABOUT_LEASE)


def test_key_is_routed_to_its_own_aliases_when_it_is_limited(trained: RoutingService) -> None:
    """What belongs to another's alias is not given to its own; probabilities and prompts of others are not shown."""
    limited = trained.acting_for(Actor("key-1", aliases=frozenset({"cooking", "base"})))
    decision = limited.route([ABOUT_LEASE])
    assert ("base", "abstained", {"cooking"}) == (decision.alias, decision.route, set(decision.probabilities))
    assert {"cooking"} == {near.alias for near in limited.nearest(ABOUT_LEASE)}
    assert ("cooking", "router") == _chosen(limited, ABOUT_BREAD)


def test_nearest_prompts_are_shown_with_their_text_when_explained(trained: RoutingService) -> None:
    """As they were given."""
    first, *_ = trained.nearest("may my landlord keep the deposit?")
    assert ("legal", LEGAL[0]) == (first.alias, first.text)


def test_sources_are_those_of_the_alias_when_an_experiment_splits_it(
    registry: Registry, trained: RoutingService
) -> None:
    """An experiment moves no alias, so nothing is trained for it."""
    publish_text(registry, "legal two", alias="legal", promote=False, prompts=MUSIC)
    ExperimentService(registry.database).create("legal", [("A", "v1", 50.0), ("B", "v2", 50.0)])
    trained.reconcile()
    assert [1] == [router.number for router in trained.history(limit=9)]
