"""How well a router routes: accuracy, calibration, what abstaining buys, and whether wording alone flips a choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.model import RouterModel

__all__ = ["Evaluation", "Predictor", "RiskPoint", "ThresholdPoint", "add_typos", "evaluate", "predictor_of"]

_NUM_BINS = 10
_COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_TYPO_SEED = 7
_BATCH = 256  # texts that are read at once: the memory that a large file takes is bounded
_LETTERS_A_SLIP = 40  # people who type leave about 2 % of the letters wrong

# From texts to the probabilities [num_texts, num_aliases], in the order of the aliases.
Predictor = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class RiskPoint:
    """Of the most confident `coverage` of all texts, the share `risk` whose best alias is wrong."""

    coverage: float
    risk: float


@dataclass(frozen=True, slots=True)
class ThresholdPoint:
    """What a threshold would do, in shares as in `Evaluation`."""

    threshold: float
    routed: float
    misrouted: float
    taken_in: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`accuracy` and `macro_f1` are of the best alias for texts that have one; `calibration_error` is over all texts.

    `auc` tells texts with an alias from those without by the confidence; None where there are no such texts. `routed`
    and `misrouted` are shares of the texts with an alias that got one, and a wrong one, at the threshold; `taken_in` is
    the share of the others that got one. Flip rates are shares of texts whose choice, abstaining included, differs when
    they are written otherwise; None without paraphrases.
    """

    num_texts: int
    num_outside: int
    accuracy: float
    macro_f1: float
    calibration_error: float
    auc: float | None
    routed: float
    misrouted: float
    taken_in: float | None
    risk_coverage: tuple[RiskPoint, ...]
    thresholds: tuple[ThresholdPoint, ...]
    flips_by_typos: float
    flips_by_case: float
    flips_by_paraphrase: float | None


def evaluate(
    predict: Predictor,
    aliases: Sequence[str],
    texts: Sequence[str],
    expected: Sequence[str | None],
    paraphrases: Sequence[str | None],
    *,
    threshold: float,
) -> Evaluation:
    """Measure a router on texts whose alias is known, None for none.

    Raises:
        ValueError: there is no text with an alias that the router has.
    """
    index = {alias: number for number, alias in enumerate(aliases)}
    labels = np.array([-1 if alias is None else index.get(alias, -2) for alias in expected])
    is_inside = labels != -1
    if not (labels >= 0).any():
        raise ValueError("there is no text with an alias that the router knows")
    probabilities = predict(texts)
    best, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    is_right = best == labels
    chosen = _choices(probabilities, threshold)
    at_threshold = _at_threshold(probabilities, labels, threshold)
    pairs = [(number, text) for number, text in enumerate(paraphrases) if text is not None]
    return Evaluation(
        num_texts=len(texts),
        num_outside=int((~is_inside).sum()),
        accuracy=float(is_right[is_inside].mean()),
        macro_f1=_macro_f1(best[is_inside], labels[is_inside]),
        calibration_error=_calibration_error(confidence, is_right),
        auc=_auc(confidence[is_inside], confidence[~is_inside]),
        routed=at_threshold.routed,
        misrouted=at_threshold.misrouted,
        taken_in=at_threshold.taken_in,
        risk_coverage=_risk_coverage(confidence, is_right),
        thresholds=tuple(_at_threshold(probabilities, labels, other) for other in sorted({*_THRESHOLDS, threshold})),
        flips_by_typos=_flips(predict, threshold, [*map(add_typos, texts)], chosen),
        flips_by_case=_flips(predict, threshold, [text.upper() for text in texts], chosen),
        flips_by_paraphrase=_flips(predict, threshold, [text for _, text in pairs], chosen[[n for n, _ in pairs]])
        if pairs
        else None,
    )


def predictor_of(model: RouterModel, embeddings: TokenEmbeddings | None) -> Predictor:
    """What a model says, in the form that is measured."""

    def predict(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        return np.stack([scores.probabilities for part in parts for scores in model.score(part, embeddings)])

    return predict


def add_typos(text: str) -> str:
    """The text with a slip every forty letters, one at least: two swapped, one left out, doubled or another hit."""
    # Reproducible misspelling, not a secret.
    chance = random.Random(f"{_TYPO_SEED}:{text}")  # noqa: S311
    letters = list(text)
    places = [place for place, letter in enumerate(letters[:-1]) if letter.isalpha() and letters[place + 1].isalpha()]
    for place in sorted(
        chance.sample(places, k=min(len(places), max(1, len(places) // _LETTERS_A_SLIP))), reverse=True
    ):
        kind = chance.randrange(4)
        if kind == 0:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        elif kind == 1:
            del letters[place]
        elif kind == 2:
            letters.insert(place, letters[place])
        else:
            letters[place] = chance.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters)


def _choices(probabilities: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.int64]:
    return np.where(probabilities.max(axis=1) >= threshold, probabilities.argmax(axis=1), -1)


def _at_threshold(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], threshold: float
) -> ThresholdPoint:
    chosen = _choices(probabilities, threshold)
    is_routed, is_inside = chosen >= 0, labels != -1
    return ThresholdPoint(
        threshold=threshold,
        routed=float(is_routed[is_inside].mean()),
        misrouted=float((is_routed & (chosen != labels))[is_inside].mean()),
        taken_in=float(is_routed[~is_inside].mean()) if (~is_inside).any() else None,
    )


def _flips(predict: Predictor, threshold: float, texts: Sequence[str], chosen: npt.NDArray[np.int64]) -> float:
    return float((_choices(predict(texts), threshold) != chosen).mean())


def _macro_f1(found: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> float:
    scores = []
    for label in np.unique(labels):
        hits = ((found == label) & (labels == label)).sum()
        scores.append(2 * hits / ((found == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def _calibration_error(confidence: npt.NDArray[np.float32], is_right: npt.NDArray[np.bool_]) -> float:
    """The expected calibration error over ten bins of equal width. Source: arXiv 1706.04599, equation 3."""
    bins = np.minimum((confidence * _NUM_BINS).astype(int), _NUM_BINS - 1)
    gaps = [
        (bins == number).mean() * abs(confidence[bins == number].mean() - is_right[bins == number].mean())
        for number in np.unique(bins)
    ]
    return float(sum(gaps))


def _auc(inside: npt.NDArray[np.float32], outside: npt.NDArray[np.float32]) -> float | None:
    """How often a text with an alias has more confidence than one without; ties count half."""
    if not len(outside):
        return None
    ordered = np.sort(outside)
    below, not_above = (np.searchsorted(ordered, inside, side=side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(outside)))


def _risk_coverage(confidence: npt.NDArray[np.float32], is_right: npt.NDArray[np.bool_]) -> tuple[RiskPoint, ...]:
    order = np.argsort(-confidence, kind="stable")
    counts = [(coverage, max(1, round(coverage * len(order)))) for coverage in _COVERAGES]
    return tuple(RiskPoint(coverage, float(1 - is_right[order[:count]].mean())) for coverage, count in counts)
