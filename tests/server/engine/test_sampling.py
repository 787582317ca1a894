"""Choosing tokens: every option against transformers' own processors, each row by its own luck, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.core import SamplingParams
from server.engine.sampling import Choice, Sampler, choose_tokens, make_sampler
from server.engine.scheduler import Engine
from tests.support.engine import Answer, Bench, Reference, TokenText, ask, collect, drain, run_to_end, tokens_of

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log() + 3.0  # softmax takes the constant out
VOCAB = 600  # more than truncation looks at first
PROMPT = "hello there, my old friend"


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    """An engine that nobody else uses, over the shared model."""
    made = bench.engine(max_prefill_tokens=256)
    yield made
    made.close()


def _params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "seed": 1, **options})


def _choose(logits: torch.Tensor, *samplers: Sampler) -> list[Choice]:
    """One step of these samplers over `logits [rows, vocab]`."""
    likeliest = logits.argmax(dim=-1).tolist()
    choices = choose_tokens(logits, likeliest, dict(enumerate(samplers)))
    assert list(range(len(samplers))) == sorted(choices)
    found = []
    for index in range(len(samplers)):
        choice = choices[index]
        assert isinstance(choice, Choice)
        found.append(choice)
    return found


def _draws(count: int, *, logits: torch.Tensor = LOGITS, **options: Any) -> list[int]:
    """Draws of one sampler from the same row, as if the row didn't depend on what was drawn."""
    sampler = Sampler(_params(**options))
    draws = []
    for _ in range(count):
        draws.append(_choose(logits[None], sampler)[0].token)
        sampler.accept(draws[-1])
    return draws


def _assert_distribution(draws: list[int], expected: list[float]) -> None:
    """Pearson's chi-square: 25 is far beyond the 99.9 % quantile of 4 degrees of freedom (18.5); the seed is fixed."""
    counts = [draws.count(token) for token in range(len(expected))]
    assert [token for token, share in enumerate(expected) if share == 0 and counts[token]] == []
    total = len(draws)
    chi_square = sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, expected, strict=True) if p)
    assert chi_square < 25


# The draw ------------------------------------------------------------------------------------------------------------


def test_sampler_is_not_made_when_the_likeliest_token_is_all_that_is_asked_for() -> None:
    """Plain greedy rows cost nothing beyond the batch's one argmax, whatever the options that only a draw reads."""
    plain = _params(temperature=0, top_p=0.3, top_k=5, min_p=0.1, stop=("x",), ignore_eos=True)
    assert make_sampler(plain, (1, 2), frozenset({7})) is None
    for options in ({"temperature": 1}, {"min_tokens": 1}, {"presence_penalty": 1}, {"top_logprobs": 0}):
        assert make_sampler(_params(**{"temperature": 0, **options}), (1,), frozenset({7})) is not None


def test_draw_equals_greedy_when_top_p_is_tiny() -> None:
    """The smallest set that reaches almost no mass is the likeliest token alone."""
    assert _draws(50, temperature=2.0, top_p=5e-324) == [0] * 50


def test_draw_repeats_itself_when_the_seed_is_the_same() -> None:
    """Equal seeds give equal draws, others don't; the sign of a seed counts."""
    assert _draws(40, seed=7) == _draws(40, seed=7)
    assert _draws(40, seed=7) != _draws(40, seed=8)
    assert _draws(40, seed=7) != _draws(40, seed=-7)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**63 + 6])
def test_sampler_takes_a_seed_when_it_is_at_the_apis_bounds(seed: int) -> None:
    """Every seed that the wire lets through is legal here."""
    assert _draws(5, seed=seed) == _draws(5, seed=seed)


def test_samplers_differ_when_no_seed_is_given() -> None:
    """Two requests without a seed don't share their luck."""
    assert Sampler(_params(seed=None)).uniform != Sampler(_params(seed=None)).uniform


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_follows_the_softmax_when_temperature_is_given(temperature: float) -> None:
    """Frequencies of 4,000 draws agree with p ** (1 / temperature), normalised."""
    weights = [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    _assert_distribution(_draws(4000, temperature=temperature), [weight / sum(weights) for weight in weights])


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.86, 4), (0.96, 5)])
def test_draw_keeps_the_smallest_set_when_top_p_is_given(top_p: float, kept: int) -> None:
    """Only the likeliest tokens whose mass reaches top-p are drawn, each in proportion to its own."""
    head = PROBABILITIES[:kept]
    expected = (head / head.sum()).tolist() + [0.0] * (len(PROBABILITIES) - kept)
    _assert_distribution(_draws(2000, top_p=top_p), expected)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9999}, {"top_k": 4}])
def test_draw_never_takes_a_token_without_mass_when_the_number_is_extreme(options: dict[str, Any]) -> None:
    """The least and the greatest number that a generator draws find the first and the last token that has mass."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 9.0, -math.inf])
    found = []
    for uniform in (0.0, 1 - 2**-53):
        sampler = Sampler(_params(**options))
        sampler.uniform = uniform
        found.append(_choose(logits[None], sampler)[0].token)
    assert {1, 3} == set(found)


@pytest.mark.parametrize("temperature", [1e-39, 5e-324])
def test_draw_takes_the_likeliest_when_temperature_is_almost_zero(temperature: float) -> None:
    """The wire allows any temperature from 0 to 2, so the smallest float must not fail the request."""
    assert _draws(5, temperature=temperature) == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choosing_leaves_the_logits_alone_when_rows_are_changed(dtype: torch.dtype) -> None:
    """The batch's logits are others' too."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    _choose(logits, *(Sampler(_params(logit_bias=((3, 50.0),), top_p=0.5)) for _ in range(2)))
    assert torch.equal(before, logits)


# Against transformers ------------------------------------------------------------------------------------------------


def _survivors(logits: torch.Tensor, **options: Any) -> set[int]:
    """The tokens that a sampler ever takes, from the ends of 600 equal shares of its mass."""
    found = set()
    for step in range(600):
        sampler = Sampler(_params(temperature=1.3, **options))
        sampler.uniform = (step + 0.5) / 600
        found.add(_choose(logits[None], sampler)[0].token)
    return found


WARPERS: list[tuple[dict[str, Any], list[Callable[[], LogitsProcessor]]]] = [
    ({"top_k": 9}, [lambda: TopKLogitsWarper(9)]),
    ({"top_p": 0.4}, [lambda: TopPLogitsWarper(0.4)]),
    ({"min_p": 0.2}, [lambda: MinPLogitsWarper(0.2)]),
    (
        {"top_k": 30, "top_p": 0.6, "min_p": 0.15},
        [lambda: TopKLogitsWarper(30), lambda: TopPLogitsWarper(0.6), lambda: MinPLogitsWarper(0.15)],
    ),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "warpers"), WARPERS)
def test_truncation_keeps_what_transformers_keeps_when_logits_are_random(
    options: dict[str, Any], warpers: list[Callable[[], LogitsProcessor]], seed: int
) -> None:
    """Exactly the tokens that its warpers leave, in the order temperature, top-k, top-p, min-p."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 1.5
    expected = TemperatureLogitsWarper(1.3)(torch.empty(1, 0), logits[None])
    for warper in warpers:
        expected = warper()(torch.empty(1, 0), expected)
    assert set(expected[0].isfinite().nonzero()[:, 0].tolist()) == _survivors(logits, **options)


@pytest.mark.parametrize("options", [{"top_p": 0.97}, {"top_k": 400}, {"min_p": 0.2}, {"top_k": 500, "top_p": 0.9}])
@pytest.mark.parametrize("vocab", [VOCAB, 10 * VOCAB])
def test_truncation_is_exact_when_it_keeps_more_than_the_first_candidates(options: dict[str, Any], vocab: int) -> None:
    """A flat row has more survivors than the fast path looks at; the least of them is drawn at the end of the mass."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 0.3
    scores: torch.Tensor = logits[None] / 1.0
    empty: Any = torch.empty(1, 0)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(empty, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(empty, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(empty, scores)
    sampler = Sampler(_params(**options))
    sampler.uniform = 1 - 2**-53
    assert int(scores[0].isfinite().sum()) > 256
    least = int(scores[0].masked_fill(~scores[0].isfinite(), math.inf).argmin())
    assert least == _choose(logits[None], sampler)[0].token


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers_when_prompt_and_answer_repeat(penalty: float) -> None:
    """Scores of both signs, tokens of the prompt and of the answer, each penalised once."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(_params(repetition_penalty=penalty), (3, 3, 8, 21))
    for token in (8, 30, 30):
        sampler.accept(token)
    scores = logits.clone()
    sampler.change(scores)
    ids: Any = torch.tensor([[3, 3, 8, 21, 8, 30, 30]])
    assert torch.equal(RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0], scores)


def test_presence_and_frequency_penalties_count_the_answer_when_tokens_repeat() -> None:
    """OpenAI's formula: minus the count times the one, minus the other once; the prompt doesn't count."""
    sampler = Sampler(_params(presence_penalty=0.5, frequency_penalty=0.25), (1, 1, 2))
    for token in (2, 4, 4):
        sampler.accept(token)
    scores = torch.ones(6)
    sampler.change(scores)
    assert scores.tolist() == [1, 1, 1 - 0.5 - 0.25, 1, 1 - 0.5 - 0.5, 1]


def test_bias_comes_before_the_penalties_when_both_are_given() -> None:
    """The repetition penalty sees the sign of the biased score."""
    sampler = Sampler(_params(logit_bias=((0, 3.0), (1, -100.0)), repetition_penalty=2.0), (0,))
    scores = torch.tensor([-1.0, 1.0, 1.0])
    sampler.change(scores)
    assert scores.tolist() == [1.0, -99.0, 1.0]


def test_bias_decides_when_it_is_large(engine: Engine, reference_answers: Reference) -> None:
    """100 forces a token, greedy or not; -100 bans it."""
    likeliest = reference_answers.tokens(ask("r", PROMPT).prompt, None, 1)[0]
    answers = run_to_end(
        engine,
        ask("forced", PROMPT, logit_bias=((65, 100.0),), max_tokens=4),
        ask("drawn", PROMPT, logit_bias=((65, 100.0),), max_tokens=4, temperature=1.0, seed=1),
        ask("banned", PROMPT, logit_bias=((likeliest, -100.0),), max_tokens=8),
    )
    assert [[65] * 4] * 2 == [answers["forced"].tokens, answers["drawn"].tokens]
    assert likeliest not in answers["banned"].tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
                "top_k": st.sampled_from([0, 1, 5, 300]),
                "top_p": st.sampled_from([0.1, 0.9, 1.0]),
                "min_p": st.sampled_from([0.0, 0.3]),
                "presence_penalty": st.sampled_from([0.0, 2.0]),
                "seed": st.integers(0, 3),
                "top_logprobs": st.sampled_from([None, 2]),
            }
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_choice_is_the_same_alone_and_mixed_when_options_are_arbitrary(rows: list[dict[str, Any]], seed: int) -> None:
    """Neither the row's place nor its neighbours' options change a token or a log-probability."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    mixed = _choose(logits, *(Sampler(_params(**row)) for row in rows))
    alone = [_choose(logits[i][None], Sampler(_params(**row)))[0] for i, row in enumerate(rows)]
    backwards = _choose(logits.flip(0), *(Sampler(_params(**row)) for row in reversed(rows)))
    assert alone == mixed == backwards[::-1]


def test_seed_gives_the_same_answer_when_it_runs_alone_mixed_or_in_another_row(engine: Engine) -> None:
    """Through the engine, with neighbours that join and leave; and another seed gives another answer."""

    def seeded(name: str, seed: int = 5) -> Any:
        return ask(name, PROMPT, temperature=1.0, top_p=0.95, seed=seed, max_tokens=12)

    alone = run_to_end(engine, seeded("r"))["r"]
    others = [ask(f"o{index}", PROMPT, temperature=index / 2, max_tokens=3 + index) for index in range(4)]
    mixed = run_to_end(engine, *others, seeded("r"), seeded("again"), seeded("other", 6))
    assert alone == mixed["r"] == mixed["again"]
    assert alone.tokens != mixed["other"].tokens


# Ends ----------------------------------------------------------------------------------------------------------------


def _place_of_end(reference: Reference) -> tuple[list[int], int]:
    """A greedy answer, and a place in it from 2 on whose token comes there for the first time."""
    tokens = reference.tokens(ask("r", PROMPT).prompt, None, 10)
    return tokens, next(index for index in range(2, 10) if tokens.index(tokens[index]) == index)


def test_end_of_turn_is_a_token_like_others_when_it_is_ignored(bench: Bench, reference_answers: Reference) -> None:
    """The answer goes on to its length."""
    tokens, place = _place_of_end(reference_answers)
    engine = bench.engine(tokenizer=TokenText(tokens[place]))
    answers = run_to_end(engine, ask("plain", PROMPT, max_tokens=10), ask("on", PROMPT, max_tokens=10, ignore_eos=True))
    engine.close()
    assert (tokens[:place], "stop") == (answers["plain"].tokens, answers["plain"].finish_reason)
    assert (tokens, "length") == (answers["on"].tokens, answers["on"].finish_reason)


def test_end_of_turn_is_not_chosen_when_min_tokens_are_not_reached(bench: Bench, reference_answers: Reference) -> None:
    """Up to there the second likeliest token is taken; behind there the end is the end."""
    tokens, place = _place_of_end(reference_answers)
    engine = bench.engine(tokenizer=TokenText(tokens[place]))
    answers = run_to_end(
        engine,
        ask("late", PROMPT, max_tokens=10, min_tokens=place + 1),
        ask("soon", PROMPT, max_tokens=10, min_tokens=place),
    )
    engine.close()
    assert tokens[:place] == answers["late"].tokens[:place] == answers["soon"].tokens
    assert tokens[place] != answers["late"].tokens[place]
    assert (answers["soon"].finish_reason, place + 1) == ("stop", answers["soon"].completion_tokens)


@pytest.mark.parametrize(("min_tokens", "is_cut"), [(0, True), (3, True), (4, False), (6, False)])
def test_stop_string_is_text_when_min_tokens_are_not_reached(
    min_tokens: int, is_cut: bool, engine: Engine, reference_answers: Reference
) -> None:
    """Looked for behind the first `min_tokens` tokens only; the answer loses nothing of them."""
    tokens = reference_answers.tokens(ask("r", PROMPT).prompt, None, 8)
    text = TokenText(0).decode(tokens)
    place = 3
    assert text.count(text[place]) == 1
    answer = run_to_end(engine, ask("r", PROMPT, stop=(text[place],), min_tokens=min_tokens))["r"]
    assert (text[:place], "stop") == (answer.text, answer.finish_reason) if is_cut else text == answer.text


# Log-probabilities ---------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_when_everything_else_is_set() -> None:
    """The log-softmax of the raw logits, for the token that was chosen in spite of them."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)) * 3
    options = {"temperature": 0.3, "top_p": 0.5, "logit_bias": ((17, 100.0),), "top_logprobs": 3}
    choice = _choose(logits, Sampler(_params(**options)))[0]
    expected = logits[0].log_softmax(dim=-1)
    assert choice.logprob is not None
    assert choice.token == choice.logprob.token == 17
    assert expected[17].item() == choice.logprob.logprob
    values, order = expected.topk(3)
    assert tuple(zip(order.tolist(), values.tolist(), strict=True)) == choice.logprob.top


def test_logprobs_have_as_many_candidates_as_each_row_asked_for_when_rows_differ() -> None:
    """0 is the chosen token's own alone, more than the vocabulary is the vocabulary, None is nothing."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    wanted = [2, None, 0, 20]
    choices = _choose(logits, *(Sampler(_params(temperature=0, top_logprobs=count)) for count in wanted))
    assert [2, None, 0, 5] == [choice.logprob and len(choice.logprob.top) for choice in choices]
    assert [row.argmax().item() for row in logits] == [choice.token for choice in choices]


# Failures ------------------------------------------------------------------------------------------------------------


def test_failure_is_one_rows_when_others_are_computed_with_it() -> None:
    """A bias beyond the vocabulary fails its row; the neighbours draw what they would have drawn without it."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    good = _params(temperature=1.0, seed=4)
    bad = Sampler(_params(logit_bias=((999, 1.0),)))
    choices = choose_tokens(logits, [0, 0, 0], {0: Sampler(good), 1: bad, 2: Sampler(good)})
    assert isinstance(choices[1], IndexError)
    assert _choose(logits, *(Sampler(good) for _ in range(3)))[::2] == [choices[0], choices[2]]


def test_request_fails_alone_when_its_sampling_raises(engine: Engine) -> None:
    """The engine ends it with an event and goes on with the others."""
    answers: dict[str, Answer] = {}
    for request in (ask("bad", PROMPT, logit_bias=((10**6, 1.0),)), ask("good", PROMPT, temperature=1.0, seed=1)):
        collect(engine.submit(request), answers)
    drain(engine, answers)
    assert (answers["bad"].finish_reason, answers["bad"].num_terminal) == ("engine_failed", 1)
    assert answers["good"].error is None
    assert len(tokens_of(answers["good"].text)) > 0
