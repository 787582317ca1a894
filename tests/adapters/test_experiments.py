"""Experiments: pinned arms, and exposures that survive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.database import open_database
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.experiments import ExperimentService, parse_arm
from adapters.records import Binding, Experiment, Exposure, Feedback
from adapters.registry import Registry
from adapters.tables import ExposureRow
from tests.support.versions import publish_text

REPOSITORY = Path(__file__).parents[2]
HALVES = [("A", "v1", 50.0), ("B", "v2", 50.0)]


@pytest.fixture
def experiments(registry: Registry) -> ExperimentService:
    """Experiments on an alias with three versions, pointing to the last."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    return ExperimentService(registry.database)


def _expose(
    service: ExperimentService, experiment: Experiment, arm: str, unit: str, response: str, error: str | None = None
) -> None:
    found = next(candidate for candidate in experiment.arms if candidate.name == arm)
    binding = Binding(experiment.alias, "experiment", found.digest, found.number, experiment.id, arm)
    service.record_exposure(Exposure(response, binding, unit, "user", 5, 7, 1.5, 9.5, None if error else "stop", error))


def _outcome(
    service: ExperimentService, experiment: Experiment, arm: str, unit: str, value: float, metric: str = "score"
) -> str:
    response = f"{arm}-{unit}-{metric}-{len(_exposures(service))}"
    _expose(service, experiment, arm, unit, response)
    service.record_feedback(Feedback(response, metric, value))
    return response


def _exposures(service: ExperimentService) -> list[ExposureRow]:
    with service.database.read() as session:
        return list(session.query(ExposureRow).all())


def test_create_pins_versions_when_numbers_or_digests_are_given(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Arms keep their order and the digest of their version."""
    digests = [version.version.digest for version in registry.versions("legal")]
    created = experiments.create("legal", [("A", f"{digests[1][:16]}", 90), ("B", "v1", 10)], salt="s")
    assert [("A", 2, digests[1], 90.0), ("B", 1, digests[0], 10.0)] == [
        (arm.name, arm.number, arm.digest, arm.weight) for arm in created.arms
    ]
    assert (created.alias, created.salt, created.state, created.stopped_at) == ("legal", "s", "running", None)
    assert created == experiments.get(created.id) == experiments.get("legal")


def test_create_keeps_its_versions_when_the_alias_gets_new_ones(
    registry: Registry, experiments: ExperimentService
) -> None:
    """A job that ends in the midst of an experiment changes no arm."""
    created = experiments.create("legal", HALVES)
    publish_text(registry, "four")
    assert created.arms == experiments.get(created.id).arms
    assert registry.resolve("legal", unit="u").number in (1, 2)


def test_create_draws_a_salt_when_none_is_given(experiments: ExperimentService) -> None:
    """Two experiments on the same alias assign independently."""
    first = experiments.create("legal", HALVES)
    experiments.stop("legal")
    second = experiments.create("legal", HALVES)
    assert first.salt != second.salt
    assert first.id != second.id


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "two or more arms"),
        ([("A", "v1", 100.0)], r"two or more arms .*\['A'\]"),
        ([("A", "v1", 50.0), ("A", "v2", 50.0)], "different names"),
        ([("A", "v1", 50.0), ("B", "v2", 49.0)], "add up to 100, found 99"),
        ([("A", "v1", 50.0), ("B", "v2", 50.1)], r"add up to 100, found 100\.1"),
        ([("A", "v1", 50.0), ("", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B" * 33, "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B b", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("é", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B", "latest", 50.0)], "'latest' is not a version"),
    ],
)
def test_create_refuses_when_the_arms_are_wrong(
    experiments: ExperimentService, arms: list[tuple[str, str, float]], message: str
) -> None:
    """Nothing is started, and the message says what was found."""
    with pytest.raises(InvalidInputError, match=message):
        experiments.create("legal", arms)
    assert experiments.list() == []


def test_create_accepts_thirds_when_they_add_up_but_for_rounding(experiments: ExperimentService) -> None:
    """Weights are floats; a rounding error is no mistake."""
    arms = [(name, f"v{number}", 100 / 3) for number, name in enumerate("ABC", start=1)]
    assert len(experiments.create("legal", arms).arms) == 3


@pytest.mark.parametrize(("alias", "version"), [("medical", "v1"), ("legal", "v9"), ("legal", "0" * 64)])
def test_create_refuses_when_alias_or_version_is_unknown(
    experiments: ExperimentService, alias: str, version: str
) -> None:
    """The transaction leaves no half experiment."""
    with pytest.raises(NotFoundError, match=alias):
        experiments.create(alias, [("A", "v1", 50), ("B", version, 50)])
    assert experiments.list() == []


def test_create_refuses_when_one_is_running_on_the_alias(experiments: ExperimentService, registry: Registry) -> None:
    """One running experiment an alias; others may have their own."""
    first = experiments.create("legal", HALVES)
    with pytest.raises(ConflictError, match="running on 'legal' already"):
        experiments.create("legal", HALVES)
    publish_text(registry, "one", alias="medical")
    publish_text(registry, "two", alias="medical")
    other = experiments.create("medical", HALVES)
    assert {first.id, other.id} == {experiment.id for experiment in experiments.list()}


def test_stop_ends_the_experiment_when_named_by_id_or_alias(experiments: ExperimentService) -> None:
    """Once; the arms remain to be reported on."""
    first = experiments.create("legal", HALVES)
    stopped = experiments.stop(first.id)
    assert ("stopped", first.arms) == (stopped.state, stopped.arms)
    assert stopped.stopped_at is not None
    with pytest.raises(ConflictError, match=f"{first.id} is stopped already"):
        experiments.stop(first.id)
    second = experiments.create("legal", HALVES)
    assert second.id == experiments.stop("legal").id
    assert [second.id, first.id] == [experiment.id for experiment in experiments.list()]


def test_unknown_experiments_raise_when_asked_for(experiments: ExperimentService) -> None:
    """The message holds the name."""
    for act in (experiments.get, experiments.stop):
        with pytest.raises(NotFoundError, match="no experiment 'legal'"):
            act("legal")


def test_exposure_is_stored_whole_when_recorded(experiments: ExperimentService) -> None:
    """Every field comes back, also of an answer of the base model."""
    binding = Binding("base", "base")
    experiments.record_exposure(Exposure("r1", binding, "u1", "request", 3, 4, None, 12.5, None, "x" * 600))
    (row,) = _exposures(experiments)
    assert (
        row.response_id,
        row.alias,
        row.route,
        row.number,
        row.digest,
        row.experiment_id,
        row.arm,
    ) == ("r1", "base", "base", None, None, None, None)
    assert (
        row.unit,
        row.unit_source,
        row.prompt_tokens,
        row.completion_tokens,
        row.ttft_ms,
        row.total_ms,
        row.finish_reason,
    ) == ("u1", "request", 3, 4, None, 12.5, None)
    assert row.error == "x" * 500


def test_feedback_replaces_when_the_metric_is_reported_again(experiments: ExperimentService) -> None:
    """The last value for a metric of a response counts; another metric stands beside it."""
    experiment = experiments.create("legal", HALVES)
    response = _outcome(experiments, experiment, "A", "u", 0.25)
    experiments.record_feedback(Feedback(response, "score", 0.75, "better"))
    experiments.record_feedback(Feedback(response, "length", 3.0))
    (unit,) = experiments.outcomes(experiment.id, 1)["A"]
    assert {"length": (3.0, 1), "score": (0.75, 1)} == unit.feedback


def test_feedback_raises_when_the_response_is_unknown(experiments: ExperimentService) -> None:
    """The id stands in the message, and nothing is stored."""
    with pytest.raises(NotFoundError, match="no response 'nope'"):
        experiments.record_feedback(Feedback("nope", "score", 1.0))


RECORD_AND_DIE = """
import os, sys
from adapters.database import open_database
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
service = ExperimentService(open_database(sys.argv[1]))
for index in range(20):
    service.record_exposure(Exposure(f"r{index}", Binding("base", "base"), "u", "user", 1, 1, None, 1.0, "stop", None))
    print(f"r{index}", flush=True)
os.kill(os.getpid(), 9)
"""


def test_exposures_survive_when_the_process_is_killed(tmp_path: Path) -> None:
    """Every exposure whose recording returned is there after kill -9."""
    url = f"sqlite:///{tmp_path / 'hotswap.db'}"
    child = subprocess.run(
        [sys.executable, "-c", RECORD_AND_DIE, url], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (-9, "")
    database = open_database(url)
    found = {row.response_id for row in _exposures(ExperimentService(database))}
    assert set(child.stdout.split()) == found
    assert len(found) == 20
    database.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A@v1=50", ("A", "v1", 50.0)), ("B@0123abcd=0.5", ("B", "0123abcd", 0.5)), ("C@v1=100", ("C", "v1", 100.0))],
)
def test_parse_arm_splits_when_the_text_is_an_arm(text: str, expected: tuple[str, str, float]) -> None:
    """Name, version and percent."""
    assert expected == parse_arm(text)


@pytest.mark.parametrize(
    "text",
    ["", "A", "A@v1", "A=50", "@v1=50", "A@=50", "A@v1=", "A@v1=x", "A@v1=0", "A@v1=-1", "A@v1=101", "A@v1=nan"],
)
def test_parse_arm_refuses_when_the_text_is_none(text: str) -> None:
    """The message shows the right form."""
    with pytest.raises(InvalidInputError, match="expected NAME@VERSION=PERCENT"):
        parse_arm(text)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.from_regex(r"[A-C]?@?v?[0-9]?=?[0-9.e-]{0,5}", fullmatch=True))
def test_parse_arm_gives_a_valid_weight_or_refuses_when_given_any_text(text: str) -> None:
    """No text crashes the parser."""
    try:
        name, version, weight = parse_arm(text)
    except InvalidInputError:
        return
    assert name
    assert version
    assert 0 < weight <= 100
