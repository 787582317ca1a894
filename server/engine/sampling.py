"""Chooses the next token of every row that asks for more than the likeliest one.

What acts on a row's logits, in this order: the constraint's mask, `logit_bias`, `min_tokens`, `repetition_penalty`,
`frequency_penalty` and `presence_penalty`, then `temperature`, `top_k`, `top_p`, `min_p`. Log-probabilities are those
of the model itself: the log-softmax of the logits before any of these.

A row draws one number per token from a generator of its own, and the token is found in the cumulated probabilities. So
a seed gives the same answer whatever runs beside it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from server.engine.constraints import Grammar, Matcher
from server.engine.core import SamplingParams, TokenLogprob

__all__ = ["Choice", "Sampler", "choose_tokens", "make_sampler"]

_GREEDY_BELOW = 1e-4  # logits divided by less would overflow, and the likeliest token wins long before
# Truncation looks at so many of the likeliest tokens, and at more only where they are not enough: with 49,152 tokens on
# one core 0.1 ms a row, 0.4 ms, or 3 ms for all. At temperature 1, 256 tokens hold 0.95 of SmolLM2-135M's probability
# at two places in three, 4,096 at all.
_NUM_CANDIDATES = (256, 4096)
_FORBIDDEN = -torch.inf


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's next token, with its log-probability if the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


class Sampler:
    """What one request needs to choose its tokens: its luck, its counts of tokens, its place in the grammar.

    Args:
        params: The request's options.
        prompt: Its tokens, which the repetition penalty counts too.
        end_tokens: The tokens that end an answer.
        grammar: The compiled constraint; its first use waits for it.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        end_tokens: frozenset[int] = frozenset(),
        grammar: Future[Grammar] | None = None,
    ) -> None:
        self.params = params
        # The sign counts: Python's generator drops it.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)  # noqa: S311 - no secret
        self.uniform = self._random.random()  # for the next token; a second look at a step must not use up another
        self._end_tokens = sorted(end_tokens)
        self._repeatable = set(prompt) if params.repetition_penalty != 1 else None
        self._counts: Counter[int] = Counter()
        self._num_accepted = 0
        self._grammar = grammar
        self._matcher: Matcher | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, once the logits are changed."""
        return self.params.temperature < _GREEDY_BELOW

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows no further token."""
        return self._matcher is not None and self._matcher.is_finished

    @property
    def changes_logits(self) -> bool:
        """Whether `change` would do anything to the next row."""
        params = self.params
        is_penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        return bool(is_penalised or params.logit_bias or self._grammar or self._must_go_on)

    def change(self, scores: torch.Tensor) -> None:
        """Apply all that comes before the temperature to `scores [vocab]`, float32, in place.

        Raises:
            GrammarError: the grammar can't go on.
        """
        params = self.params
        if self._grammar is not None:
            self._apply_grammar(scores, self._grammar)
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            _at(scores, tokens, lambda old: old + torch.tensor(biases, device=old.device))
        if self._must_go_on:
            scores[self._end_tokens] = _FORBIDDEN
        if self._repeatable:
            _at(scores, self._repeatable, lambda old: _penalise_repetition(old, params.repetition_penalty))
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            counts = torch.tensor([*self._counts.values()], device=scores.device)
            penalty = params.frequency_penalty * counts + params.presence_penalty
            _at(scores, self._counts, lambda old: old - penalty)

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen.

        Raises:
            GrammarError: the grammar does not allow it.
        """
        self._num_accepted += 1
        self.uniform = self._random.random()
        self._counts[token] += 1
        if self._repeatable is not None:
            self._repeatable.add(token)
        if self._matcher is not None:
            self._matcher.accept(token)

    @property
    def _must_go_on(self) -> bool:
        # A grammar knows better when an answer is complete.
        return self._num_accepted < self.params.min_tokens and not self.params.ignore_eos and self._grammar is None

    def _apply_grammar(self, scores: torch.Tensor, grammar: Future[Grammar]) -> None:
        if self._matcher is None:
            self._matcher = grammar.result().start()
        allowed = torch.from_numpy(self._matcher.allowed_tokens()).to(scores.device)[: len(scores)]
        scores[: len(allowed)].masked_fill_(~allowed, _FORBIDDEN)
        scores[len(allowed) :] = _FORBIDDEN  # a model's vocabulary may be padded beyond its tokenizer's


def make_sampler(
    params: SamplingParams,
    prompt: Sequence[int],
    end_tokens: frozenset[int],
    grammar: Future[Grammar] | None = None,
) -> Sampler | None:
    """A sampler for one request; None if the likeliest token is all it asks for."""
    sampler = Sampler(params, prompt, end_tokens, grammar)
    is_plain = sampler.is_greedy and not sampler.changes_logits and params.top_logprobs is None
    return None if is_plain else sampler


@torch.inference_mode()
def choose_tokens(
    logits: torch.Tensor, likeliest: Sequence[int], samplers: Mapping[int, Sampler]
) -> dict[int, Choice | Exception]:
    """The next token of each row of `logits [rows, vocab]` that has a sampler, by the row's index.

    All rows are computed together. If that fails, each is computed alone, and those that fail have their exception.
    """
    try:
        return dict(_choose(logits, likeliest, samplers))
    except Exception:
        return {index: _choose_alone(logits, likeliest, index, sampler) for index, sampler in samplers.items()}


def _choose_alone(logits: torch.Tensor, likeliest: Sequence[int], index: int, sampler: Sampler) -> Choice | Exception:
    try:
        return _choose(logits, likeliest, {index: sampler})[index]
    except Exception as error:
        return error


def _choose(logits: torch.Tensor, likeliest: Sequence[int], samplers: Mapping[int, Sampler]) -> dict[int, Choice]:
    tokens = {index: likeliest[index] for index in samplers}
    chosen = [index for index, sampler in samplers.items() if not sampler.is_greedy or sampler.changes_logits]
    if chosen:
        scores = logits[chosen].float()  # a copy: [chosen, vocab]
        tokens.update(zip(chosen, _pick(scores, [samplers[index] for index in chosen]), strict=True))
    wanted = [index for index, sampler in samplers.items() if sampler.params.top_logprobs is not None]
    logprobs = _logprobs(logits, {index: tokens[index] for index in wanted}, samplers) if wanted else {}
    return {index: Choice(token, logprobs.get(index)) for index, token in tokens.items()}


def _pick(scores: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """The tokens for `scores [rows, vocab]`, which are changed on the way."""
    for row, sampler in zip(scores, samplers, strict=True):
        if sampler.changes_logits:
            sampler.change(row)
    tokens = scores.argmax(dim=-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
    truncating = [row for row in drawing if _truncates(samplers[row].params)]
    for rows, draw in (([row for row in drawing if row not in truncating], _draw), (truncating, _draw_truncated)):
        if rows:
            own = [samplers[row] for row in rows]
            temperatures = torch.tensor([[sampler.params.temperature] for sampler in own], device=scores.device)
            tokens[rows] = draw((scores[rows] / temperatures).softmax(dim=-1), own)
    picked: list[int] = tokens.tolist()
    return picked


def _draw(weights: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """A column of each row of `weights [rows, columns]`, in proportion to them, at the samplers' numbers."""
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:]
    uniforms = torch.tensor([[sampler.uniform] for sampler in samplers], device=weights.device)
    # The first column beyond the target has weight; rounding must not lift the target to the total.
    targets = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, targets, right=True)[:, 0]


def _at(scores: torch.Tensor, tokens: Collection[int], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change `scores [vocab]` at these tokens, each of which is named once."""
    places = torch.tensor([*tokens], device=scores.device)
    scores[places] = change(scores[places])


def _penalise_repetition(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens less likely whichever sign their scores have. Source: CTRL, arXiv 1909.05858, section 4.1."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_truncated(probabilities: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """Draw from what top-k, top-p and min-p leave of `probabilities [rows, vocab]`.

    How many tokens are looked at depends on the row alone, so that its token does not depend on its neighbours.
    """
    vocab = probabilities.shape[-1]
    tokens = torch.empty(len(samplers), dtype=torch.long, device=probabilities.device)
    left = list(range(len(samplers)))
    for num_candidates in (*(count for count in _NUM_CANDIDATES if count < vocab), vocab):
        own = [samplers[row] for row in left]
        tokens[left], is_enough = _draw_from_likeliest(probabilities[left], own, num_candidates)
        left = [row for row, enough in zip(left, is_enough, strict=True) if not enough]
        if not left:
            break
    return tokens


def _draw_from_likeliest(
    probabilities: torch.Tensor, samplers: list[Sampler], num_candidates: int
) -> tuple[torch.Tensor, list[bool]]:
    """Tokens among the likeliest few of each row, and whether these were all that truncation leaves of it.

    Sources: top-p is Holtzman et al., arXiv 1904.09751, section 3.1; min-p is Nguyen et al., arXiv 2407.01082,
    section 3.
    """
    ordered, order = probabilities.topk(num_candidates)  # [rows, candidates], likeliest first
    vocab = probabilities.shape[-1]
    params = [sampler.params for sampler in samplers]
    settings = torch.tensor([[p.top_k or vocab, p.top_p, p.min_p] for p in params], device=probabilities.device)
    top_k, top_p, min_p = settings.T[..., None]  # each [rows, 1]
    is_kept = torch.arange(num_candidates, device=probabilities.device) < top_k
    # Top-p is a share of what top-k left. Its smallest set: drop a token if those before it reach the share already.
    mass = torch.where(is_kept, ordered, 0)
    total = torch.where(top_k < vocab, mass.sum(dim=-1, keepdim=True), 1)
    is_kept &= (mass.cumsum(dim=-1) - mass < top_p * total) | (top_p >= 1)
    is_kept &= ordered >= min_p * ordered[:, :1]
    is_kept[:, 0] = True  # in float32 the least top_p may round to 0
    columns = _draw(torch.where(is_kept, ordered, 0), samplers)
    # The share of a larger top-k can't be told from the first candidates.
    is_enough = (top_k[:, 0] <= num_candidates) | ((top_k[:, 0] >= vocab) & ~is_kept[:, -1])
    return order.gather(-1, columns[:, None])[:, 0], is_enough.tolist()


def _logprobs(logits: torch.Tensor, tokens: dict[int, int], samplers: Mapping[int, Sampler]) -> dict[int, TokenLogprob]:
    logprobs = logits[list(tokens)].float().log_softmax(dim=-1)
    own = logprobs.gather(-1, torch.tensor([[token] for token in tokens.values()], device=logits.device))[:, 0].tolist()
    counts = [samplers[index].params.top_logprobs or 0 for index in tokens]
    values, order = logprobs.topk(min(max(counts), logprobs.shape[-1]))
    tops = [
        tuple(zip(ids[:count], row[:count], strict=True))
        for ids, row, count in zip(order.tolist(), values.tolist(), counts, strict=True)
    ]
    return {
        index: TokenLogprob(token, logprob, top)
        for (index, token), logprob, top in zip(tokens.items(), own, tops, strict=True)
    }
