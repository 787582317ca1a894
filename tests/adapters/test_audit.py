"""The audit log: every administrative act leaves a row, in the act's own transaction, under the name of who did it."""

from __future__ import annotations

import io
from typing import get_args

import pytest

from adapters.audit import AuditLog
from adapters.errors import HotswapError
from adapters.experiment_acts import undo
from adapters.experiment_evaluation import ExperimentEvaluation
from adapters.experiments import ExperimentService
from adapters.files import FileService
from adapters.jobs import JobOrder, JobService
from adapters.keys import KeyService
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.pins import PinService
from adapters.records import Actor, AnalysisPlan, AuditAction, AuditEntry
from adapters.registry import Registry
from adapters.routing.service import RoutingService
from adapters.shadows import ShadowService
from tests.support.conversations import easy_rows, write_rows
from tests.support.experiments import ERRORS, add_users
from tests.support.routing import COOKING, LEGAL, MUSIC, NOTHING
from tests.support.versions import PLAIN_MANIFEST, publish_text, write_files

HALVES = [("A", "v1", 50.0), ("B", "v2", 50.0)]


def _log(registry: Registry) -> list[AuditEntry]:
    return AuditLog(registry.database).list(limit=100)


def _acts(registry: Registry) -> list[tuple[str, str]]:
    """Oldest first."""
    return [(entry.action, entry.subject) for entry in reversed(_log(registry))]


def _move_versions(registry: Registry) -> list[tuple[str, str]]:
    publish_text(registry, "one")
    trained = PLAIN_MANIFEST.model_copy(update={"source": "trained"})
    source = write_files(registry.store.root.parent / "trained", "two")
    registry.publish(source, trained, alias="legal", promote=False, action="import")
    registry.promote("legal@v2")
    registry.rollback("legal")
    return [("publish", "legal@v1"), ("import", "legal@v2"), ("promote", "legal"), ("rollback", "legal")]


def _run_experiments(registry: Registry) -> list[tuple[str, str]]:
    experiments = ExperimentService(registry.database)
    first = experiments.create("legal", HALVES)
    experiments.stop("legal")
    experiments.set_holdout("legal", 5)
    second = experiments.create("legal", HALVES, plan=AnalysisPlan(guardrails=(ERRORS,)), draft=True)
    experiments.start(second.id)
    experiments.change_weights(second.id, [("A", None, 80), ("B", None, 20)])
    evaluation = ExperimentEvaluation(registry)
    evaluation.accept_feedback(second.id, "known")
    evaluation.accept_guardrail(second.id, "error_rate", "known")
    add_users(registry, experiments.get(second.id), "A", [None] * 300)
    evaluation.accept_split(second.id, "a robot")
    evaluation.promote(second.id, "B")
    undo(registry, second.id)
    return [
        ("start_experiment", first.id),
        ("stop_experiment", first.id),
        ("set_holdout", "legal"),
        ("create_experiment", second.id),
        ("start_experiment", second.id),
        ("change_weights", second.id),
        ("accept_feedback", second.id),
        ("accept_guardrail", second.id),
        ("accept_split", second.id),
        ("decide_experiment", second.id),
        ("undo_decision", second.id),
    ]


def _pin_and_remove(registry: Registry) -> list[tuple[str, str]]:
    """What changes nothing leaves no row."""
    pins = PinService(registry.database)
    pins.pin("legal", max_versions=1)
    pins.pin("legal", max_versions=1)
    pins.unpin("legal")
    pins.unpin("legal")
    AuditLog(registry.database).record("unload", "legal@v2")
    registry.remove("legal@v2")
    return [("pin", "legal"), ("unpin", "legal"), ("unload", "legal@v2"), ("remove", "legal@v2")]


def _order_jobs(registry: Registry) -> list[tuple[str, str]]:
    rows = write_rows(registry.store.root.parent / "rows.jsonl", easy_rows(2)).read_bytes()
    files = FileService(registry.database, registry.store.root.parent / "files", max_bytes=10_000)
    stored = files.upload(io.BytesIO(rows), "rows.jsonl")
    jobs = JobService(registry.database)
    job = jobs.create(JobOrder("tiny", stored.id, {}, 0, alias="legal"))
    jobs.pause(job.id)
    jobs.resume(job.id)
    jobs.cancel(job.id)
    files.delete(stored.id)
    of_job = [(action, job.id) for action in ("create_job", "pause_job", "resume_job", "cancel_job")]
    return [*of_job, ("delete_file", stored.id)]


def _give_keys_and_shadows(registry: Registry) -> list[tuple[str, str]]:
    keys = KeyService(registry.database)
    key, _ = keys.create("web", scopes=["chat"])
    keys.revoke(key.id)
    shadows = ShadowService(registry.database)
    shadow = shadows.start("legal", "v1", share=5)
    shadows.stop("legal")
    return [
        ("create_key", key.id),
        ("revoke_key", key.id),
        ("start_shadow", shadow.id),
        ("stop_shadow", shadow.id),
    ]


def _route(registry: Registry) -> list[tuple[str, str]]:
    publish_text(registry, "cooked", alias="cooking", prompts=COOKING)
    publish_text(registry, "lawful", alias="law", prompts=LEGAL)
    routing = RoutingService(registry, None, background=NOTHING)
    routing.reconcile()
    publish_text(registry, "played", alias="music", prompts=MUSIC)
    routing.reconcile()
    routing.keep_prompts("music", MUSIC)
    routing.set_rules(())
    routing.rollback()
    registry.remove("law")
    return [
        ("publish", "cooking@v1"),
        ("publish", "law@v1"),
        ("publish", "music@v1"),
        ("set_prompts", "music@v1"),
        ("set_routing_rules", "routing rules"),
        ("rollback_router", "router 1"),
        ("remove", "law"),
    ]


def test_every_act_leaves_a_row_when_it_is_done(registry: Registry) -> None:
    """Once each, with what it was done to; every kind of act is met."""
    done: list[tuple[str, str]] = []
    for act in (_move_versions, _run_experiments, _pin_and_remove, _order_jobs, _give_keys_and_shadows, _route):
        done += act(registry)
    assert done == _acts(registry)
    assert set(get_args(AuditAction)) == {action for action, _ in done}


def test_rows_say_what_an_operator_asks_when_they_are_read(registry: Registry) -> None:
    """From where to where an alias moved, which content was removed, what a key may do."""
    one, two = (publish_text(registry, content) for content in ("one", "two"))
    registry.promote("legal@v1")
    registry.remove("legal@v2")
    KeyService(registry.database).create("web", scopes=["chat"], aliases=["legal"])
    key, removed, promoted, published, _ = _log(registry)
    assert {"name": "web", "scopes": ["chat"], "aliases": ["legal"]} == key.detail
    assert {"digests": {"legal@v2": two.version.digest}} == removed.detail
    assert {"from_number": 2, "to_number": 1} == promoted.detail
    assert {"digest": two.version.digest, "is_live": True} == published.detail
    assert one.version.digest != two.version.digest


def test_row_names_the_actor_when_somebody_acts_over_http(registry: Registry) -> None:
    """The key and the request; without either it was the command line."""
    publish_text(registry, "one")
    registry.acting_for(Actor("key-1", "req_2")).promote("legal@v1")
    service = ExperimentService(registry.database).acting_for(Actor("local", "req_3"))
    publish_text(registry, "two")
    service.create("legal", HALVES)
    assert [
        ("command line", None),
        ("key-1", "req_2"),
        ("command line", None),
        ("local", "req_3"),
    ] == [(entry.actor, entry.request_id) for entry in reversed(_log(registry))]


def test_no_row_is_left_when_the_act_is_refused(registry: Registry) -> None:
    """The log tells what was done, so what was rolled back is not in it."""
    version = publish_text(registry, "one").version
    publish_text(registry, "two")
    before = _acts(registry)
    weights = registry.store.folder(version.digest) / ADAPTER_WEIGHTS_FILE
    weights.write_text("other")
    experiments = ExperimentService(registry.database)
    for act in (
        lambda: registry.promote("legal@v1"),  # damaged
        lambda: registry.rollback("legal"),  # the same
        lambda: registry.promote("legal@v9"),
        lambda: registry.remove("legal@v2"),  # pointed to
        lambda: experiments.create("legal", [("A", "v1", 50.0), ("B", "v9", 50.0)]),
        lambda: experiments.stop("legal"),
        lambda: KeyService(registry.database).revoke("key-nobody"),
    ):
        with pytest.raises(HotswapError):
            act()
    assert before == _acts(registry)


def test_list_gives_the_latest_when_it_is_limited(registry: Registry) -> None:
    """Newest first."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    assert ["legal@v3", "legal@v2"] == [entry.subject for entry in AuditLog(registry.database).list(limit=2)]
