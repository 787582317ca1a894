"""A shadow's report: users who come back are one observation each, and looking often costs nothing."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from adapters.comparisons import compare_pair, mean_of_units
from adapters.database import Database
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
from adapters.registry import Registry
from adapters.shadows import Shadow, ShadowAnswer, ShadowService
from tests.support.versions import publish_text

NAMES = count()


@pytest.fixture
def shadow(registry: Registry) -> Shadow:
    """A candidate beside `legal`."""
    for content in ("one", "two"):
        publish_text(registry, content)
    return ShadowService(registry.database).start("legal", "v2", share=50)


def _answer(database: Database, shadow: Shadow, unit: str, live: str, text: str, *, cut: bool = False) -> None:
    name = f"chatcmpl-{next(NAMES)}"
    binding = Binding("legal", "alias", "d" * 64, 1)
    ExperimentService(database).record_exposure(Exposure(name, binding, unit, "user", 5, 7, 1.5, 9.5, "stop", None))
    sides = [{"role": "assistant", "content": content} for content in (live, text)]
    ends = ("stop", "length" if cut else "stop")
    ShadowService(database).record(
        ShadowAnswer(name, shadow.id, "answered", None, len(live), ends[0], len(text), ends[1], sides[0], sides[1])
    )


def test_means_are_of_requests_and_intervals_of_users_when_users_come_back(database: Database, shadow: Shadow) -> None:
    """Ten users with ten requests each are ten observations: what one of them gets says little of others."""
    for number in range(100):
        _answer(database, shadow, f"busy {number % 10}", "aaa", "aaaaa" if number % 10 < 7 else "a", cut=True)
    for number in range(30):
        _answer(database, shadow, f"user {number}", "aaa", ("aaa", "aa", "aaaa")[number % 3])
    report = ShadowService(database).report("legal")
    assert (130, 40) == (report.num_answered, report.num_units)
    assert report.same_share is not None
    assert report.token_difference is not None
    assert report.cut_difference is not None
    assert (10 / 130, (70 * 2 - 30 * 2) / 130, 100 / 130) == pytest.approx(
        (report.same_share.mean, report.token_difference.mean, report.cut_difference.mean)
    )
    interval = report.token_difference.interval
    assert interval is not None
    independent = mean_of_units([2.0] * 70 + [-2.0] * 30 + [0.0, -1.0, 1.0] * 10, [1] * 130).interval
    assert independent is not None
    assert interval.low < 0 < independent.low


def test_copies_are_counted_together_when_their_reason_is_empty_or_missing(database: Database, shadow: Shadow) -> None:
    """An error without words is none the less one."""
    service = ShadowService(database)
    for reason in ("", "", None, "a word"):
        _fail(service, shadow, reason)
    report = service.report("legal")
    assert (4, {"no reason is known": 3, "a word": 1}) == (report.num_failed, report.failed_because)


def _fail(service: ShadowService, shadow: Shadow, reason: str | None) -> None:
    name, live = f"chatcmpl-{next(NAMES)}", {"role": "assistant", "content": "a"}
    binding = Binding("legal", "alias", "d" * 64, 1)
    exposure = Exposure(name, binding, "u", "user", 5, 7, 1.5, 9.5, "stop", None)
    ExperimentService(service.database).record_exposure(exposure)
    service.record(ShadowAnswer(name, shadow.id, "failed", reason, 1, "stop", 0, None, live, None))


def test_false_alarms_are_rare_when_a_shadow_is_looked_at_after_every_user() -> None:
    """Two equal versions, users who come back, a look after every fifth: at most 5 % of runs, and three errors."""
    draw = np.random.default_rng(3)
    num_alarms = 0
    for _ in range(60):
        counts = draw.geometric(0.4, size=400)
        moods = draw.normal(size=400)
        totals = [float(mood * n + draw.normal() * n**0.5) for mood, n in zip(moods, counts, strict=True)]
        looks = (mean_of_units(totals[:n], [int(k) for k in counts[:n]]).interval for n in range(20, 401, 5))
        num_alarms += any(found is not None and not found.low <= 0 <= found.high for found in looks)
    assert num_alarms <= 60 * 0.05 + 3 * (60 * 0.05 * 0.95) ** 0.5


def test_pairs_of_one_user_are_one_observation_when_judged() -> None:
    """In both tests and both intervals; of users who come once, nothing changes."""
    scores = [(1.0, 0.0)] * 12 + [(0.0, 1.0)] * 2
    alone = compare_pair("shadow", "live", scores, [f"user {number}" for number in range(14)])
    assert compare_pair("shadow", "live", scores) == alone
    one = compare_pair("shadow", "live", scores, ["busy"] * 12 + ["a", "b"])
    assert (12, 2, 3) == (one.wins, one.losses, one.num_units)
    assert (1.0, True) == (one.sign_p, one.permutation_p > 0.2)
    assert alone.sign_p < 0.05
    assert alone.mean_difference == one.mean_difference
