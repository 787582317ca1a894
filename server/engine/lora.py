"""Adapters of different requests in one batch: every linear layer holds the adapters of all slots, stacked.

For tokens x with adapters s(t):  y_t = W x_t + B_s(t) A_s(t) x_t.  All slots' A stand below one another in one matrix
`[slots * rank, in]`, all slots' B in one `[slots * rank, out]`, so that two matrix products serve every adapter in the
batch: the first computes each token against all adapters, a mask keeps the columns of its own, the second adds up.
Slot 0 is the base model: it has no columns, and a batch of base requests alone skips both products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterWeightsError, RankTooHighError

__all__ = ["AdapterSlots", "SlottedLinear"]


@dataclass(slots=True)
class _Selection:
    """Which columns of the stacked matrices the current step needs; the runner sets it, all layers read it."""

    first: int = 0
    last: int = 0
    hidden_columns: torch.Tensor | None = None  # [tokens, last - first], True where a column is not the token's own


class SlottedLinear(nn.Module):
    """A frozen linear layer and the stacked low-rank updates of all slots."""

    def __init__(self, base: nn.Linear, num_columns: int, dtype: torch.dtype, selection: _Selection) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.selection = selection
        # [slots * rank, in_features] and [slots * rank, out_features]
        self.stacked_a = torch.zeros(num_columns, base.in_features, dtype=dtype, device=device)
        self.stacked_b = torch.zeros(num_columns, base.out_features, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `x [..., in_features]` with each token's own adapter."""
        y: torch.Tensor = self.base(x)
        selection = self.selection
        if selection.first == selection.last:
            return y
        columns = slice(selection.first, selection.last)
        low = x.reshape(-1, x.shape[-1]) @ self.stacked_a[columns].T  # [tokens, columns]
        if selection.hidden_columns is not None:
            # Filling, not multiplying by zero: another adapter's overflow must not reach this token as inf * 0.
            low = low.masked_fill(selection.hidden_columns, 0)
        return torch.addmm(y.view(-1, y.shape[-1]), low, self.stacked_b[columns]).view_as(y)


class AdapterSlots:
    """The device buffers of all slots in all layers. Only the engine's thread may use it."""

    def __init__(self, model: nn.Module, *, num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._selection = _Selection()
        self._layers = _wrap_linears(model, num_slots * max_rank, dtype, self._selection)

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """The layers that an adapter may target: path -> (in_features, out_features)."""
        return {name: (layer.base.in_features, layer.base.out_features) for name, layer in self._layers.items()}

    def load(self, weights: AdapterWeights, *, slot: int) -> None:
        """Copy an adapter into a slot; on any error the slot is left as it was.

        Args:
            weights: Validated tensors with the scaling folded into B.
            slot: 1..num_slots, not in use by a running request.

        Raises:
            RankTooHighError: the rank exceeds the slots' rank.
            AdapterWeightsError: a module is unknown or has another shape.

        Source: LoRA (arXiv 2106.09685), section 4.1.
        """
        self._check(weights.rank, weights.modules)
        self.clear(slot)
        rows = self._rows(slot, weights.rank)
        for name, (a, b) in weights.modules.items():
            self._layers[name].stacked_a[rows].copy_(a)
            self._layers[name].stacked_b[rows].copy_(b.T)

    def clear(self, slot: int) -> None:
        """Make a slot compute nothing."""
        rows = self._rows(slot, self.max_rank)
        for layer in self._layers.values():
            layer.stacked_a[rows].zero_()
            layer.stacked_b[rows].zero_()

    def select(self, token_slots: Sequence[int]) -> None:
        """Set the slot of every token of the coming step, in the order of the tokens; 0 is the base model."""
        used = set(token_slots)
        selection = self._selection
        if used == {0}:
            selection.first = selection.last = 0
            return
        selection.first = (min(used - {0}) - 1) * self.max_rank
        selection.last = max(used) * self.max_rank
        selection.hidden_columns = None if len(used) == 1 else self._hide_others(token_slots)

    def _hide_others(self, token_slots: Sequence[int]) -> torch.Tensor:
        device = next(iter(self._layers.values())).stacked_a.device
        columns = torch.arange(self._selection.first, self._selection.last, device=device)
        owners = columns // self.max_rank + 1
        return torch.tensor(token_slots, device=device)[:, None] != owners[None, :]

    def _rows(self, slot: int, rank: int) -> slice:
        assert 1 <= slot <= self.num_slots, f"slot {slot} of {self.num_slots}"
        start = (slot - 1) * self.max_rank
        return slice(start, start + rank)

    def _check(self, rank: int, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        if rank > self.max_rank:
            raise RankTooHighError(rank=rank, max_rank=self.max_rank)
        shapes = self.module_shapes
        for name, (a, b) in modules.items():
            if shapes.get(name) != (a.shape[1], b.shape[0]) or not rank == a.shape[0] == b.shape[1]:
                found = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
                raise AdapterWeightsError(f"{name}: the base model has {shapes.get(name)}, rank {rank}; found {found}")


def _wrap_linears(
    model: nn.Module, num_columns: int, dtype: torch.dtype, selection: _Selection
) -> dict[str, SlottedLinear]:
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent_name, _, attribute = name.rpartition(".")
            layers[name] = SlottedLinear(module, num_columns, dtype, selection)
            setattr(model.get_submodule(parent_name), attribute, layers[name])
    assert layers, "a supported model has linear layers"
    return layers
