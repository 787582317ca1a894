"""The pace of prompts: full speed alone, bounded by time beside running streams."""

from __future__ import annotations

import pytest

from server.engine.pacing import PrefillPacer


def _pacer(*, token_s: float, decode_s: float = 0.02) -> PrefillPacer:
    """A pacer that has seen steps of a machine with these speeds."""
    pacer = PrefillPacer(max_tokens=256, max_stall_s=0.2)
    for _ in range(20):
        pacer.note(num_prompt_tokens=0, seconds=decode_s)
        pacer.note(num_prompt_tokens=100, seconds=decode_s + 100 * token_s)
    return pacer


@pytest.mark.parametrize(
    ("token_s", "tokens"), [(0.0001, 256), (0.001, 180), (0.002, 90), (0.1, 16)], ids=["fast", "1 ms", "2 ms", "slow"]
)
def test_budget_keeps_a_step_within_the_stall_when_streams_run(token_s: float, tokens: int) -> None:
    """0.2 s less the decode's 0.02 s, at what a token costs; never above the limit, and never so few that it ends."""
    assert abs(tokens - _pacer(token_s=token_s).budget(is_anybody_decoding=True)) <= 1


def test_budget_is_the_limit_when_nobody_waits() -> None:
    """A prompt alone is read as fast as can be."""
    assert _pacer(token_s=0.1).budget(is_anybody_decoding=False) == 256


def test_budget_is_the_limit_when_nothing_is_known_yet() -> None:
    """The first prompt teaches."""
    assert PrefillPacer(max_tokens=64, max_stall_s=0.1).budget(is_anybody_decoding=True) == 64


def test_note_follows_when_the_machine_becomes_slower() -> None:
    """Averages forget: after some steps at half the speed the budget is about half."""
    pacer = _pacer(token_s=0.001)
    before = pacer.budget(is_anybody_decoding=True)
    for _ in range(20):
        pacer.note(num_prompt_tokens=90, seconds=0.02 + 90 * 0.002)
    assert abs(before / 2 - pacer.budget(is_anybody_decoding=True)) <= 1


def test_note_ignores_short_pieces_when_they_are_the_rest_of_a_prompt() -> None:
    """One token in a step of 0.1 s does not mean that a token costs that."""
    pacer = _pacer(token_s=0.001)
    pacer.note(num_prompt_tokens=1, seconds=0.1)
    assert abs(180 - pacer.budget(is_anybody_decoding=True)) <= 1
