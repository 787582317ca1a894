"""Rows in one flat batch: no padding, and none of them sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from tests.support.tiny import load_tiny_base
from training import flat_rows
from training.flat_rows import RowLayout, flatten, has_row_attention, install_row_attention, make_batch
from training.losses import token_sums
from training.rendering import IGNORED_LABEL

# Longer and shorter than the windows of the tiny models that have one.
LENGTHS = (30, 7, 1, 18)


def _rows(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> list[RenderedRow]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [RenderedRow(ids, [index % 3 > 0 for index in range(len(ids))]) for ids in drawn]


def _hidden(model: Any, rows: list[RenderedRow]) -> torch.Tensor:
    """Last hidden states of a flat batch, `[tokens, hidden]`."""
    batch = flatten(rows)
    layout = RowLayout(tuple(batch["row_lengths"].tolist()))
    names = ("input_ids", "attention_mask", "position_ids")
    output = model.get_decoder()(**{name: batch[name] for name in names}, row_layout=layout, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def test_flatten_lays_rows_behind_one_another_when_they_differ_in_length() -> None:
    """Positions begin anew with each row, and its first token is no target, whatever its mask says."""
    rows = [RenderedRow([5, 6, 7], [True, False, True]), RenderedRow([8], [True]), RenderedRow([9, 3], [False, True])]

    batch = flatten(rows)

    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 3]],
        "attention_mask": [[1] * 6],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "labels": [[IGNORED_LABEL, IGNORED_LABEL, 7, IGNORED_LABEL, IGNORED_LABEL, 3]],
        "row_lengths": [3, 1, 2],
    }


@pytest.mark.parametrize("max_written_out", [256, 0], ids=["written-out", "fused"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3", "smollm3"])
@torch.no_grad()
def test_rows_are_computed_as_alone_when_they_lie_in_one_batch(
    tiny_folders: dict[str, Path], family: str, max_written_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's hidden states are those that the model's own attention gives for it alone, windows included."""
    monkeypatch.setattr(flat_rows, "_MAX_WRITTEN_OUT", max_written_out)
    model = load_tiny_base(tiny_folders[family]).model
    rows = _rows()
    alone = [model.get_decoder()(torch.tensor([row.input_ids]), use_cache=False).last_hidden_state[0] for row in rows]
    assert install_row_attention(model)

    torch.testing.assert_close(_hidden(model, rows), torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_stay_the_same_when_the_others_change(tiny_base: LoadedBase) -> None:
    """Not a bit of a row depends on what lies before or behind it."""
    assert install_row_attention(tiny_base.model)
    first, second = _rows(seed=1), _rows(seed=2)

    before = _hidden(tiny_base.model, [first[0], second[1], first[3]])
    after = _hidden(tiny_base.model, [second[0], second[1], second[3]])

    own = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    assert torch.equal(before[own], after[own])
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])


def test_gradient_of_a_row_is_zero_when_the_loss_is_anothers(tiny_base: LoadedBase) -> None:
    """Nothing flows back over a border."""
    assert install_row_attention(tiny_base.model)
    embeddings = tiny_base.model.get_input_embeddings()
    taken: list[torch.Tensor] = []
    handle = embeddings.register_forward_hook(lambda *call: taken.append(call[2]))

    total = _hidden(tiny_base.model, _rows())[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]].sum()

    handle.remove()
    (gradient,) = torch.autograd.grad(total, taken)
    touched = gradient[0].abs().sum(dim=-1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(LENGTHS[0], LENGTHS[0] + LENGTHS[1]))


def test_generation_is_the_same_when_row_attention_is_installed(tiny_base: LoadedBase) -> None:
    """Calls without a layout of rows, padded on the left and with a cache, attend as the model always did."""
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = tiny_base.model.generate(**given)
    assert install_row_attention(tiny_base.model)

    assert torch.equal(expected, tiny_base.model.generate(**given))


def test_install_leaves_a_model_alone_when_rows_would_not_stay_apart(
    tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that mixes tokens outside of attention gets padded batches: the probe finds out."""
    decoder = tiny_base.model.get_decoder()
    mixing = decoder.layers[0].register_forward_hook(lambda *call: call[2].cumsum(dim=1))

    assert not install_row_attention(tiny_base.model)

    mixing.remove()
    assert not has_row_attention(tiny_base.model)
    assert tiny_base.model.config._attn_implementation == "sdpa"
    assert "row_lengths" not in make_batch(tiny_base.model, _rows(), pad_token_id=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_is_the_same_when_a_batch_is_flat_or_padded(tiny_base: LoadedBase, dropout: float) -> None:
    """And attention's own dropout, where a model has it, acts on flat rows too."""
    rows = _rows((30, 7, 18))
    padded = token_sums(tiny_base.model, make_batch(tiny_base.model, rows, pad_token_id=0)).loss
    assert install_row_attention(tiny_base.model)
    for layer in tiny_base.model.get_decoder().layers:
        layer.self_attn.attention_dropout = dropout
    tiny_base.model.train()

    flat = token_sums(tiny_base.model, make_batch(tiny_base.model, rows, pad_token_id=0)).loss

    assert torch.allclose(flat, padded, rtol=1e-5) == (dropout == 0)
