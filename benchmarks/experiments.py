"""Proof of the statistics of experiments by simulation: what they promise, and what an ordinary test does instead.

    python -m benchmarks.experiments [--runs 10000] [--units 2000] [--workers 2] [--seed 1] [--only ROWS]

Each run is an experiment that is looked at after every unit. The formulas are the product's own; the table's figures
stand with two standard errors of the simulation.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from adapters.statistics.planning import required_units
from benchmarks import experiment_runs as runs_of
from benchmarks.conditions import describe_host, format_conditions
from benchmarks.experiment_runs import HEARD_LESS, METRICS, RARE_THEN_OFTEN, Looks, Metric, Plan, Value
from benchmarks.experiment_verdicts import ENDINGS, SITUATIONS, Situation, run_situation

__all__ = ["SECTIONS", "Study", "build_studies", "format_study", "main", "run_chunk", "run_studies"]

_CHUNK = 250
_MANY = 5  # times the units where a treatment has few of them, or what changes takes time
_SRM_ALPHA = 0.01
_VALUES: dict[Value, str] = {
    "first": "the first outcome",
    "mean": "**not used**: the user's mean so far",
}

Outcomes = dict[str, NDArray[np.float64]]
Measure = Callable[[np.random.Generator, int], Outcomes]

SECTIONS = {
    "errors": "No difference, a look after every unit: experiments in which zero was ever excluded",
    "returning": "Units that come back, no difference, a look after every request: the same",
    "verdicts": "No difference, users come back, a whole report 40 times: experiments that ever had such a verdict",
    "coverage": "A true difference, a look after every unit: experiments in which it was ever excluded",
    "power": "A true difference: how often it is found, and after how many units",
    "mismatch": f"Sample ratio, planned 50/50, alarm at {_SRM_ALPHA:.0%}, 20,000 units, a look after every unit",
    "family": "Three treatments and a control, a look after every unit: some comparison without a difference found one",
}


@dataclass(frozen=True, slots=True)
class Study:
    """One row of the table: its section, its name and what makes a number per run from random numbers.

    A chunk of runs is what a process does at once: fewer where a run takes long.
    """

    section: str
    name: str
    measure: Measure
    chunk: int = _CHUNK


def build_studies(units: int) -> list[Study]:
    """All rows; experiments plan half of `units` and go on to `units`."""
    plan, lopsided = Plan(units / 2), Plan(units / 2, treatment_share=0.1)
    uneven = [metric for metric in METRICS if metric.name.startswith(("binary", "skewed", "heavy-tailed: Pareto"))]
    studies = [Study("errors", f"{metric.name}; 50/50", partial(_errors, metric, units, plan)) for metric in METRICS]
    studies += [
        Study("errors", f"{metric.name}; 10/90", partial(_errors, metric, units, lopsided)) for metric in uneven
    ]
    canary, many = Plan(units * _MANY / 2, treatment_share=0.05), units * _MANY
    for metric, shares, moving in (
        (METRICS[1], "5/95", canary),
        (RARE_THEN_OFTEN, "5/95", canary),
        (HEARD_LESS, "50/50", Plan(many / 2)),
    ):
        measure = partial(_errors, metric, many, moving)
        studies.append(Study("errors", f"{metric.name}; {shares}; {many:,} users", measure, chunk=_CHUNK // _MANY // 2))
    for value, what in _VALUES.items():
        for concentration, new_share, who in (
            (2.0, 0.5, "users differ, 2 requests each"),
            (1e6, 0.05, "alike, 20 each"),
        ):
            measure = partial(_returning, units, value, concentration, new_share)
            studies.append(Study("returning", f"{what}; {who}", measure))
    looks, asked = 40, max(units // 40, 1)
    studies += [
        Study("verdicts", situation.name, partial(_verdicts, situation, looks, asked), chunk=10)
        for situation in SITUATIONS
    ]
    for metric, effect in ((METRICS[0], 0.1), (METRICS[1], 0.05), (METRICS[3], 0.2), (METRICS[4], 0.5)):
        studies.append(Study("coverage", f"{metric.name}, {effect:+g}", partial(_misses, metric, units, plan, effect)))
    measure = partial(_misses, METRICS[1], units, lopsided, 0.05)
    studies.append(Study("coverage", f"{METRICS[1].name}, +0.05; 10/90", measure))
    for metric, effect, deviation in ((Metric("binary, 0.4", rate=0.4), 0.1, None), (METRICS[3], 0.2, 1.0)):
        studies.append(Study("power", f"{metric.name}, {effect:+g}", partial(_power, metric, effect, deviation)))
    for share in (0.5, 0.48):
        studies.append(Study("mismatch", f"really {share:.0%} to {1 - share:.0%}", partial(_mismatch, share)))
    for effect, what in ((0.0, "none differs"), (0.5, "one of three differs")):
        studies.append(Study("family", what, partial(_family, units, plan, effect)))
    return studies


def run_chunk(study: Study, seed: Sequence[int], num_runs: int) -> Outcomes:
    """So many runs of a study; the same seed gives the same."""
    return study.measure(np.random.default_rng(list(seed)), num_runs)


def run_studies(
    studies: Sequence[tuple[int, Study]], *, num_runs: int, seed: int, workers: int
) -> Iterator[tuple[Study, Outcomes]]:
    """Each study with the outcomes of all its runs, as they are done; the number of workers changes nothing.

    Args:
        studies: With their places among all of them, which seed them beside `seed`.
        num_runs: Runs of each.
        seed: Of all random numbers.
        workers: Processes.
    """
    with multiprocessing.get_context("fork").Pool(workers, _keep_studies, (studies,)) as pool:
        for number, (place, study) in enumerate(studies):
            whole, rest = divmod(num_runs, study.chunk)
            sizes = [study.chunk] * whole + [rest] * (rest > 0)
            tasks = [(number, (seed, place, chunk), size) for chunk, size in enumerate(sizes)]
            parts = pool.starmap(_run_kept, tasks, chunksize=1)
            yield study, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def format_study(study: Study, outcomes: Outcomes) -> str:
    """A row of Markdown: the name, then each figure."""
    return f"| {study.name} | " + " | ".join(_format_figure(key, values) for key, values in outcomes.items()) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies and print conditions and tables."""
    options = _parse(arguments)
    conditions = describe_host() | {name: version(name) for name in ("numpy", "scipy")}
    print(format_conditions(conditions | {"runs": options.runs, "units": options.units, "seed": options.seed}))
    wanted = options.only or ""
    studies = [
        (place, study)
        for place, study in enumerate(build_studies(options.units))
        if wanted == study.section or wanted in study.name
    ]
    started, section = time.perf_counter(), None
    for study, outcomes in run_studies(studies, num_runs=options.runs, seed=options.seed, workers=options.workers):
        if study.section != section:
            section = study.section
            print(f"\n{SECTIONS[section]}\n\n| | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}")
        print(format_study(study, outcomes), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s with {options.workers} workers on {platform.machine()}")


def _errors(metric: Metric, units: int, plan: Plan, generator: np.random.Generator, num_runs: int) -> Outcomes:
    looks = _look(metric, units, plan, 0.0, generator, num_runs)
    return _rates(sequence=runs_of.find_exclusions(looks, 0.0, plan), peeking=runs_of.find_peeks(looks, 0.0))


def _misses(
    metric: Metric, units: int, plan: Plan, effect: float, generator: np.random.Generator, num_runs: int
) -> Outcomes:
    looks = _look(metric, units, plan, effect, generator, num_runs)
    return _rates(sequence=runs_of.find_exclusions(looks, effect, plan), peeking=runs_of.find_peeks(looks, effect))


def _look(
    metric: Metric, units: int, plan: Plan, effect: float, generator: np.random.Generator, num_runs: int
) -> Looks:
    in_treatment = runs_of.assign(generator, (num_runs, units), plan.treatment_share)
    values = metric.values(generator, in_treatment, effect)
    is_known = metric.known(generator, in_treatment)
    return Looks.of(values, in_treatment, is_binary=metric.rate is not None, is_known=is_known)


def _returning(
    units: int, value: Value, concentration: float, new_share: float, generator: np.random.Generator, num_runs: int
) -> Outcomes:
    shape = (num_runs, 2 * units)
    looks = runs_of.returning_units(generator, shape, new_share=new_share, concentration=concentration, value=value)
    plan = Plan(units * new_share)  # half of those that will come
    return _rates(sequence=runs_of.find_exclusions(looks, 0.0, plan), peeking=runs_of.find_peeks(looks, 0.0))


def _verdicts(
    situation: Situation, num_looks: int, requests_a_look: int, generator: np.random.Generator, num_runs: int
) -> Outcomes:
    found = run_situation(situation, generator, num_runs, num_looks=num_looks, requests_a_look=requests_a_look)
    return {ending: found[ending] for ending in ENDINGS}


def _power(
    metric: Metric, effect: float, deviation: float | None, generator: np.random.Generator, num_runs: int
) -> Outcomes:
    fixed = required_units(effect, base_rate=metric.rate, std_dev=deviation, analysis="fixed")
    planned = required_units(effect, base_rate=metric.rate, std_dev=deviation)
    plan = Plan(planned)
    looks = _look(metric, planned, plan, effect, generator, num_runs)
    first = runs_of.first_looks(runs_of.find_exclusions(looks, 0.0, plan))
    at_end = runs_of.find_peeks(looks, 0.0)[:, fixed - 1]
    return {
        "one z-test, units": np.full(num_runs, float(fixed)),
        "one z-test, found": at_end.astype(float),
        "sequence, planned units": np.full(num_runs, float(planned)),
        "sequence, found by then": (first <= planned).astype(float),
        "sequence, units used (mean)": np.minimum(first, planned).astype(float),
        "sequence, found with the z-test's units": (first <= fixed).astype(float),
    }


def _mismatch(share: float, generator: np.random.Generator, num_runs: int) -> Outcomes:
    flags = runs_of.find_mismatches(generator, (num_runs, 20_000), true_share=share, alpha=_SRM_ALPHA)
    return {"alarm, ever": flags.any(axis=1).astype(float), "units until then (mean)": _fired(flags)}


def _family(units: int, plan: Plan, effect: float, generator: np.random.Generator, num_runs: int) -> Outcomes:
    found = runs_of.family_errors(generator, (num_runs, 2 * units), num_treatments=3, effect=effect, plan=plan)
    return {rule: flags.astype(float) for rule, flags in found.items()}


def _fired(flags: NDArray[np.bool_]) -> NDArray[np.float64]:
    first = runs_of.first_looks(flags).astype(float)
    return np.where(flags.any(axis=1), first, np.nan)


def _rates(**flags: NDArray[np.bool_]) -> Outcomes:
    return {name: ever.any(axis=1).astype(float) for name, ever in flags.items()}


def _format_figure(name: str, values: NDArray[np.float64]) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    if "units" in name and "found" not in name:
        return f"{known.mean():,.0f}"
    error = 2 * math.sqrt(max(known.mean() * (1 - known.mean()), 1 / len(known)) / len(known))
    return f"{known.mean():.2%} +- {error:.2%}"


_STUDIES: list[Study] = []


def _keep_studies(studies: Sequence[tuple[int, Study]]) -> None:
    _STUDIES[:] = [study for _, study in studies]


def _run_kept(number: int, seed: Sequence[int], num_runs: int) -> Outcomes:
    return run_chunk(_STUDIES[number], seed, num_runs)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="experiments a row")
    parser.add_argument("--units", type=int, default=2_000, help="units an experiment; half of them are planned")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help=f"rows with this in their name, or of one section: {', '.join(SECTIONS)}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
