"""`hotswap experiments show`, `power`, and a person's decisions, on a home with users in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from adapters.database import open_database
from adapters.errors import ConflictError, InvalidInputError
from adapters.experiment_comparisons import stage_confidence
from adapters.experiments import ExperimentService
from adapters.records import AnalysisPlan, Experiment, Guardrail, Metric
from adapters.registry import Registry
from adapters.statistics import required_units
from adapters.statistics.mixtures import ArmMoments, difference_bounds
from adapters.store import ArtifactStore
from clients.cli.main import app
from tests.support.experiments import HALVES, NO, SOLVED, YES, add_users, age
from tests.support.versions import publish_text

THIRDS = [("A", "v1", 34.0), ("B", "v2", 33.0), ("C", "v3", 33.0)]


@dataclass
class Home:
    """A home folder, and commands on it."""

    path: Path
    registry: Registry

    def text(self, *arguments: str) -> str:
        """What `hotswap experiments ...` prints."""
        environment = {"HOTSWAP_HOME": str(self.path), "COLUMNS": "160"}
        result = CliRunner().invoke(app, ["experiments", *arguments], env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    def start(self, **plan: Any) -> Experiment:
        """An experiment between two versions of `legal`, which points to the first."""
        usual: dict[str, Any] = {
            "metric": Metric("solved", "increase"),
            "guardrails": (Guardrail("error_rate", "decrease", 0.05),),
            "planned_units": 1000,
        }
        wanted = AnalysisPlan(**usual | plan)
        return ExperimentService(self.registry.database).create("legal", HALVES, salt="s", plan=wanted)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """With three versions of `legal`, which points to the first."""
    path = tmp_path / "home"
    path.mkdir()
    registry = Registry(open_database(f"sqlite:///{path / 'hotswap.db'}"), ArtifactStore(path / "store"))
    for content in ("one", "two", "three"):
        publish_text(registry, content, promote=content == "one")
    yield Home(path, registry)
    registry.database.close()


def _win(home: Home, experiment: Experiment) -> None:
    add_users(home.registry, experiment, "A", [YES, NO] * 150)
    add_users(home.registry, experiment, "B", [YES, YES, YES, NO] * 75)


def test_show_says_what_to_do_and_why_when_a_treatment_wins(home: Home, tmp_path: Path) -> None:
    """Verdict, command, counts, effect with its picture, guardrail, split, feedback and the promise; and the SVG."""
    experiment = home.start()
    _win(home, experiment)
    shown = home.text("show", "legal", "--plot", str(tmp_path / "effect.svg"))
    for words in (
        "Verdict: promote B",
        "B (legal@v2) is better than A (legal@v1): solved +0.25 (between",
        "the guardrail holds",
        f"hotswap experiments promote {experiment.id}",
        "A (control)",
        "● estimate",
        "600 users",
        "holds",
        "Users are split 300 to 300, 50 to 50 was meant: as it should be.",
        "solved is known of so many of a user's answers: 100 % in A, 100 % in B; no difference is shown.",
        "however often you look",
    ):
        assert words in shown, words
    document = json.loads(home.text("show", "legal", "--json"))
    assert ("promote", "B", experiment.salt) == (
        document["verdict"]["kind"], document["verdict"]["arm"], document["experiment"]["salt"],
    )  # fmt: skip
    assert 1 == len(ET.parse(tmp_path / "effect.svg").getroot().findall("{http://www.w3.org/2000/svg}polygon"))


def test_show_says_what_is_wrong_when_a_guardrail_or_the_split_is(home: Home) -> None:
    """A breach names its numbers; after it too many of the treatment's users spoil the split."""
    experiment = home.start()
    add_users(home.registry, experiment, "A", [YES] * 60)
    add_users(home.registry, experiment, "B", [None] * 60, error="failed")
    shown = home.text("show", experiment.id)
    assert "Verdict: roll back: B must go" in shown
    assert f"hotswap experiments rollback {experiment.id}" in shown
    assert "breached" in shown
    add_users(home.registry, experiment, "B", [None] * 300, error="failed")
    shown = home.text("show", experiment.id)
    assert "Users are split 60 to 360, where 50 to 50 was meant" in shown
    assert "not by chance, see the verdict" in shown


def test_show_draws_no_effect_when_there_is_none_to_draw(home: Home, tmp_path: Path) -> None:
    """Without a metric there is a report all the same; a picture is refused with the reason."""
    experiment = home.start(metric=None, guardrails=())
    assert "no primary metric" in home.text("show", "legal")
    with pytest.raises(InvalidInputError, match="has no effect to draw: it needs a primary metric"):
        home.text("show", experiment.id, "--plot", str(tmp_path / "effect.svg"))
    assert not (tmp_path / "effect.svg").exists()


def test_show_compares_feedback_when_the_plan_names_none_of_it(home: Home) -> None:
    """How often answers have any, in both arms."""
    experiment = home.start(metric=Metric("length_finish_rate", "decrease"), guardrails=())
    add_users(home.registry, experiment, "A", [{"liked": 1.0}, None] * 150)
    add_users(home.registry, experiment, "B", [{"liked": 1.0}, None, None, None] * 75)
    shown = home.text("show", "legal")
    assert "There is feedback on so many of a user's answers: 50 % in A, 25 % in B; the arms differ, -25.0 po" in shown
    assert re.search(r"\bliked +│ +100 % +│ +100 %", shown)


def test_show_says_that_nobody_reported_when_nobody_did(home: Home) -> None:
    """In place of no difference between nothing and nothing."""
    experiment = home.start()
    for arm in ("A", "B"):
        add_users(home.registry, experiment, arm, [None] * 100)
    shown = home.text("show", "legal")
    assert "solved is known of no answer in A and B in this stage." in shown
    assert "no difference is shown" not in shown


def test_plot_is_refused_when_its_folder_is_not_there(home: Home, tmp_path: Path) -> None:
    """With the path, and why."""
    _win(home, home.start())
    with pytest.raises(InvalidInputError, match=r"effect\.svg can't be written: No such file or directory"):
        home.text("show", "legal", "--plot", str(tmp_path / "absent" / "effect.svg"))


def test_person_decides_when_told_to(home: Home) -> None:
    """Promotion and rollback end an experiment; a difference in feedback is accepted for the log."""
    first = home.start()
    _win(home, first)
    home.text("accept", "legal", "--reason", "known")
    assert f"hotswap experiments undo {first.id}" in home.text("promote", "legal")
    assert 2 == home.registry.alias("legal").current.number
    second = home.start()
    with pytest.raises(ConflictError, match="split as was meant; nothing to accept"):
        home.text("accept", "legal", "--split", "--reason", "known")
    add_users(home.registry, second, "A", [None] * 300)
    assert "though users were not split as was meant" in home.text("accept", "legal", "--split", "--reason", "known")
    home.text("rollback", "legal", "--reason", "cold feet")
    assert 1 == home.registry.alias("legal").current.number
    with pytest.raises(ConflictError, match="decided, not running"):
        home.text("promote", second.id, "--arm", "B")
    assert "cold feet" in home.text("show", second.id)


def test_power_prints_users_and_days_when_asked(home: Home) -> None:
    """For both analyses, at the confidence that an experiment's first stage has; days by the users that come."""
    confidence = stage_confidence(home.start())
    printed = home.text("power", "--base-rate", "0.4", "--effect", "0.05", "--users-per-day", "500", "--traffic", "50")
    for analysis in ("sequential", "fixed"):
        units = required_units(
            0.05, base_rate=0.4, confidence=confidence, analysis="fixed" if analysis == "fixed" else "sequential"
        )
        assert f"{units:,}" in printed
        assert f" {-(-units // 250)} " in printed
        assert f"planned_units: {units}" in printed
    assert "Its intervals have 96.96 % confidence" in printed


@pytest.mark.parametrize(("arms", "treatments"), [(HALVES, 1), (THIRDS, 2)])
def test_difference_is_found_as_often_as_power_says_when_experiments_are_simulated(
    home: Home, arms: list[tuple[str, str, float]], treatments: int
) -> None:
    """Looked at once at the printed number, by the very intervals that such an experiment has: found in 80 %."""
    plan = AnalysisPlan(metric=Metric("score", "increase"))
    experiment = ExperimentService(home.registry.database).create("legal", arms, salt="s", plan=plan)
    confidence = stage_confidence(experiment)
    options = ("--effect", "0.1", "--std-dev", "1", "--treatments", str(treatments), "--json")
    planned = {row["analysis"]: row["planned_units"] for row in json.loads(home.text("power", *options))}
    pair = planned["fixed"] * 2 // (treatments + 1)
    fixed = _simulate(0.1, pair // 2)
    margin = stats.t.ppf((1 + confidence) / 2, fixed[0].count * 2 - 2) * np.sqrt(
        (fixed[0].variance + fixed[1].variance) / fixed[0].count
    )
    assert 0.79 < np.mean(fixed[0].mean - fixed[1].mean > margin) < 0.81
    pair = planned["sequential"] * 2 // (treatments + 1)
    low, _ = difference_bounds(*_simulate(0.1, pair // 2), confidence=confidence, planned_units=pair)
    assert 0.79 < np.mean(low > 0) < 0.81


def _simulate(effect: float, num_units: int) -> tuple[ArmMoments, ArmMoments]:
    """The moments of 20,000 experiments with so many normal values an arm, of deviation 1: treatment and control."""
    draw = np.random.default_rng(7)
    means = draw.normal(scale=num_units**-0.5, size=(2, 20_000))
    variances = draw.chisquare(num_units - 1, size=(2, 20_000)) / (num_units - 1)
    sides = zip(means + np.array([[effect], [0.0]]), variances, strict=True)
    treatment, control = (ArmMoments(num_units, mean, variance, 0.0) for mean, variance in sides)
    return treatment, control


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--effect", "0.05"], "either --base-rate or --std-dev"),
        (["--effect", "0", "--base-rate", "0.4"], "not 0"),
        (["--effect", "0.7", "--base-rate", "0.4"], "between 0 and 1"),
    ],
)
def test_power_is_refused_when_the_plan_makes_no_sense(home: Home, options: list[str], message: str) -> None:
    """With what to give instead."""
    with pytest.raises(InvalidInputError, match=message):
        home.text("power", *options)


def test_show_takes_feedback_for_as_long_as_the_server_when_that_is_set(home: Home) -> None:
    """A sample that looks once is judged at the same moment by both."""
    experiment = home.start(analysis="fixed", planned_units=600, guardrails=())
    _win(home, experiment)
    age(home.registry, timedelta(days=2))
    assert "All 600 planned users are there" in home.text("show", experiment.id)
    (home.path / "hotswap.toml").write_text("[serve]\nfeedback_days = 1\n")
    assert "Verdict: promote B" in home.text("show", experiment.id)


def test_show_says_what_to_type_when_a_draft_waits_or_a_difference_must_be_accepted(home: Home) -> None:
    """The next step of a verdict is a command, with the experiment's own id."""
    experiment = home.start(guardrails=(), metric=SOLVED)
    add_users(home.registry, experiment, "A", [YES, NO] * 200)
    add_users(home.registry, experiment, "B", [YES, None] * 200)
    assert f"hotswap experiments accept {experiment.id} --reason" in home.text("show", experiment.id)
    add_users(home.registry, experiment, "A", [YES] * 600)
    assert f"hotswap experiments accept {experiment.id} --split --reason" in home.text("show", experiment.id)
    draft = ExperimentService(home.registry.database).create(
        "legal", HALVES, plan=AnalysisPlan(metric=SOLVED), draft=True
    )
    shown = home.text("show", draft.id)
    assert "It has not started yet." in shown
    assert f"hotswap experiments start {draft.id}" in shown


def test_guardrail_is_accepted_when_its_metric_does_not_vary(home: Home) -> None:
    """The report says why it is not passed and what to type, and then promotes."""
    experiment = home.start(guardrails=(Guardrail("completion_tokens", "decrease", 0.5, is_relative=True),))
    _win(home, experiment)
    shown = home.text("show", "legal")
    assert "no variation: no interval" in shown
    assert f"hotswap experiments accept {experiment.id} --guardrail completion_tokens --reason" in shown
    with pytest.raises(InvalidInputError, match="two acts"):
        home.text("accept", "legal", "--guardrail", "completion_tokens", "--split", "--reason", "x")
    told = home.text("accept", "legal", "--guardrail", "completion_tokens", "--reason", "one token each")
    assert "completion_tokens holds no promotion back in this stage any more" in told
    assert "Verdict: promote B" in home.text("show", "legal")


def test_new_stage_is_told_when_weights_change_and_are_undone(home: Home) -> None:
    """What users did so far counts no more, say both acts and the report; and how many planned ones have come."""
    experiment = home.start(planned_units=500)
    _win(home, experiment)
    assert "600 of 500 planned users have come; later ones count as well" in home.text("show", "legal")
    told = "what users did in earlier stages (600 users) takes no part in it; who asks again counts anew"
    assert told in home.text("weights", "legal", "A=20", "B=80")
    shown = home.text("show", "legal")
    assert "nobody has come in stage 2 yet" in shown
    assert "0 of 500 planned users have come." in shown
    undone = home.text("undo", "legal")
    assert "this is stage 3" in undone
    assert told in undone
    assert "without what users did so far" in home.text("weights", "--help")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("guardrials: []", "guardrials: no such field; there are alias, arms, salt"),
        ("metric: {name: solved, knd: share}", "metric.knd: no such field; there are name, direction, kind"),
        ("metric: {name: error_rate, direction: increase}", "'error_rate' gets better as it gets lower"),
    ],
    ids=["field", "field of a part", "direction"],
)
def test_file_is_refused_when_it_can_t_be_meant(home: Home, tmp_path: Path, changed: str, message: str) -> None:
    """In words that name what there is."""
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        home.text("create", "--config", str(_write_plan(tmp_path, changed)))


def test_create_says_what_is_assumed_when_a_plan_may_be_a_slip(home: Home, tmp_path: Path) -> None:
    """A name that is nearly a built-in one, and no planned users."""
    plan = "metric: {name: error_rat}\nguardrails: [{metric: ttft, margin: 5}]"
    told = home.text("create", "--draft", "--config", str(_write_plan(tmp_path, plan)))
    assert "'error_rat' is no built-in metric, so it is taken as feedback that you report" in told
    assert "did you mean 'ttft_ms'?" in told
    assert "intervals are made narrowest at 10,000 users" in told
    plan = "metric: {name: solved}\nplanned_units: 500"
    told = home.text("create", "--draft", "--config", str(_write_plan(tmp_path, plan)))
    assert "built-in" not in told
    assert "planned_units" not in told


def _write_plan(folder: Path, fields: str) -> Path:
    path = folder / "plan.yaml"
    arms = "[{name: A, version: v1, weight: 50}, {name: B, version: v2, weight: 50}]"
    path.write_text(f"alias: legal\narms: {arms}\n{fields}\n")
    return path
