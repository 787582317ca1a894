"""The gate's judgement: what passes, what fails and what stays open, from numbers and answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.gate_report import GateCheck
from training.config import TrainSettings
from training.gate import MIN_ROWS, Evidence, Present, judge, paired_improvement
from training.losses import Evaluation
from training.sampling import Sample, SamplePrompt

DIGEST = "a" * 64


def _evaluation(losses: Any, weights: Any = None) -> Evaluation:
    array = np.asarray(losses, dtype=np.float64)
    return Evaluation(array, np.ones(len(array)) if weights is None else np.asarray(weights, dtype=np.float64))


def _around(mean: float, *, num_rows: int = 40, seed: int = 0, spread: float = 0.3) -> Evaluation:
    return _evaluation(np.random.default_rng(seed).normal(mean, spread, num_rows))


def _sample(text: str = "An answer.", *, tokens: tuple[int, ...] = (1, 2, 3), has_ended: bool = True) -> Sample:
    return Sample(SamplePrompt("?", (1,), 3), text, tokens, has_ended)


def _evidence(**changes: Any) -> Evidence:
    """A version that is better than the base and forgets nothing."""
    given: dict[str, Any] = {
        "candidate": _around(1.0),
        "base": _around(2.0, seed=1),
        "general": (3.1, 3.0),
        "samples": [_sample()] * 4,
    }
    return Evidence(**given | changes)


def _settings(tmp_path: Path, **given: Any) -> TrainSettings:
    return TrainSettings.load(tmp_path, **given)


def _find(evidence: Evidence, settings: TrainSettings, name: str) -> GateCheck:
    (check,) = [check for check in judge(evidence, settings).checks if check.name == name]
    return check


def _scored(scores: Any) -> Evaluation:
    """Losses that say the opposite of the scores, so that it shows which of them counts."""
    array = np.asarray(scores, dtype=np.float64)
    return Evaluation(array, np.ones(len(array)), scores=array)


@pytest.mark.parametrize(
    ("method", "words", "figure"),
    [
        ("reward", "share of validation pairs in the right order 0.900 against 0.500", "pair_accuracy"),
        ("rloo", "mean reward of answers to validation prompts 0.900 against 0.500", "mean_reward"),
    ],
)
def test_scores_count_and_not_losses_when_a_method_has_scores(
    tmp_path: Path, method: str, words: str, figure: str
) -> None:
    """More pairs in the right order, or more reward: what such a version is for, said in its own words."""
    settings = _settings(tmp_path, method=method, reward="tone" if method == "rloo" else None)
    right, even = _scored([1.0] * 18 + [0.0] * 2), _scored([0.5] * 20)

    better = _find(_evidence(candidate=right, base=even), settings, "base")
    worse = _find(_evidence(candidate=even, base=right), settings, "base")

    assert ("passed", "failed") == (better.outcome, worse.outcome)
    assert better.sentence.startswith(f"{words} of the base model: 0.400 better, with 95% confidence at least ")
    assert (0.9, 0.5) == (better.figures[figure], better.figures[f"other_{figure}"])


# The interval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [MIN_ROWS, 30])
def test_equal_models_pass_at_most_as_often_as_the_confidence_allows(num_rows: int) -> None:
    """In 800 comparisons of models that differ by chance alone: 5 %, give or take what 800 throws scatter by."""
    generator = np.random.default_rng(7)
    passed = 0
    for _ in range(800):
        weights = generator.integers(5, 80, num_rows)
        noise = generator.normal(size=num_rows) * np.sqrt(weights)
        found = paired_improvement(
            _evaluation(weights + noise, weights), _evaluation(weights, weights), confidence=0.95
        )
        passed += found.low > 0
    assert 0.02 < passed / 800 < 0.075


def test_improvement_is_the_difference_of_two_means_when_rows_have_other_lengths() -> None:
    """Every token weighs the same: a long row counts for more than a short one."""
    weights = np.array([10.0] * 9 + [110.0])
    candidate = _evaluation(weights * 1.0, weights)
    other = _evaluation([10.0] * 9 + [330.0], weights)
    found = paired_improvement(candidate, other, confidence=0.95)
    assert found.estimate == pytest.approx(other.loss - candidate.loss) == pytest.approx(220 / 200)
    assert found.low < found.estimate


def test_interval_is_the_same_when_it_is_computed_again() -> None:
    """Seeded, so that a version that is trained again gets the same manifest."""
    first, second = (paired_improvement(_around(1.0), _around(1.1, seed=1), confidence=0.9) for _ in range(2))
    assert first == second
    wider = paired_improvement(_around(1.0), _around(1.1, seed=1), confidence=0.99)
    assert wider.low < first.low


def test_interval_is_found_when_rows_are_more_than_one_drawing_takes() -> None:
    """The draws are made in parts; rows without a token that carries loss weigh nothing."""
    num_rows = 3000
    weights = np.array([0.0, 4.0] * (num_rows // 2))
    found = paired_improvement(_evaluation(weights * 0.5, weights), _evaluation(weights, weights), confidence=0.95)
    assert found.estimate == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)


# Better than the base -------------------------------------------------------------------------------------------------


def test_gate_is_passed_when_the_version_is_better_in_everything(tmp_path: Path) -> None:
    """Four checks, none of them open."""
    report = judge(_evidence(present=Present("legal@v1", DIGEST, _around(1.5, seed=2))), _settings(tmp_path))
    assert (report.verdict, report.compared_with) == ("passed", DIGEST)
    outcomes = {check.name: check.outcome for check in report.checks}
    assert outcomes == dict.fromkeys(("base", "present", "forgetting", "sampling"), "passed")


@pytest.mark.parametrize(
    ("gain", "margin", "expected"), [(0.5, 0.1, "passed"), (0.5, 0.6, "failed"), (-0.5, 0, "failed")]
)
def test_base_check_compares_the_certain_gain_with_the_margin(
    tmp_path: Path, gain: float, margin: float, expected: str
) -> None:
    """Rows that all differ by as much: the interval has no width, and the sign is that of an improvement."""
    base = _around(2.0)
    candidate = _evaluation(base.losses - gain)
    check = _find(_evidence(candidate=candidate, base=base), _settings(tmp_path, gate_margin=margin), "base")
    assert check.outcome == expected
    assert check.figures["improvement"] == pytest.approx(gain, abs=1e-5)
    assert f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'}" in check.sentence


def test_gate_fails_when_the_gain_may_be_chance(tmp_path: Path) -> None:
    """A better mean is not enough."""
    candidate, base = _around(1.95, seed=1, spread=1.0), _around(2.0, seed=2, spread=1.0)
    report = judge(_evidence(candidate=candidate, base=base), _settings(tmp_path, gate_margin=0))
    assert report.verdict == "failed"
    assert report.reason.startswith("the gate was not passed: validation loss ")


def test_gate_fails_when_the_present_version_is_better(tmp_path: Path) -> None:
    """Better than the base is not enough for an alias that has something better."""
    report = judge(_evidence(present=Present("legal@v3", DIGEST, _around(0.8, seed=2))), _settings(tmp_path))
    assert report.verdict == "failed"
    assert "of legal@v3" in report.reason
    assert "of the base model" not in report.reason


# What can't be checked ------------------------------------------------------------------------------------------------


def test_gate_is_inconclusive_when_there_is_nothing_to_validate_on(tmp_path: Path) -> None:
    """Not failed, and not passed; the other checks are made."""
    evidence = _evidence(candidate=None, base=None, present=Present("legal@v1", DIGEST))
    report = judge(evidence, _settings(tmp_path))
    assert report.verdict == "inconclusive"
    assert report.reason == (
        "the gate is inconclusive: not compared with the base model: there is no validation file; "
        "not compared with legal@v1: there is no validation file"
    )
    assert {check.outcome for check in report.checks if check.name in ("forgetting", "sampling")} == {"passed"}


def test_gate_is_inconclusive_when_rows_are_too_few(tmp_path: Path) -> None:
    """Seven rows say too little, eight are judged."""
    for num_rows, expected in ((MIN_ROWS - 1, "inconclusive"), (MIN_ROWS, "passed")):
        candidate, base = (_around(mean, num_rows=num_rows, spread=0.1) for mean in (1.0, 2.0))
        assert judge(_evidence(candidate=candidate, base=base), _settings(tmp_path)).verdict == expected


def test_gate_is_inconclusive_when_the_present_version_can_not_be_measured(tmp_path: Path) -> None:
    """The sentence says why."""
    present = Present("legal@v1", DIGEST, problem="it was made for another base model")
    report = judge(_evidence(present=present), _settings(tmp_path))
    assert report.verdict == "inconclusive"
    assert report.reason.endswith("not compared with legal@v1: it was made for another base model")


def test_gate_fails_when_what_can_be_checked_is_bad(tmp_path: Path) -> None:
    """Nothing to compare with is no excuse."""
    assert judge(_evidence(candidate=None, base=None, general=(9.0, 3.0)), _settings(tmp_path)).verdict == "failed"


# Forgetting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("general", "expected"), [((3.4, 3.0), "passed"), ((3.6, 3.0), "failed"), ((2.0, 3.0), "passed")]
)
def test_forgetting_is_the_rise_of_the_loss_on_general_text(
    tmp_path: Path, general: tuple[float, float], expected: str
) -> None:
    """A fall is no forgetting."""
    check = _find(_evidence(general=general), _settings(tmp_path, gate_forgetting=0.5), "forgetting")
    assert check.outcome == expected
    assert check.figures["rise"] == pytest.approx(general[0] - general[1])


def test_forgetting_fails_when_the_loss_is_not_a_number(tmp_path: Path) -> None:
    """What compares as false to everything must not pass; the report stays JSON."""
    check = _find(_evidence(general=(float("nan"), 3.0)), _settings(tmp_path), "forgetting")
    assert (check.outcome, check.figures) == ("failed", {"other_loss": 3.0})


def test_forgetting_is_unchecked_when_nobody_chats_with_the_version(tmp_path: Path) -> None:
    """A reward model has no words to lose; its gate can be passed all the same."""
    report = judge(_evidence(general=None, samples=()), _settings(tmp_path))
    assert report.verdict == "passed"
    assert {c.name for c in report.checks if c.outcome == "unchecked"} == {"forgetting", "sampling"}


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_bad", "expected"), [(0, "passed"), (2, "passed"), (3, "failed")])
def test_sampling_fails_when_too_many_answers_are_degenerate(tmp_path: Path, num_bad: int, expected: str) -> None:
    """A quarter of eight is two; what is wrong with them is counted by kind."""
    bad = [_sample(""), _sample("x", tokens=(7,) * 30), _sample(" ")][:num_bad]
    samples = [*bad, *[_sample()] * (8 - num_bad)]
    check = _find(_evidence(samples=samples), _settings(tmp_path), "sampling")
    assert check.outcome == expected
    if num_bad == 3:
        assert "3 of 8 sampled answers are degenerate (2 empty, 1 loop)" in check.sentence
        assert check.figures == {"share": 0.375, "empty": 2, "loop": 1}
        assert check.cure is not None
        assert "rows with empty or very short answers" in check.cure


def test_sampling_names_the_end_of_turn_when_answers_are_too_long(tmp_path: Path) -> None:
    """The figure that the cure is chosen by has the flaw's own name."""
    check = _find(
        _evidence(samples=[_sample(tokens=tuple(range(30)), has_ended=False)] * 4), _settings(tmp_path), "sampling"
    )
    assert check.figures == {"share": 1, "too_long": 4}
    assert check.cure == "train for more steps or on more rows: the end of a turn is not learned yet"


def test_sampling_is_unchecked_when_no_answers_are_wanted(tmp_path: Path) -> None:
    """Whoever switches it off is not held up by it."""
    assert judge(_evidence(samples=()), _settings(tmp_path)).verdict == "passed"


def test_format_fails_when_too_few_answers_keep_to_it(tmp_path: Path) -> None:
    """Only where one is declared."""
    samples = [_sample("Clause: A.")] * 8 + [_sample("So what?")] * 2
    assert [c.name for c in judge(_evidence(samples=samples), _settings(tmp_path)).checks].count("format") == 0
    strict = _settings(tmp_path, gate_format_regex=r"Clause: .*\.")
    loose = _settings(tmp_path, gate_format_regex=r"Clause: .*\.", gate_format_share=0.8)
    assert _find(_evidence(samples=samples), strict, "format").outcome == "failed"
    assert _find(_evidence(samples=samples), loose, "format").outcome == "passed"


def test_format_fails_when_it_is_declared_and_nothing_was_sampled(tmp_path: Path) -> None:
    """What nobody looked at is not kept."""
    settings = _settings(tmp_path, gate_format_schema='{"type": "object"}')
    check = _find(_evidence(samples=()), settings, "format")
    assert (check.outcome, check.sentence) == ("failed", "the format was not checked: no answers were sampled")
