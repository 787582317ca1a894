"""The proof of the sequences, small: wrong formulas break its bounds; the simulator decides as the product does."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.statistics import difference_sequence
from adapters.statistics.mixtures import ArmMoments
from benchmarks.experiment_runs import (
    HEARD_LESS,
    METRICS,
    RARE_THEN_OFTEN,
    Looks,
    Metric,
    Plan,
    Value,
    assign,
    family_errors,
    find_exclusions,
    find_mismatches,
    find_peeks,
    first_looks,
    returning_units,
)
from benchmarks.experiments import SECTIONS, Study, build_studies, format_study, run_chunk, run_studies

_METRICS = {metric.name: metric for metric in METRICS}


def _look(metric: Metric, shape: tuple[int, int], *, effect: float = 0.0, share: float = 0.5, seed: int = 1) -> Looks:
    generator = np.random.default_rng(seed)
    in_treatment = assign(generator, shape, share)
    values, is_known = metric.values(generator, in_treatment, effect), metric.known(generator, in_treatment)
    return Looks.of(values, in_treatment, is_binary=metric.rate is not None, is_known=is_known)


def _ever(flags: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> float:
    return float(flags.any(axis=1).mean())


@pytest.mark.parametrize("name", ["Gaussian", "binary, p = 0.5"])
def test_sequence_keeps_its_error_when_it_is_looked_at_after_every_unit(name: str) -> None:
    """600 experiments of 1,000 units, planned for 60: at most 5 % and two standard errors; the z-test has over 25 %.

    Looks go on far beyond the plan, where a boundary without its logarithm, or of another alpha, errs more often.
    An error of nothing would be suspicious too: so is a boundary that is too far away.
    """
    looks = _look(_METRICS[name], (600, 1000))
    error = _ever(find_exclusions(looks, 0.0, Plan(60)))
    assert 0.005 <= error <= 0.068
    assert _ever(find_peeks(looks, 0.0)) > 0.25


@pytest.mark.parametrize(
    ("name", "effect", "units", "least"), [("Gaussian", 0.35, 485, 0.75), ("binary, p = 0.5", 0.15, 667, 0.75)]
)
def test_sequence_finds_an_effect_when_so_many_units_were_planned(
    name: str, effect: float, units: int, least: float
) -> None:
    """The planned power of 80 % is reached by then, and the truth is excluded by at most 5 % meanwhile."""
    looks = _look(_METRICS[name], (300, units), effect=effect)
    assert _ever(find_exclusions(looks, 0.0, Plan(units))) > least
    assert _ever(find_exclusions(looks, effect, Plan(units))) <= 0.085


def test_sequence_keeps_its_error_when_a_small_arm_is_skewed() -> None:
    """Lognormal values, one in ten in the treatment: 11 % without the correction and the least number of units."""
    looks = _look(_METRICS["skewed: lognormal, skewness 6"], (500, 1000), share=0.1)
    assert _ever(find_exclusions(looks, 0.0, Plan(500, treatment_share=0.1))) <= 0.08


@pytest.mark.parametrize(("metric", "share"), [(RARE_THEN_OFTEN, 0.05), (HEARD_LESS, 0.5)])
def test_sequence_keeps_its_error_when_rates_change_in_time(metric: Metric, share: float) -> None:
    """Both arms' alike: the small arm's users are set against those of their own time, and so are those who report.

    One after the other, without a look at when they came, it errs in most of these experiments.
    """
    looks = _look(metric, (40, 8000), share=share)
    assert _ever(find_exclusions(looks, 0.0, Plan(4000, treatment_share=share))) <= 0.1


def test_sequence_keeps_its_error_when_units_come_back() -> None:
    """The first outcome of users who make 10 requests each; their means so far are what is not covered."""
    generator = np.random.default_rng(1)
    looks = returning_units(generator, (200, 1000), new_share=0.1, concentration=1e6, value="first")
    assert _ever(find_exclusions(looks, 0.0, Plan(50))) <= 0.1
    assert _ever(find_peeks(looks, 0.0)) > 0.15


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("name", ["Gaussian", "binary, p = 0.05", "skewed: lognormal, skewness 6"])
def test_simulator_decides_as_the_product_when_a_run_is_looked_at(name: str, share: float) -> None:
    """Unit for unit: the array's decision about a difference is that of the interval made of the values themselves."""
    generator = np.random.default_rng(3)
    in_treatment = assign(generator, (3, 240), share)
    values = _METRICS[name].values(generator, in_treatment)
    looks = Looks.of(values, in_treatment, is_binary=_METRICS[name].rate is not None)
    plan = Plan(100, treatment_share=share)
    excluded = 0
    for difference in (-3.0, 0.0, 0.7):
        flags = find_exclusions(looks, difference, plan)
        for run in range(3):
            for count in (1, 30, 60, 121, 240):
                seen, mask = values[run, :count], in_treatment[run, :count]
                interval = difference_sequence(
                    seen[mask].tolist(),
                    seen[~mask].tolist(),
                    planned_units=100,
                    treatment_share=share,
                    places=(np.flatnonzero(mask), np.flatnonzero(~mask)),
                )
                expected = interval is not None and not interval.low <= difference <= interval.high
                assert expected == flags[run, count - 1]
                excluded += expected
    assert excluded > 0


@pytest.mark.parametrize("value", ["first", "mean"])
def test_simulated_moments_are_those_of_the_units_when_they_come_back(value: Value) -> None:
    """Sums that are carried along give what the units' values give."""
    moments = returning_units(np.random.default_rng(2), (1, 200), new_share=0.3, concentration=5.0, value=value).control
    generator = np.random.default_rng(2)
    rates, arms = generator.beta(1.5, 3.5, size=(1, 200)), assign(generator, (1, 200))
    outcomes: list[list[float]] = []
    for _ in range(200):
        is_new = bool(generator.random(1)[0] < 0.3) or not outcomes
        chosen = int(generator.random(1)[0] * max(len(outcomes), 1))
        unit = len(outcomes) if is_new else chosen
        outcomes += [[]] if is_new else []
        outcomes[unit].append(float(generator.random(1)[0] < rates[0, unit]))
    mine = [values for place, values in enumerate(outcomes) if not arms[0, place]]
    expected = ArmMoments.of([values[0] if value == "first" else sum(values) / len(values) for values in mine])
    found = [part[0, -1] for part in (moments.count, moments.mean, moments.variance, moments.third)]
    assert pytest.approx([expected.count, expected.mean, expected.variance, expected.third], abs=1e-9) == found


def test_sample_ratio_alarms_when_the_split_is_wrong_and_seldom_otherwise() -> None:
    """300 experiments of 8,000 units: 45/55 is found by almost all, 50/50 by at most 1 %."""
    generator = np.random.default_rng(1)
    wrong = find_mismatches(generator, (100, 8000), true_share=0.45, alpha=0.01)
    assert _ever(wrong) > 0.98
    assert np.median(first_looks(wrong)) < 4000
    assert _ever(find_mismatches(generator, (300, 8000), true_share=0.5, alpha=0.01)) <= 0.03


def test_family_errors_are_kept_when_there_are_three_treatments() -> None:
    """Holm and Bonferroni keep 5 % over all three; each at the full level does more harm than they."""
    found = family_errors(np.random.default_rng(1), (300, 600), num_treatments=3, effect=0.0, plan=Plan(60))
    errors = {rule: float(flags.mean()) for rule, flags in found.items()}
    assert errors["Bonferroni"] <= errors["Holm"] <= 0.085
    assert errors["Holm"] < errors["uncorrected"]


def test_studies_give_the_same_when_the_number_of_workers_differs() -> None:
    """Random numbers belong to the chunk, not to the process; every section has a row, and rows are Markdown."""
    studies = build_studies(60)
    assert set(SECTIONS) == {study.section for study in studies}
    chosen = [study for study in studies if study.name.startswith("Gaussian")]
    one, two = (dict(_results(chosen, workers)) for workers in (1, 2))
    assert one == two
    assert "| Gaussian; 50/50 | 0.00% +- 20.00% |" in one["Gaussian; 50/50"][:40]


def _results(studies: list[Study], workers: int) -> list[tuple[str, str]]:
    done = run_studies(list(enumerate(studies)), num_runs=10, seed=1, workers=workers)
    return [(study.name, format_study(study, outcomes)) for study, outcomes in done]


def test_chunk_is_repeatable_when_its_seed_is_given_again() -> None:
    """Every study's outcomes are one number per run."""
    for study in build_studies(40):
        if study.section in ("errors", "family"):
            first, again = (run_chunk(study, (1, 2), 3) for _ in range(2))
            assert all((first[key] == again[key]).all() and len(first[key]) == 3 for key in first)
