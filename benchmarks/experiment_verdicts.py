"""Experiments without a difference, read as the server reads them: `make_report` at every evaluation, to its verdict.

Users come back, report late or never, and differ; what is counted is how often a version that is no other one is
promoted or rolled back. `experiment_runs` has the sequences alone, after every unit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adapters.experiment_report import ExperimentReport, make_report
from adapters.outcomes import AnsweredRequest, ReportedValue, UnitOutcomes
from adapters.records import Arm, Experiment, Guardrail, Metric, MetricKind

__all__ = ["ENDINGS", "SITUATIONS", "WINDOW", "Crowd", "Situation", "plan_experiment", "run_situation"]

WINDOW = timedelta(days=1)  # in which feedback is taken
ENDINGS = ("promoted", "lost", "breached", "split", "gap")
_START = datetime(2026, 1, 1, tzinfo=UTC)
_ARMS = (Arm("A", 1, "a" * 64, 50.0), Arm("B", 2, "b" * 64, 50.0))
_SECONDS_APART, _MEAN_DELAY_S = 60.0, 3600.0
_REPORT_SHARE = 0.6
_NUM_BEFORE = 3  # reports of a user before the experiment
# As strict as can be, so that any harm that is shown is a breach; and so wide that they hold soon.
_STRICT, _WIDE = 1e-9, 0.9

# A report's value from the user's own level, which is standard normal.
Draw = Callable[[np.random.Generator, float], float]


@dataclass(frozen=True, slots=True)
class Situation:
    """What users report, how often they come back (`new_share` of the requests are of new ones), and the analysis."""

    name: str
    kind: MetricKind
    draw: Draw
    new_share: float = 0.3
    analysis: Literal["sequential", "fixed"] = "sequential"


def _chance(generator: np.random.Generator, logit: float) -> float:
    return float(generator.random() < 1 / (1 + math.exp(-logit)))


def _clustered(generator: np.random.Generator, level: float) -> float:
    return level + 0.5 * generator.normal()


SITUATIONS = (
    Situation("yes or no, users differ", "share", lambda generator, level: _chance(generator, 1.5 * level - 1)),
    Situation("yes or no, alike, 20 requests each", "share", lambda generator, _: _chance(generator, -1), 0.05),
    Situation("yes or no, rare", "share", lambda generator, level: _chance(generator, level - 4)),
    Situation("skewed: lognormal", "number", lambda generator, level: math.exp(0.7 * level + 0.7 * generator.normal())),
    Situation("heavy-tailed: Student t3", "number", lambda generator, _: float(generator.standard_t(3))),
    Situation("clustered: users differ more than answers", "number", _clustered),
    Situation("one look, adjusted by the time before", "number", _clustered, analysis="fixed"),
)


class Crowd:
    """The users of one experiment, whose outcomes come one after the other; `outcomes` are those up to a moment."""

    def __init__(self, situation: Situation, generator: np.random.Generator) -> None:
        self.now = _START
        self.outcomes: dict[str, list[UnitOutcomes]] = {arm.name: [] for arm in _ARMS}
        self.history: list[UnitOutcomes] = []
        self._situation, self._generator = situation, generator
        self._users: list[tuple[UnitOutcomes, float]] = []
        self._coming: list[tuple[datetime, int, str, float, UnitOutcomes, int]] = []  # reports under way
        self._num_reports = 0

    def ask(self, num_requests: int) -> None:
        """Let so many requests come, and what is reported until the last of them."""
        for _ in range(num_requests):
            self.now += timedelta(seconds=float(self._generator.exponential(_SECONDS_APART)))
            self._ask_once()
        self._take_reports()

    def wait(self, time: timedelta) -> None:
        """Let time pass without requests."""
        self.now += time
        self._take_reports()

    def _ask_once(self) -> None:
        draw = self._generator
        if not self._users or draw.random() < self._situation.new_share:
            self._greet()
            unit, level = self._users[-1]
        else:
            unit, level = self._users[int(draw.integers(len(self._users)))]
        total_ms = math.exp(7 + 0.5 * level + 0.5 * draw.normal())
        is_error = _chance(draw, level - 4) > 0
        request = AnsweredRequest(self.now, is_error, False, None if is_error else total_ms / 3, total_ms, 10, False)
        unit.requests.append(request)
        if draw.random() < _REPORT_SHARE:
            self._report(unit, "liked", self._situation.draw(draw, level))
            self._report(unit, "rude", _chance(draw, level - 3))

    def _greet(self) -> None:
        level = float(self._generator.normal())
        unit = UnitOutcomes(f"user-{len(self._users)}", [])
        self._users.append((unit, level))
        self.outcomes["AB"[int(self._generator.integers(2))]].append(unit)
        if self._situation.analysis == "fixed":
            before = _START - timedelta(days=30)
            values = [self._situation.draw(self._generator, level) for _ in range(_NUM_BEFORE)]
            reports = [ReportedValue(value, before, before) for value in values]
            asked = AnsweredRequest(before, False, False, 1.0, 1.0, 1, True)
            self.history.append(UnitOutcomes(unit.unit, [asked] * _NUM_BEFORE, {"liked": reports}))

    def _report(self, unit: UnitOutcomes, metric: str, value: float) -> None:
        at = self.now + timedelta(seconds=float(self._generator.exponential(_MEAN_DELAY_S)))
        self._num_reports += 1
        heapq.heappush(self._coming, (at, self._num_reports, metric, value, unit, len(unit.requests) - 1))

    def _take_reports(self) -> None:
        while self._coming and self._coming[0][0] <= self.now:
            at, _, metric, value, unit, place = heapq.heappop(self._coming)
            asked = unit.requests[place] = unit.requests[place]._replace(has_feedback=True)
            unit.reports.setdefault(metric, []).append(ReportedValue(value, at, asked.at))


def plan_experiment(situation: Situation, *, margin: float, alpha: float, planned_units: int) -> Experiment:
    """The plan: what users report decides, three guardrails watch."""
    return Experiment(
        id="exp-simulated",
        alias="simulated",
        salt="s",
        arms=_ARMS,
        state="running",
        created_at=_START,
        starts_at=_START,
        metric=Metric("liked", "increase", situation.kind),
        guardrails=(
            Guardrail("error_rate", "decrease", margin),
            Guardrail("total_ms", "decrease", margin, is_relative=True),
            Guardrail("rude", "decrease", margin, kind="share"),
        ),
        alpha=alpha,
        planned_units=planned_units,
        analysis=situation.analysis,
    )


def run_situation(
    situation: Situation,
    generator: np.random.Generator,
    num_runs: int,
    *,
    num_looks: int,
    requests_a_look: int,
    alpha: float = 0.05,
) -> dict[str, NDArray[np.float64]]:
    """By ending, for each run, whether any look had it: 1 or 0.

    Half of the users that come are planned. With strict guardrails a breach is any harm that is shown, with wide ones a
    promotion is any gain; both are read at each look.
    """
    planned = round(num_looks * requests_a_look * situation.new_share / 2)
    strict, wide = (
        plan_experiment(situation, margin=margin, alpha=alpha, planned_units=planned) for margin in (_STRICT, _WIDE)
    )
    ever = {ending: np.zeros(num_runs) for ending in ENDINGS}
    for run in range(num_runs):
        crowd = Crowd(situation, generator)
        for look in range(num_looks + 1):
            if look < num_looks:
                crowd.ask(requests_a_look)
            else:
                crowd.wait(2 * WINDOW)
            for ending in _endings([_look(experiment, crowd) for experiment in (strict, wide)]):
                ever[ending][run] = 1
    return ever


def _look(experiment: Experiment, crowd: Crowd) -> ExperimentReport:
    return make_report(experiment, crowd.outcomes, now=crowd.now, window=WINDOW, history=crowd.history, in_full=False)


def _endings(reports: Sequence[ExperimentReport]) -> set[str]:
    strict, wide = reports
    (treatment,) = wide.treatments
    found = {
        "promoted": wide.verdict.kind == "promote",
        "lost": treatment.outcome == "worse",
        "breached": strict.verdict.kind == "roll_back" and "breaks the guardrail" in strict.verdict.sentence,
        "split": wide.split.fired,
        "gap": any(gap.interval and not gap.interval.low <= 0 <= gap.interval.high for gap in treatment.gaps),
    }
    return {ending for ending, is_so in found.items() if is_so}
