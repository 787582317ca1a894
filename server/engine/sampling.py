"""Chooses the next token of every row. Each row draws from its own generator, so a batch changes nobody's luck."""

from __future__ import annotations

import torch

from server.engine.core import SamplingParams, Sequence

__all__ = ["make_generator", "sample"]

_GREEDY_BELOW = 1e-4  # logits divided by less would overflow, and the likeliest token wins long before


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator:
    """A random generator for one request: reproducible if it gives a seed."""
    generator = torch.Generator(device=device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(logits: torch.Tensor, likeliest: int, sequence: Sequence) -> int:
    """The next token of one row of `logits [vocab]`: the likeliest at temperature 0, otherwise drawn by top-p.

    Source of top-p: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    params = sequence.request.sampling
    return likeliest if params.temperature < _GREEDY_BELOW else _draw(logits, params, sequence.generator)


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    probabilities = (logits.float() / params.temperature).softmax(dim=-1)  # [vocab]
    if params.top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, order = probabilities.sort(descending=True)
    # The smallest set whose mass reaches top_p: drop a token if those before it reach it already.
    dropped = ordered.cumsum(dim=-1) - ordered >= params.top_p
    dropped[0] = False  # in float32 the least top_p may round to 0
    ordered[dropped] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])
