"""The registry: versions never change, names move."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from adapters.assignment import assign_arm
from adapters.errors import ConflictError, IntegrityError, InvalidNameError, NotFoundError, PermissionDeniedError
from adapters.experiment_evaluation import ExperimentEvaluation
from adapters.experiments import ExperimentService
from adapters.manifest import BaseReference, Manifest
from adapters.records import Actor, Binding, Exposure, Feedback, NumberedVersion
from adapters.registry import Registry
from adapters.store import ArtifactStore
from adapters.tables import AliasVersionRow, VersionRow
from tests.support.kill_points import open_home
from tests.support.tiny import make_manifest
from tests.support.versions import PLAIN_MANIFEST, publish_text, write_files


def test_publish_registers_nothing_when_what_belongs_to_it_fails(registry: Registry, tmp_path: Path) -> None:
    """The version, its alias and the caller's rows become visible together, or none of them."""

    def refuse(session: Session, published: NumberedVersion) -> None:
        assert published.label == "legal@v1"
        raise ConflictError("the job was cancelled")

    with pytest.raises(ConflictError, match="cancelled"):
        registry.publish(write_files(tmp_path / "a", "one"), PLAIN_MANIFEST, alias="legal", also=refuse)
    assert registry.aliases() == []
    assert registry.versions("legal") == []


@pytest.fixture
def experiments(registry: Registry) -> ExperimentService:
    """Experiments over the registry's database."""
    return ExperimentService(registry.database)


def _moves(registry: Registry, alias: str = "legal") -> list[tuple[str, int | None, int]]:
    return [(change.action, change.from_number, change.to_number) for change in registry.history(alias)]


def _split(experiments: ExperimentService) -> str:
    return experiments.create("legal", [("A", "v1", 50), ("B", "v2", 50)]).id


def test_publish_points_the_alias_to_version_one_when_it_is_new(registry: Registry, tmp_path: Path) -> None:
    """What is recorded about the version comes from the manifest."""
    version, moved = registry.publish(write_files(tmp_path / "a", "one"), PLAIN_MANIFEST, alias="legal")
    assert (version.label, moved) == ("legal@v1", True)
    alias = registry.alias("legal")
    assert (version, 1, None) == (alias.current, alias.num_versions, alias.experiment_id)
    found = version.version
    assert ("f" * 64, 4, "imported", len("{}one")) == (
        found.base_fingerprint,
        found.rank,
        found.source,
        found.size_bytes,
    )
    assert found.digest == registry.store.verify(found.digest).digest
    assert _moves(registry) == [("publish", None, 1)]


def test_publish_moves_the_alias_when_a_second_version_comes(registry: Registry) -> None:
    """Versions are numbered upwards, and the first stays what it was."""
    first = publish_text(registry, "one")
    second = publish_text(registry, "two")
    assert [first, second] == registry.versions("legal")
    assert [first.number, second.number] == [1, 2]
    assert second == registry.find("legal")
    assert first == registry.find("legal@v1")


def test_publish_gives_the_same_number_when_the_content_is_equal(registry: Registry) -> None:
    """Publishing twice is harmless; it moves the alias back to the version if it stood elsewhere."""
    first = publish_text(registry, "one")
    publish_text(registry, "two")
    assert first == publish_text(registry, "one", promote=False)
    assert registry.find("legal").number == 2
    assert first == publish_text(registry, "one")
    assert registry.find("legal").number == 1
    assert [version.number for version in registry.versions("legal")] == [1, 2]


def test_publish_leaves_the_alias_when_told_not_to_promote(registry: Registry, tmp_path: Path) -> None:
    """The version can be called by its number only."""
    publish_text(registry, "one")
    version, moved = registry.publish(write_files(tmp_path / "b", "two"), PLAIN_MANIFEST, alias="legal", promote=False)
    assert (version.number, moved) == (2, False)
    assert registry.find("legal").number == 1
    assert version == registry.find("legal@v2")


def test_alias_points_nowhere_when_its_first_version_is_not_promoted(registry: Registry) -> None:
    """The version answers by its own name; the alias says what to do, and is listed apart until it is promoted."""
    first = publish_text(registry, "one", promote=False)
    assert first == registry.find("legal@v1")
    assert registry.resolve("legal@v1", unit="anybody").digest == first.version.digest
    assert (registry.aliases(), registry.unpromoted()) == ([], ["legal"])
    for call in (registry.alias, registry.find, partial(registry.resolve, unit="anybody")):
        with pytest.raises(NotFoundError, match=r"no version of 'legal' has been promoted; .* promote it: legal@v1"):
            call("legal")
    assert registry.promote("legal@v1").current == first
    assert (registry.alias("legal").current, registry.unpromoted()) == (first, [])


def test_unpromoted_alias_is_gone_when_its_versions_are_removed(registry: Registry) -> None:
    """One by one or all at once."""
    publish_text(registry, "one", promote=False)
    assert registry.remove("legal@v1") == ["legal@v1"]
    publish_text(registry, "two", promote=False)
    assert registry.remove("legal") == ["legal@v2"]
    assert registry.unpromoted() == []
    with pytest.raises(NotFoundError, match="there is no adapter 'legal'"):
        registry.find("legal@v2")


def test_publish_asks_where_the_alias_points_when_promotion_depends_on_it(registry: Registry) -> None:
    """In the transaction: a version that was compared with another than the present one does not take its place."""
    asked: list[int | None] = []

    def only_over_two(number: int | None) -> bool:
        asked.append(number)
        return number == 2

    for content in ("one", "two"):
        publish_text(registry, content)
    for content in ("three", "four"):
        source = write_files(registry.store.root.parent / "sources" / content, content)
        registry.publish(source, PLAIN_MANIFEST, alias="legal", promote=only_over_two)
    assert (asked, registry.find("legal").number) == ([2, 3], 3)


def test_publish_leaves_the_alias_when_an_experiment_runs(
    registry: Registry, experiments: ExperimentService, tmp_path: Path
) -> None:
    """A running experiment is not disturbed by a job that ends in its midst."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    name = _split(experiments)
    version, moved = registry.publish(write_files(tmp_path / "c", "three"), PLAIN_MANIFEST, alias="legal")
    assert (version.number, moved) == (3, False)
    assert registry.find("legal").number == 2
    experiments.stop(name)
    assert publish_text(registry, "four").number == 4
    assert registry.find("legal").number == 4


@pytest.mark.parametrize("alias", ["base", "auto", "Legal", "../legal", "legal@v1", ""])
def test_publish_refuses_when_the_alias_breaks_the_grammar(registry: Registry, tmp_path: Path, alias: str) -> None:
    """Nothing is stored under a name that can't be called."""
    with pytest.raises(InvalidNameError):
        registry.publish(write_files(tmp_path / "a", "one"), PLAIN_MANIFEST, alias=alias)
    assert set() == registry.store.digests()


def test_publish_shares_the_version_when_two_aliases_have_equal_content(registry: Registry) -> None:
    """Content is stored once; removing it from one alias leaves it to the other."""
    legal = publish_text(registry, "one", alias="legal")
    medical = publish_text(registry, "one", alias="medical")
    assert legal.version == medical.version
    assert registry.remove("legal") == ["legal@v1"]
    assert medical.version.digest == registry.store.verify(medical.version.digest).digest
    assert registry.remove("medical") == ["medical@v1"]
    assert set() == registry.store.digests()


def test_publish_gives_other_versions_when_the_base_differs(
    registry: Registry, reference: BaseReference, tmp_path: Path
) -> None:
    """The same weights for another base model are another version."""
    source = write_files(tmp_path / "a", "one")
    other = reference.model_copy(update={"fingerprint": "e" * 64})
    first, _ = registry.publish(source, make_manifest(reference), alias="legal")
    second, _ = registry.publish(source, make_manifest(other), alias="legal")
    assert [first.number, second.number] == [1, 2]
    assert first.version.digest != second.version.digest


def test_publish_numbers_without_gaps_when_threads_publish_at_once(registry: Registry, tmp_path: Path) -> None:
    """Each publisher gets a number of its own."""
    numbers: list[int] = []
    start = threading.Barrier(4)

    def publish(index: int) -> None:
        source = write_files(tmp_path / f"s{index}", f"content {index}")
        start.wait()
        numbers.append(registry.publish(source, PLAIN_MANIFEST, alias="legal")[0].number)

    threads = [threading.Thread(target=publish, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4]


def test_promote_points_the_alias_when_given_a_number_or_a_digest(registry: Registry) -> None:
    """Both ways to name a version work, and the move stands in the history."""
    first = publish_text(registry, "one")
    second = publish_text(registry, "two")
    assert first == registry.promote("legal@v1").current
    assert second == registry.promote(f"legal@{second.version.digest[:12]}").current
    assert _moves(registry) == [("publish", None, 1), ("publish", 1, 2), ("promote", 2, 1), ("promote", 1, 2)]


def test_promote_adds_no_history_when_the_alias_is_there_already(registry: Registry) -> None:
    """A move to where it stands is no move."""
    publish_text(registry, "one")
    registry.promote("legal@v1")
    assert _moves(registry) == [("publish", None, 1)]


def test_promote_refuses_when_no_version_is_named(registry: Registry) -> None:
    """The message shows what to write."""
    publish_text(registry, "one")
    with pytest.raises(ConflictError, match="for example legal@v1"):
        registry.promote("legal")


def test_promote_refuses_when_the_version_belongs_to_another_alias(registry: Registry) -> None:
    """A digest counts only among the alias's own versions."""
    publish_text(registry, "one")
    other = publish_text(registry, "two", alias="medical")
    with pytest.raises(NotFoundError, match="0 versions of 'legal'"):
        registry.promote(f"legal@{other.version.digest}")


def test_rollback_goes_further_back_when_repeated(registry: Registry) -> None:
    """Three versions up, two steps back, and then there is nothing left."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    assert registry.rollback("legal").current.number == 2
    assert registry.rollback("legal").current.number == 1
    with pytest.raises(ConflictError, match="no earlier version"):
        registry.rollback("legal")
    assert _moves(registry)[3:] == [("rollback", 3, 2), ("rollback", 2, 1)]


def test_rollback_goes_to_where_the_alias_stood_when_it_was_promoted(registry: Registry) -> None:
    """Before is meant in time, not in number."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    registry.promote("legal@v1")
    assert registry.rollback("legal").current.number == 3
    assert registry.rollback("legal").current.number == 2


def test_rollback_forgets_what_it_left_when_something_new_is_published(registry: Registry) -> None:
    """After going back from v2 and publishing v3, rolling back leads to v1, never to the bad v2."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    registry.rollback("legal")
    publish_text(registry, "three")
    assert registry.rollback("legal").current.number == 1


def test_rollback_skips_a_version_when_it_was_removed(registry: Registry) -> None:
    """The trail leads over what is still there."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    registry.remove("legal@v2")
    assert registry.rollback("legal").current.number == 1


def test_rollback_refuses_when_only_one_version_was_ever_pointed_to(registry: Registry) -> None:
    """A candidate that the alias never stood on is nothing to go back to."""
    publish_text(registry, "one")
    publish_text(registry, "two", promote=False)
    with pytest.raises(ConflictError, match="'legal' has no earlier version"):
        registry.rollback("legal")


def test_remove_deletes_the_version_when_nothing_points_to_it(registry: Registry) -> None:
    """Row and files go; the number is never given again."""
    first = publish_text(registry, "one")
    publish_text(registry, "two")
    assert registry.remove("legal@v1") == ["legal@v1"]
    assert first.version.digest not in registry.store.digests()
    with pytest.raises(NotFoundError, match="has no version v1; it has v2"):
        registry.find("legal@v1")
    assert publish_text(registry, "one").number == 3


def test_remove_refuses_when_the_alias_points_to_the_version(registry: Registry) -> None:
    """What answers requests can't be taken away."""
    version = publish_text(registry, "one")
    with pytest.raises(ConflictError, match="'legal' points to v1"):
        registry.remove("legal@v1")
    with pytest.raises(ConflictError, match="'legal' points to v1"):
        registry.remove(f"legal@{version.version.digest}")
    assert version == registry.find("legal")
    assert {version.version.digest} == registry.store.digests()


def test_remove_never_reuses_numbers_when_the_alias_is_published_again(registry: Registry) -> None:
    """`legal@v1` in an old log never means other content; nor does rolling back cross the removal."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    assert registry.remove("legal") == ["legal@v1", "legal@v2"]
    assert registry.aliases() == []
    assert set() == registry.store.digests()
    assert publish_text(registry, "one").number == 3
    assert [version.number for version in registry.versions("legal")] == [3]
    with pytest.raises(ConflictError, match="no earlier version"):
        registry.rollback("legal")


def test_moves_are_refused_when_an_experiment_runs(registry: Registry, experiments: ExperimentService) -> None:
    """Promote, rollback and remove name the experiment to stop, and change nothing."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    publish_text(registry, "three", promote=False)
    name = _split(experiments)
    moves: list[Callable[[], object]] = [
        lambda: registry.promote("legal@v1"),
        lambda: registry.rollback("legal"),
        lambda: registry.remove("legal@v3"),
        lambda: registry.remove("legal"),
    ]
    for move in moves:
        with pytest.raises(ConflictError, match=f"experiment {name} is running on 'legal'"):
            move()
    assert [version.number for version in registry.versions("legal")] == [1, 2, 3]
    assert name == registry.alias("legal").experiment_id
    experiments.stop(name)
    assert registry.promote("legal@v1").current.number == 1


@pytest.mark.parametrize("name", ["legal", "legal@v9", f"legal@{'0' * 64}", "other", "other@v1"])
def test_unknown_names_raise_when_asked_for(registry: Registry, name: str) -> None:
    """Nothing falls back to the base model or to another version."""
    if name.startswith("legal@"):
        publish_text(registry, "one")
    acts: list[Callable[[], object]] = [
        lambda: registry.resolve(name, unit="u"),
        lambda: registry.find(name),
        lambda: registry.remove(name),
        lambda: registry.promote(name if "@" in name else f"{name}@v1"),
    ]
    for act in acts:
        with pytest.raises(NotFoundError):
            act()


def test_unknown_alias_lists_the_known_names_when_refused(registry: Registry) -> None:
    """The message helps with a typing error."""
    publish_text(registry, "one")
    publish_text(registry, "two", alias="medical")
    with pytest.raises(NotFoundError, match="no adapter 'legl'; known: base, legal, medical"):
        registry.resolve("legl", unit="u")


def test_resolve_gives_the_base_when_asked_for_it(registry: Registry) -> None:
    """Only the name `base` leads to the base model."""
    assert Binding("base", "base") == registry.resolve("base", unit="u")


def test_resolve_gives_the_present_version_when_asked_for_an_alias(registry: Registry) -> None:
    """The binding holds the digest, and a later move doesn't change it."""
    first = publish_text(registry, "one")
    binding = registry.resolve("legal", unit="u")
    assert Binding("legal", "alias", first.version.digest, 1) == binding
    second = publish_text(registry, "two")
    assert Binding("legal", "alias", second.version.digest, 2) == registry.resolve("legal", unit="u")
    assert first.version.digest == binding.digest


@pytest.mark.parametrize("length", [8, 64])
def test_resolve_gives_the_named_version_when_number_or_digest_is_given(registry: Registry, length: int) -> None:
    """A pinned name ignores where the alias points."""
    first = publish_text(registry, "one")
    publish_text(registry, "two")
    expected = Binding("legal", "version", first.version.digest, 1)
    assert expected == registry.resolve("legal@v1", unit="u")
    assert expected == registry.resolve(f"legal@{first.version.digest[:length]}", unit="u")


def test_resolve_splits_by_unit_when_an_experiment_runs(registry: Registry, experiments: ExperimentService) -> None:
    """Each unit gets its arm's version, always the same; a pinned name stays outside; stopping ends the split."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    publish_text(registry, "three")
    experiment = experiments.create("legal", [("A", "v1", 50), ("B", "v2", 50)], salt="salt")
    seen = set()
    for index in range(40):
        arm = assign_arm(experiment.arms, "salt", f"user-{index}")
        expected = Binding("legal", "experiment", arm.digest, arm.number, experiment.id, arm.name, stage=1)
        assert expected == registry.resolve("legal", unit=f"user-{index}")
        seen.add(arm.name)
    assert {"A", "B"} == seen
    assert registry.resolve("legal@v3", unit="user-0").route == "version"
    experiments.stop(experiment.id)
    assert (registry.resolve("legal", unit="user-0").route, registry.find("legal").number) == ("alias", 3)


@pytest.mark.parametrize("name", ["auto", "base@v1", "Legal", "legal@", "../../etc/passwd", ""])
def test_resolve_refuses_when_the_name_breaks_the_grammar(registry: Registry, name: str) -> None:
    """A broken name is told apart from an unknown one."""
    with pytest.raises(InvalidNameError):
        registry.resolve(name, unit="u")


def test_find_refuses_when_a_digest_prefix_is_ambiguous(registry: Registry, tmp_path: Path) -> None:
    """A prefix that fits two versions binds neither; two digests of one alias are made to collide in the database."""
    version = publish_text(registry, "one")
    twin = version.version.digest[:32] + "0" * 32
    with registry.database.write() as session:
        row = session.get_one(VersionRow, version.version.digest)
        columns = {column.key: getattr(row, column.key) for column in VersionRow.__table__.columns}
        session.add(VersionRow(**{**columns, "digest": twin}))
        session.flush()
        session.add(AliasVersionRow(alias="legal", number=2, digest=twin))
    with pytest.raises(NotFoundError, match="2 versions of 'legal' have a digest that begins"):
        registry.resolve(f"legal@{twin[:12]}", unit="u")
    assert registry.find(f"legal@{twin}").number == 2


def test_aliases_are_sorted_when_listed(registry: Registry) -> None:
    """All that point somewhere are listed, in the order of their names."""
    for name in ("medical", "legal", "support"):
        publish_text(registry, name, alias=name)
    registry.remove("support")
    assert [alias.name for alias in registry.aliases()] == ["legal", "medical"]
    assert (registry.versions("support"), registry.versions("never")) == ([], [])


def test_state_is_the_same_when_another_registry_opens_it(registry: Registry, tmp_path: Path) -> None:
    """All state lies in the database and the store, none in the object."""
    publish_text(registry, "one")
    publish_text(registry, "two")
    other = open_home(tmp_path)
    assert registry.aliases() == other.aliases()
    registry.rollback("legal")
    assert other.resolve("legal", unit="u").number == 1
    assert registry.history("legal") == other.history("legal")
    other.database.close()


def test_promote_leaves_the_alias_when_the_versions_files_are_damaged(registry: Registry) -> None:
    """A version that no server could load is refused before the alias moves to it."""
    publish_text(registry, "one")
    damaged = publish_text(registry, "two")
    registry.promote("legal@v1")
    (registry.store.folder(damaged.version.digest) / "adapter_model.safetensors").write_text("damaged")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        registry.promote("legal@v2")
    assert "legal@v1" == registry.alias("legal").current.label


class _InterruptedStore(ArtifactStore):
    """A store in which something else happens while a version is verified."""

    def __init__(self, root: Path, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self._meanwhile = meanwhile

    def verify(self, digest: str) -> Manifest:
        """Check, after what happens meanwhile."""
        self._meanwhile()
        return super().verify(digest)


@pytest.mark.parametrize("move", [lambda registry: registry.promote("legal@v1"), lambda r: r.rollback("legal")])
def test_others_can_write_when_a_version_is_verified_for_a_move(
    registry: Registry, move: Callable[[Registry], object]
) -> None:
    """Hashing gigabytes inside the transaction would make every exposure and every job wait for it."""
    for content in ("one", "two"):
        publish_text(registry, content)
    store = _InterruptedStore(registry.store.root, lambda: publish_text(registry, "other", alias="support"))
    move(Registry(registry.database, store))
    assert ["legal@v1", "support@v1"] == [alias.current.label for alias in registry.aliases()]


def test_rollback_is_refused_when_the_alias_moves_while_the_version_is_verified(registry: Registry) -> None:
    """What was verified is no longer what it would go back to."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    store = _InterruptedStore(registry.store.root, lambda: registry.rollback("legal"))
    with pytest.raises(ConflictError, match="at the same time"):
        Registry(registry.database, store).rollback("legal")
    assert "legal@v2" == registry.alias("legal").current.label


# What an actor may not see -------------------------------------------------------------------------------------------


def test_hidden_alias_is_refused_in_the_words_for_an_absent_one_when_an_actor_is_limited(registry: Registry) -> None:
    """By every act and every way to name it; nothing else that is hidden is named either."""
    hidden = publish_text(registry, "hidden", alias="medical")
    publish_text(registry, "more", alias="medical")
    ExperimentService(registry.database).create("medical", [("A", "v1", 50), ("B", "v2", 50)])
    publish_text(registry, "one", alias="legal")
    limited = registry.acting_for(Actor("key-1", aliases=frozenset({"legal"})))
    for suffix in ("", "@v1", "@v9", f"@{hidden.version.digest[:12]}"):
        for act in (
            limited.find,
            limited.promote,
            limited.rollback,
            limited.remove,
            limited.alias,
            lambda name: limited.resolve(name, unit="u"),
        ):
            messages = []
            for alias in ("medical", "nobody"):
                with pytest.raises((NotFoundError, ConflictError)) as error:
                    act(alias + suffix)
                messages.append(str(error.value).replace(alias, "X"))
            assert messages[0] == messages[1]
            assert "medical" not in messages[1]
    assert ["legal"] == [alias.name for alias in limited.aliases()]
    assert ([], []) == (limited.versions("medical"), limited.history("medical"))
    assert 2 == len(registry.versions("medical"))


def test_base_model_is_hidden_when_an_actor_is_limited_to_aliases(registry: Registry) -> None:
    """It has to be named like any alias."""
    publish_text(registry, "one", alias="legal")
    limited = registry.acting_for(Actor("key-1", aliases=frozenset({"legal"})))
    with pytest.raises(NotFoundError, match=r"known: legal$"):
        limited.resolve("base", unit="u")
    named = registry.acting_for(Actor("key-1", aliases=frozenset({"base"})))
    assert "base" == named.resolve("base", unit="u").route
    with pytest.raises(NotFoundError, match=r"known: base$"):
        named.resolve("legal", unit="u")


def test_publish_is_refused_when_an_actor_is_limited_to_other_aliases(registry: Registry) -> None:
    """Whether the alias exists or not; nothing is stored."""
    publish_text(registry, "one", alias="medical")
    limited = registry.acting_for(Actor("key-1", aliases=frozenset({"legal"})))
    for alias in ("medical", "nobody"):
        with pytest.raises(PermissionDeniedError, match=f"may not publish under '{alias}'"):
            publish_text(limited, "two", alias=alias)
    assert 1 == len(registry.versions("medical"))
    assert "legal@v1" == publish_text(limited, "two", alias="legal").label


def test_experiments_are_hidden_when_an_actor_may_not_see_their_alias(registry: Registry) -> None:
    """By id and by alias, in reports, lists and feedback."""
    for content in ("one", "two"):
        publish_text(registry, content, alias="medical")
    service = ExperimentService(registry.database)
    experiment = service.create("medical", [("A", "v1", 50), ("B", "v2", 50)])
    service.record_exposure(
        Exposure("r1", Binding("medical", "version", "d", 1), "u", "user", 1, 1, 1.0, 1.0, "stop", None)
    )
    limited = service.acting_for(Actor("key-1", aliases=frozenset({"legal"})))
    reports = ExperimentEvaluation(registry).acting_for(limited.database.actor)
    for act in (limited.get, reports.report, limited.stop):
        for name in (experiment.id, "medical"):
            with pytest.raises(NotFoundError, match="there is no experiment"):
                act(name)
    with pytest.raises(NotFoundError, match="there is no adapter 'medical'"):
        limited.create("medical", [("A", "v1", 50), ("B", "v2", 50)])
    with pytest.raises(NotFoundError, match="there is no response 'r1'"):
        limited.record_feedback(Feedback("r1", "ok", 1.0))
    assert [] == limited.list()
    assert [experiment] == service.list()
    service.record_feedback(Feedback("r1", "ok", 1.0))


def test_alias_stays_with_its_kind_when_a_version_of_another_is_published(registry: Registry) -> None:
    """What answers clients must not become what can't answer; the version has its number all the same."""
    publish_text(registry, "one")
    judge = publish_text(registry, "two", kind="reward")
    assert ("legal@v2", "reward") == (judge.label, judge.version.kind)
    assert 1 == registry.alias("legal").current.number
    with pytest.raises(ConflictError, match=r"legal@v2 is a reward model and 'legal' points to v1, which is not"):
        registry.promote("legal@v2")
    assert 1 == registry.alias("legal").current.number
    publish_text(registry, "three", alias="tone", kind="reward")
    publish_text(registry, "four", alias="tone", kind="reward")
    assert 2 == registry.alias("tone").current.number


def test_kind_is_the_manifests_own_when_a_metric_is_called_so(registry: Registry, tmp_path: Path) -> None:
    """Metrics come from whoever made the archive; a version for chat can't be made out to be a reward model."""
    manifest = PLAIN_MANIFEST.model_copy(update={"metrics": {"kind": "reward", "loss": 0.5}})
    version, _ = registry.publish(write_files(tmp_path / "source", "one"), manifest, alias="legal")
    assert ("chat", {"loss": 0.5}) == (version.version.kind, version.version.metrics)
