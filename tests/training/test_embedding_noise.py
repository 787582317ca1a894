"""NEFTune's noise: as strong as the paper says, whatever else lies in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adapters.chat_template import RenderedRow
from training.embedding_noise import noisy_embeddings
from training.flat_rows import flatten
from training.rendering import collate

_ALPHA, _WIDTH = 5.0, 64


def _padded(rows: list[RenderedRow]) -> dict[str, torch.Tensor]:
    return collate(rows, pad_token_id=0)


@pytest.mark.parametrize("lengths", [(4,), (4, 100), (4, 100, 31, 9, 4)], ids=str)
@pytest.mark.parametrize("make_batch", [flatten, _padded], ids=["flat", "padded"])
def test_noise_is_of_the_same_strength_when_other_rows_are_in_the_batch(
    make_batch: Callable[[list[RenderedRow]], dict[str, torch.Tensor]], lengths: tuple[int, ...]
) -> None:
    """Each row's own length says how strong: up to alpha / sqrt(length * width), evenly below."""
    torch.manual_seed(0)
    batch = make_batch([RenderedRow([1] * length, [True] * length) for length in lengths])
    embeddings = torch.nn.Embedding(2, _WIDTH)
    torch.nn.init.zeros_(embeddings.weight)

    with noisy_embeddings(embeddings, batch, _ALPHA):
        noise = embeddings(batch["input_ids"]).detach()

    rows = noise[batch["attention_mask"].bool()].split(list(lengths))
    for length, row in zip(lengths, rows, strict=True):
        limit = _ALPHA / (length * _WIDTH) ** 0.5
        assert 0.95 * limit < row.abs().max() <= limit * (1 + 1e-6)
        assert row.std() == pytest.approx(limit / 3**0.5, rel=0.15)
    assert not embeddings(batch["input_ids"]).any()
