"""The gate: what a version must show before an alias moves to it. It judges numbers and answers; it loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from adapters.gate_report import CheckName, GateCheck, GateReport, Outcome
from training.answer_format import keeps_format
from training.config import TrainSettings
from training.losses import Evaluation
from training.sampling import Sample, find_flaw

__all__ = ["MIN_ROWS", "Evidence", "Improvement", "Present", "judge", "paired_improvement"]

MIN_ROWS = 8  # with fewer, an interval says less than it seems to
_RESAMPLES = 4000
_DRAWS_AT_ONCE = 1_000_000
_SEED = 20_170_817
_DIGITS = 6
# What methods with scores are compared by, and what the figures call it; the others are compared by their loss.
_MEASURES = {
    "reward": ("share of validation pairs in the right order", "pair_accuracy"),
    "rloo": ("mean reward of answers to validation prompts", "mean_reward"),
    "grpo": ("mean reward of answers to validation prompts", "mean_reward"),
}


@dataclass(frozen=True, slots=True)
class Improvement:
    """By how much one loss is lower than another: the estimate, and the lower end of its one-sided interval."""

    estimate: float
    low: float


@dataclass(frozen=True, slots=True)
class Present:
    """The version that the alias points to. Without an `evaluation`, `problem` says why there is none."""

    label: str
    digest: str
    evaluation: Evaluation | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a version is judged by.

    Evaluations are None where there is nothing to measure on. `general` is the loss on text of no domain, in nats a
    token, with the version and of the base model; None of what nobody chats with.
    """

    candidate: Evaluation | None
    base: Evaluation | None
    general: tuple[float, float] | None
    samples: Sequence[Sample] = ()
    present: Present | None = None


def judge(evidence: Evidence, settings: TrainSettings) -> GateReport:
    """Make every check that can be made, and say which could not be."""
    checks = [
        _check_better("base", "the base model", evidence.candidate, evidence.base, None, settings),
        *_check_present(evidence, settings),
        _check_forgetting(evidence, settings),
        _check_sampling(evidence.samples, settings),
        *_check_format(evidence.samples, settings),
    ]
    return GateReport(checks=checks, compared_with=evidence.present.digest if evidence.present else None)


def paired_improvement(candidate: Evaluation, other: Evaluation, *, confidence: float) -> Improvement:
    """How much better the candidate is than another on the same rows: by its loss, or its scores, in their unit.

    Rows are drawn with replacement, seeded; each draw gives the difference of two means over all tokens. The quantile
    that is the interval's end is moved outwards as Student's t asks: the plain one is too narrow for few rows. It holds
    about its confidence for symmetric differences from 8 rows on. With strongly lopsided ones it passes equal models up
    to three times as often as it should (8 rows), and still 1.4 times with 120.

    Source: Efron and Tibshirani (1993), chapter 13; Hesterberg (2015), The American Statistician 69:371, for the
    expanded percentile interval.
    """
    gains = other.losses - candidate.losses
    if candidate.scores is not None and other.scores is not None:
        gains = candidate.scores - other.scores
    num_rows = len(gains)
    drawn = np.concatenate(list(_resample(gains, candidate.weights)))
    tail = stats.t.ppf(1 - confidence, num_rows - 1) * np.sqrt(num_rows / (num_rows - 1))
    low = float(np.quantile(drawn, stats.norm.cdf(tail)))
    return Improvement(float(gains.sum() / candidate.weights.sum()), low)


def _resample(gains: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWS_AT_ONCE // len(gains))
    for start in range(0, _RESAMPLES, at_once):
        shape = (min(at_once, _RESAMPLES - start), len(gains))
        rows = generator.integers(len(gains), size=shape)
        # Rows without a token that carries loss weigh nothing; a draw of nothing else has no mean.
        yield gains[rows].sum(axis=1) / np.maximum(weights[rows].sum(axis=1), 1)


def _check_better(
    name: CheckName,
    title: str,
    candidate: Evaluation | None,
    other: Evaluation | None,
    problem: str | None,
    settings: TrainSettings,
) -> GateCheck:
    if candidate is None or other is None:
        why = problem or "there is no validation file"
        return GateCheck(name=name, outcome="unchecked", sentence=f"not compared with {title}: {why:.800}")
    if (num_rows := len(candidate.losses)) < MIN_ROWS:
        few = f"{num_rows} validation rows are too few, it takes {MIN_ROWS}"
        return GateCheck(name=name, outcome="unchecked", sentence=f"not compared with {title}: {few}")
    found = paired_improvement(candidate, other, confidence=settings.gate_confidence)
    is_better = found.low > settings.gate_margin
    measure, short = _MEASURES.get(settings.method, ("validation loss", "loss"))
    own, others = (_mean(evaluation) for evaluation in (candidate, other))
    sentence = (
        f"{measure} {own:.3f} against {others:.3f} of {title}: {_in_words(found.estimate)}, with "
        f"{settings.gate_confidence:.0%} confidence {'at least' if found.low >= 0 else 'no more than'} "
        f"{_in_words(found.low)}; more than {settings.gate_margin:g} better is needed"
    )
    figures = {short: own, f"other_{short}": others, "improvement": found.estimate, "low": found.low}
    return _check(name, "passed" if is_better else "failed", sentence, figures)


def _in_words(improvement: float) -> str:
    return f"{abs(improvement):.3f} {'better' if improvement >= 0 else 'worse'}"


def _mean(evaluation: Evaluation) -> float:
    return evaluation.loss if evaluation.scores is None else float(evaluation.scores.mean())


def _check_present(evidence: Evidence, settings: TrainSettings) -> Iterator[GateCheck]:
    if (present := evidence.present) is not None:
        candidate = evidence.candidate
        yield _check_better("present", present.label, candidate, present.evaluation, present.problem, settings)


def _check_forgetting(evidence: Evidence, settings: TrainSettings) -> GateCheck:
    if evidence.general is None:
        return GateCheck(name="forgetting", outcome="unchecked", sentence="nobody chats with a reward model")
    loss, loss_of_base = evidence.general
    rise = loss - loss_of_base
    sentence = (
        f"loss on general text {loss:.3f} against {loss_of_base:.3f} of the base model: {rise:+.3f}; "
        f"at most {settings.gate_forgetting:+g} is allowed"
    )
    figures = {"loss": loss, "other_loss": loss_of_base, "rise": rise}
    # Written so that a loss which is no number fails.
    return _check("forgetting", "passed" if rise <= settings.gate_forgetting else "failed", sentence, figures)


def _check_sampling(samples: Sequence[Sample], settings: TrainSettings) -> GateCheck:
    if not samples:
        return GateCheck(name="sampling", outcome="unchecked", sentence="no answers were sampled")
    flaws = [flaw for sample in samples if (flaw := find_flaw(sample))]
    share = len(flaws) / len(samples)
    kinds = ", ".join(f"{flaws.count(kind)} {kind}" for kind in sorted(set(flaws)))
    sentence = (
        f"{len(flaws)} of {len(samples)} sampled answers are degenerate{f' ({kinds})' if kinds else ''}; "
        f"at most {settings.gate_degenerate:.0%} are allowed"
    )
    figures = {"share": share} | {flaw.replace(" ", "_"): float(flaws.count(flaw)) for flaw in sorted(set(flaws))}
    return _check("sampling", "passed" if share <= settings.gate_degenerate else "failed", sentence, figures)


def _check_format(samples: Sequence[Sample], settings: TrainSettings) -> Iterator[GateCheck]:
    expression, schema = settings.gate_format_regex, settings.gate_format_schema
    if expression is None and schema is None:
        return
    if not samples:
        # A declared format that nobody looked at must not look like one that was kept.
        yield GateCheck(name="format", outcome="failed", sentence="the format was not checked: no answers were sampled")
        return
    kept = [keeps_format(sample.text, expression=expression, schema=schema) for sample in samples]
    share = sum(kept) / len(kept)
    sentence = (
        f"{sum(kept)} of {len(kept)} sampled answers keep to the declared format; "
        f"at least {settings.gate_format_share:.0%} are needed"
    )
    yield _check("format", "passed" if share >= settings.gate_format_share else "failed", sentence, {"share": share})


def _check(name: CheckName, outcome: Outcome, sentence: str, figures: dict[str, float]) -> GateCheck:
    rounded = {title: round(figure, _DIGITS) for title, figure in figures.items() if np.isfinite(figure)}
    return GateCheck(name=name, outcome=outcome, sentence=sentence, figures=rounded)
