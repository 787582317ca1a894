"""Trains and calibrates a `RouterModel` from the prompts of several aliases. Deterministic: no clock, no chance.

Kernel ridge regression, one value an alias. Its predictions for prompts that were left out follow in closed form from
the one fit (Rifkin and Lippert, "Notes on Regularized Least Squares", MIT-CSAIL-TR-2007-025, section 3), for single
prompts and for whole aliases alike: so calibration on unseen texts costs no further fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.features import count_grams, hash_words, learn_vocabulary, normalise
from adapters.routing.model import Calibration, Meaning, RouterModel, gate_input
from adapters.routing.prompts import MIN_ALIASES, group_alike
from adapters.routing.spelling import Speller, correct_spelling
from adapters.routing.templates import find_templates, strip_templates

__all__ = ["train_router"]

_PENALTY = 2.0
_BIAS = 0.3  # what all texts have in common, in the kernel
_MEANING = 1.0  # the weight of embeddings in the kernel, beside n-grams
_NUM_SHARED = 1  # direction that all texts share, of which most is taken away
_LEAST_WORD_WEIGHT = 0.05
_GATE_INVERSE_PENALTY = 1.0
_OUT_SHARE = 0.25  # of requests are assumed to belong to no alias: what probabilities are calibrated for
_LEFT_OUT_SHARE = 0.5  # of those are like an alias that was left out, the others like general texts
_BATCH = 256  # texts whose words are counted at once

Array = npt.NDArray[np.float64]


def train_router(
    prompts: Mapping[str, Sequence[str]], background: Sequence[str], embeddings: TokenEmbeddings | None = None
) -> RouterModel:
    """Train a router, on one core: the others are for those who wait for answers.

    Args:
        prompts: For each alias, the oldest first, some of what it was trained on: one prompt or more. Of aliases that
            share most of them (`group_alike`) the first stands for all; there must be two groups or more.
        background: Texts of no domain.
        embeddings: The base model's; None to do without.
    """
    with threadpool_limits(limits=1):
        return _train(prompts, background, embeddings)


def _train(
    prompts: Mapping[str, Sequence[str]], background: Sequence[str], embeddings: TokenEmbeddings | None
) -> RouterModel:
    groups = tuple(group_alike(prompts))
    assert len(groups) >= MIN_ALIASES, "there is nothing to choose between"
    aliases = [first for first, *_ in groups]
    normalised = [[normalise(text) for text in prompts[alias]] for alias in aliases]
    starts, ends = _all_templates(normalised)
    own = [strip_templates(text, starts, ends) for texts in normalised for text in texts]
    speller = _learn_words([text for texts in normalised for text in texts])
    spellers = [speller] if embeddings is None else [speller, embeddings.speller]
    general = [correct_spelling(normalise(text), spellers) for text in background]
    texts = own + [strip_templates(text, starts, ends) for text in general]
    sizes = [*map(len, normalised), len(background)]
    classes = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    # What only general texts hold stays unknown: it says nothing about any alias.
    vocabulary = learn_vocabulary(count_grams(own))
    matrix = vocabulary.vectorise(count_grams(texts)).to_matrix(len(vocabulary.ids))
    kernel = (matrix @ matrix.T).toarray().astype(np.float64) + _BIAS
    meaning, vectors = None, None
    if embeddings is not None:
        meaning, vectors = _learn_meaning(texts, embeddings)
        kernel += _MEANING * (vectors @ vectors.T)
    fit = _solve(kernel, classes, len(aliases))
    return RouterModel(
        groups=groups,
        starts=starts,
        ends=ends,
        speller=speller,
        vocabulary=vocabulary,
        coefficients=np.ascontiguousarray(matrix.T @ fit.duals, dtype=np.float32),
        intercepts=(_BIAS * fit.duals.sum(axis=0)).astype(np.float32),
        meaning=meaning,
        meaning_coefficients=None if vectors is None else (_MEANING * vectors.T @ fit.duals).astype(np.float32),
        prompts=matrix[: len(own)],
        classes=classes[: len(own)],
        positions=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes[:-1]]),
        calibration=_calibrate(fit, classes, len(aliases)),
    )


def _all_templates(normalised: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of all aliases, the longest first: whoever writes in a template, it says nothing."""
    found = [find_templates(texts) for texts in normalised]
    starts = {start for own, _ in found for start in own}
    ends = {end for _, own in found for end in own}
    return tuple(sorted(starts, key=_longest_first)), tuple(sorted(ends, key=_longest_first))


def _longest_first(template: str) -> tuple[int, str]:
    return -len(template), template


def _learn_words(texts: Sequence[str]) -> Speller:
    """The words of some texts; those of many come first."""
    counts = Counter(word for text in texts for word in set(text.split()))
    return Speller(sorted(counts, key=lambda word: (-counts[word], word)))


def _learn_meaning(texts: Sequence[str], embeddings: TokenEmbeddings) -> tuple[Meaning, npt.NDArray[np.float32]]:
    """How words are weighted and what all texts share; and the vectors of these texts."""
    hashed = [np.unique(hash_words(text.split())) for text in texts]
    words, frequencies = np.unique(np.concatenate(hashed), return_counts=True)
    weights = np.log((1 + len(texts)) / (1 + frequencies)) + _LEAST_WORD_WEIGHT
    default = float(np.log(1 + len(texts)) + _LEAST_WORD_WEIGHT)
    nothing = np.zeros(embeddings.size, dtype=np.float32)
    plain = Meaning(embeddings.identity, words, weights.astype(np.float32), default, nothing, nothing[None, :][:0])
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    totals = np.concatenate([plain.totals(part, embeddings) for part in parts])
    mean = totals.mean(axis=0)
    shared = np.linalg.svd(totals - mean, full_matrices=False)[2][:_NUM_SHARED]
    meaning = Meaning(embeddings.identity, words, plain.weights, default, mean, np.ascontiguousarray(shared))
    return meaning, meaning.project(totals)


@dataclass(frozen=True, slots=True)
class _Fit:
    """`inverse [n, n]` of the penalised kernel, and the dual coefficients `[n, num_aliases]`."""

    inverse: Array
    duals: Array


def _solve(kernel: Array, classes: npt.NDArray[np.int32], num_aliases: int) -> _Fit:
    """Regress on being of each alias; texts of no domain are of none. Classes weigh alike whatever their size."""
    sizes = np.bincount(classes, minlength=num_aliases + 1)
    weights = (len(classes) / (num_aliases * np.maximum(sizes, 1)))[classes]
    targets = _targets(classes, num_aliases)
    inverse = np.linalg.inv(kernel + _PENALTY * np.diag(1 / weights))
    return _Fit(inverse.astype(np.float64), inverse @ targets)


def _targets(classes: npt.NDArray[np.int32], num_aliases: int) -> Array:
    return np.asarray(classes[:, None] == np.arange(num_aliases), dtype=np.float64)


def _calibrate(fit: _Fit, classes: npt.NDArray[np.int32], num_aliases: int) -> Calibration:
    """Fit the gate and the sharpness to what the regression says of texts that it was fitted without."""
    singly = _targets(classes, num_aliases) - fit.duals / np.diag(fit.inverse)[:, None]
    is_own = classes < num_aliases
    left_out = _leave_aliases_out(fit, classes, num_aliases)
    gate = _fit_gate(gate_input(singly[is_own]), left_out, gate_input(singly[~is_own]))
    sharpness = _fit_sharpness(singly[is_own], classes[is_own])
    return Calibration(sharpness, float(gate.coef_[0, 0]), float(gate.intercept_[0]))


def _leave_aliases_out(fit: _Fit, classes: npt.NDArray[np.int32], num_aliases: int) -> Array:
    """What the gate sees of each alias's prompts where that alias was never known: so look texts of nobody."""
    found = []
    for alias in range(num_aliases):
        own = np.flatnonzero(classes == alias)
        values = -np.linalg.solve(fit.inverse[np.ix_(own, own)], fit.duals[own])
        found.append(gate_input(np.delete(values, alias, axis=1)))
    return np.concatenate(found)


def _fit_gate(inside: Array, left_out: Array, general: Array) -> LogisticRegression:
    """Logistic regression, weighted as if so many requests as assumed belonged to no alias.

    Every text counts a little as if it were the other way round, the more the fewer there are: that a few can be told
    apart without an error is no proof that all can. Source: Platt, "Probabilistic outputs for support vector machines"
    (1999), section 2.2.
    """
    shares = [1 - _OUT_SHARE, _OUT_SHARE * _LEFT_OUT_SHARE, _OUT_SHARE * (1 - _LEFT_OUT_SHARE)]
    groups = [inside, left_out, general]
    total = sum(map(len, groups))
    weights = [
        np.full(len(group), share * total / max(1, len(group))) for group, share in zip(groups, shares, strict=True)
    ]
    labels = np.concatenate([np.ones(len(inside)), np.zeros(len(left_out) + len(general))])
    doubts = np.where(labels == 1, 1 / (len(inside) + 2), 1 / (total - len(inside) + 2))
    weight = np.concatenate(weights)
    gate = LogisticRegression(C=_GATE_INVERSE_PENALTY, max_iter=1000)
    return gate.fit(
        np.concatenate([*groups, *groups])[:, None],
        np.concatenate([labels, 1 - labels]),
        sample_weight=np.concatenate([weight * (1 - doubts), weight * doubts]),
    )


def _fit_sharpness(values: Array, labels: npt.NDArray[np.int32]) -> float:
    """What to multiply with, so that the right aliases are likeliest.

    Source: temperature scaling, Guo et al., arXiv 1706.04599, section 4.2; this is the temperature's inverse.
    """

    def loss(log_sharpness: float) -> float:
        likelihoods = log_softmax(values * np.exp(log_sharpness), axis=1)
        return -float(likelihoods[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(0.0, 4.0), method="bounded").x))
