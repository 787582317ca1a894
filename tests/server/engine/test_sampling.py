"""Choosing tokens: greedy, by temperature and by top-p, each row by its own generator."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.core import GenerationRequest, SamplingParams, Sequence
from server.engine.sampling import make_generator, sample
from server.engine.text_stream import TextStream
from tests.support.engine import TokenText

CPU = torch.device("cpu")
PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log() + 3.0  # softmax takes the constant out


def _draws(count: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 1) -> list[int]:
    params = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)
    sequence = Sequence(
        GenerationRequest("r", (1,), None, params), TextStream(TokenText(0)), make_generator(params, CPU)
    )
    return [sample(LOGITS, int(LOGITS.argmax()), sequence) for _ in range(count)]


def _assert_distribution(draws: list[int], expected: list[float]) -> None:
    """Pearson's chi-square: 25 is far beyond the 99.9 % quantile of 4 degrees of freedom (18.5); the seed is fixed."""
    counts = [draws.count(token) for token in range(len(expected))]
    assert [token for token, share in enumerate(expected) if share == 0 and counts[token]] == []
    total = len(draws)
    chi_square = sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, expected, strict=True) if p)
    assert chi_square < 25


def test_sample_takes_the_likeliest_when_temperature_is_zero() -> None:
    """Greedy draws nothing, whatever the seed and top-p."""
    assert _draws(20, temperature=0, top_p=0.3) == [0] * 20


def test_sample_equals_greedy_when_top_p_is_tiny() -> None:
    """The smallest set that reaches almost no mass is the likeliest token alone."""
    assert _draws(50, temperature=2.0, top_p=1e-6) == [0] * 50


def test_sample_repeats_itself_when_the_seed_is_the_same() -> None:
    """Equal seeds give equal draws, others don't."""
    assert _draws(40, seed=7) == _draws(40, seed=7)
    assert _draws(40, seed=7) != _draws(40, seed=8)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_generator_takes_a_seed_when_it_is_at_the_apis_bounds(seed: int) -> None:
    """Every seed that the wire lets through is legal here."""
    assert _draws(5, seed=seed) == _draws(5, seed=seed)


def test_generators_differ_when_no_seed_is_given() -> None:
    """Two requests without a seed don't share their luck."""
    params = SamplingParams(max_tokens=1)
    assert make_generator(params, CPU).initial_seed() != make_generator(params, CPU).initial_seed()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_softmax_when_temperature_is_given(temperature: float) -> None:
    """Frequencies of 4,000 draws agree with p ** (1 / temperature), normalised."""
    weights = [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    _assert_distribution(_draws(4000, temperature=temperature), [weight / sum(weights) for weight in weights])


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.86, 4), (0.96, 5)])
def test_sample_keeps_the_smallest_set_when_top_p_is_given(top_p: float, kept: int) -> None:
    """Only the likeliest tokens whose mass reaches top-p are drawn, each in proportion to its own."""
    head = PROBABILITIES[:kept]
    expected = (head / head.sum()).tolist() + [0.0] * (len(PROBABILITIES) - kept)
    _assert_distribution(_draws(2000, top_p=top_p), expected)


def test_sample_ignores_the_order_of_tokens_when_top_p_sorts_them() -> None:
    """The drawn index is the token's own, not its place in the sorted row."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 9.0])
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, seed=1)
    sequence = Sequence(
        GenerationRequest("r", (1,), None, params), TextStream(TokenText(0)), make_generator(params, CPU)
    )
    assert sample(logits, 3, sequence) == 3


@pytest.mark.parametrize("temperature", [1e-39, 5e-324])
def test_sample_takes_the_likeliest_when_temperature_is_almost_zero(temperature: float) -> None:
    """The wire allows any temperature from 0 to 2, so the smallest float must not fail the request."""
    assert _draws(5, temperature=temperature) == [0] * 5
