"""Adapters of different requests in one batch: every linear layer holds the adapters of all slots, stacked.

For tokens x with adapters s(t):  y_t = W x_t + B_s(t) A_s(t) x_t.  Layers that read the same input (query, key and
value; gate and up) are computed together: one product with their joined weights, one update of the result. Slot 0 is
the base model: a batch of base requests alone does no more than the base model's products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterWeightsError, RankTooHighError
from server.engine.frozen import FrozenLinear, can_join
from server.engine.kernels import Kernels

__all__ = ["AdapterSlots", "LinearGroup", "Segment", "SlottedLinear"]

# Names of layers that read one input in the model code of transformers. Where a model's code calls them with different
# inputs after all, the result is still right: see `LinearGroup.output`.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one slot: a piece of a prompt."""

    start: int
    stop: int
    slot: int


@dataclass(slots=True)
class _Selection:
    """Whose the tokens of the current step are; `AdapterSlots.select` sets it, all layers read it."""

    token_slots: torch.Tensor | None = None  # [tokens] int32, for the native kernel; None if it has nothing to do
    hidden: torch.Tensor | None = None  # [decodes, slots], True where a slot is not the token's own
    segments: list[Segment] = field(default_factory=list)  # prompt pieces with an adapter


class LinearGroup:
    """Frozen linear layers with one input, and the stacked low-rank updates of all slots.

    `a` is `[slots, members, max_rank, in_features]`, `b` is `[slots, max_rank, sum of out_features]`; a rank below the
    highest leaves zeros.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        selection: _Selection,
        ranks: torch.Tensor,
        kernels: Kernels | None,
    ) -> None:
        self.base = FrozenLinear(layers)
        self.selection = selection
        self.ranks = ranks
        self.widths = self.base.widths
        self.ends = list(accumulate(self.widths))
        self._native_ends = torch.tensor(self.ends, dtype=torch.int32)
        self._kernels = kernels
        device = self.base.device
        self.a = torch.zeros(num_slots, len(layers), max_rank, self.base.in_features, dtype=dtype, device=device)
        self.b = torch.zeros(num_slots, max_rank, self.ends[-1], dtype=dtype, device=device)
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def output(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """One member's output for `x [..., in_features]`: all are computed with the first, the others are kept ready.

        Each is handed out once. A member that is asked with another input, or twice, is computed anew.
        """
        if x is not self._input or self._outputs[member] is None:
            flat = self.compute(x.reshape(-1, x.shape[-1]))
            self._input = x
            self._outputs = [part.view(*x.shape[:-1], -1) for part in torch.split(flat, self.widths, dim=-1)]
        output, self._outputs[member] = self._outputs[member], None
        assert output is not None, "computed above"
        if not any(part is not None for part in self._outputs):
            self._input = None
        return output

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """All members' outputs `[tokens, sum of out_features]` for `x [tokens, in_features]`."""
        y = self.base(x)
        selection = self.selection
        if selection.token_slots is not None:
            self._update_natively(y, x, selection.token_slots)
        if selection.hidden is not None:
            self._update_stacked(y, x, selection.hidden)
        for segment in selection.segments:
            self._update_segment(y[segment.start : segment.stop], x[segment.start : segment.stop], segment.slot)
        return y

    def _update_natively(self, y: torch.Tensor, x: torch.Tensor, token_slots: torch.Tensor) -> None:
        assert self._kernels is not None
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert len(token_slots) == len(x), "one slot for each token"
        assert x.dtype == y.dtype == self.a.dtype
        self._kernels.add_low_rank(
            y.data_ptr(),
            x.data_ptr(),
            self.a.data_ptr(),
            self.b.data_ptr(),
            token_slots.data_ptr(),
            self.ranks.data_ptr(),
            self._native_ends.data_ptr(),
            len(x),
            self.a.shape[1],
            self.a.shape[2],
            self.a.shape[3],
            self.b.shape[2],
        )

    def _update_stacked(self, y: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor) -> None:
        """Two products for all slots at once: each token against all adapters, a mask that keeps its own, and back."""
        num_slots, num_members, max_rank, in_features = self.a.shape
        count = len(hidden)
        low = x[:count] @ self.a.view(-1, in_features).T  # [decodes, slots * members * rank]
        low = low.view(count, num_slots, num_members, max_rank)
        # Filling, not multiplying by zero: another adapter's overflow must not reach this token as inf * 0.
        low = low.masked_fill(hidden[:, :, None, None], 0)
        up = self.b.view(-1, self.b.shape[2])  # [slots * rank, sum of out]
        for member, (width, end) in enumerate(zip(self.widths, self.ends, strict=True)):
            columns = slice(end - width, end)
            y[:count, columns] += low[:, :, member].reshape(count, -1) @ up[:, columns]

    def _update_segment(self, y: torch.Tensor, x: torch.Tensor, slot: int) -> None:
        """Two products with one adapter, for the tokens of one prompt."""
        a, b = self.a[slot - 1], self.b[slot - 1]
        low = x @ a.view(-1, a.shape[-1]).T  # [tokens, members * rank]
        for member, (width, end) in enumerate(zip(self.widths, self.ends, strict=True)):
            ranks = slice(member * a.shape[1], (member + 1) * a.shape[1])
            columns = slice(end - width, end)
            y[:, columns] += low[:, ranks] @ b[:, columns]


class SlottedLinear(nn.Module):
    """Stands in a model in the place of one linear layer of a group."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.in_features = group.base.in_features
        self.out_features = group.widths[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `x [..., in_features]` with each token's own adapter."""
        return self.group.output(x, self.member)

    def slot_weights(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one slot's `A [max_rank, in_features]` and `B transposed [max_rank, out_features]`."""
        end = self.group.ends[self.member]
        return self.group.a[slot - 1, self.member], self.group.b[slot - 1, :, end - self.out_features : end]


class AdapterSlots:
    """The device buffers of all slots in all layers. Only the engine's thread may use it."""

    def __init__(
        self, model: nn.Module, *, num_slots: int, max_rank: int, dtype: torch.dtype, kernels: Kernels | None = None
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._kernels = kernels
        self._selection = _Selection()
        self._ranks = torch.zeros(num_slots, dtype=torch.int32)  # of the adapter in each slot
        self._groups: list[LinearGroup] = []
        self._layers: dict[str, SlottedLinear] = {}
        for names in _group_linears(model):
            layers = [model.get_submodule(name) for name in names]
            group = LinearGroup(
                layers,  # type: ignore[arg-type]  # _group_linears names linear layers only
                num_slots=num_slots,
                max_rank=max_rank,
                dtype=dtype,
                selection=self._selection,
                ranks=self._ranks,
                kernels=kernels,
            )
            self._groups.append(group)
            for member, name in enumerate(names):
                self._layers[name] = SlottedLinear(group, member)
                model.set_submodule(name, self._layers[name])
        assert self._layers, "a supported model has linear layers"

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """The layers that an adapter may target: path -> (in_features, out_features)."""
        return {name: (layer.in_features, layer.out_features) for name, layer in self._layers.items()}

    @property
    def frozen_layers(self) -> list[FrozenLinear]:
        """The base model's products inside of the decoder layers, in the order of a step."""
        return [group.base for group in self._groups]

    @property
    def num_bytes(self) -> int:
        """What the buffers of all slots take."""
        return sum(tensor.numel() * tensor.element_size() for group in self._groups for tensor in (group.a, group.b))

    def warm_up(self) -> None:
        """Compute each frozen layer once, on one thread, before the first request."""
        for group in self._groups:
            group.base.warm_up()

    def load(self, weights: AdapterWeights, *, slot: int) -> None:
        """Copy an adapter into a slot; if it is refused, the slot is left as it was.

        Whatever else goes wrong while it copies leaves the slot half written, to be cleared.

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
        for name, (a, b) in weights.modules.items():
            slot_a, slot_b = self._layers[name].slot_weights(slot)
            slot_a[: weights.rank].copy_(a)
            slot_b[: weights.rank].copy_(b.T)
        self._ranks[slot - 1] = weights.rank

    def clear(self, slot: int) -> None:
        """Make a slot compute nothing."""
        assert 1 <= slot <= self.num_slots, f"slot {slot} of {self.num_slots}"
        self._ranks[slot - 1] = 0
        for group in self._groups:
            group.a[slot - 1].zero_()
            group.b[slot - 1].zero_()

    def select(self, decode_slots: Sequence[int], segments: Sequence[Segment] = ()) -> None:
        """Set whose the tokens of the coming step are.

        Args:
            decode_slots: The slots of the first tokens, one each; 0 is the base model.
            segments: The tokens behind them, without gaps.
        """
        selection = self._selection
        selection.token_slots = selection.hidden = None
        selection.segments = []
        slots = [*decode_slots, *(segment.slot for segment in segments for _ in range(segment.start, segment.stop))]
        if not any(slots):
            return
        if self._kernels is not None:
            # For prompts too: matrix products are cheaper only for far more than 100 tokens of one adapter.
            selection.token_slots = torch.tensor(slots, dtype=torch.int32)
            return
        selection.segments = [segment for segment in segments if segment.slot]
        if any(decode_slots):
            selection.hidden = self._hide_others(torch.tensor(decode_slots, device=self._groups[0].a.device))

    def select_on_device(self, token_slots: torch.Tensor | None) -> None:
        """Set whose the tokens of the coming step are from `[tokens]` slots on the device, whose values nobody reads.

        None: all are the base model's. Computed by torch, with native kernels or without.
        """
        selection = self._selection
        selection.token_slots = None
        selection.segments = []
        selection.hidden = None if token_slots is None else self._hide_others(token_slots)

    def _hide_others(self, token_slots: torch.Tensor) -> torch.Tensor:
        own = torch.arange(1, self.num_slots + 1, device=token_slots.device)
        return token_slots[:, None] != own

    def _check(self, rank: int, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        if rank > self.max_rank:
            raise RankTooHighError(rank=rank, max_rank=self.max_rank)
        shapes = self.module_shapes
        for name, (a, b) in modules.items():
            if shapes.get(name) != (a.shape[1], b.shape[0]) or not rank == a.shape[0] == b.shape[1]:
                found = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
                raise AdapterWeightsError(f"{name}: the base model has {shapes.get(name)}, rank {rank}; found {found}")


def _group_linears(model: nn.Module) -> list[list[str]]:
    """The paths of all linear layers inside of the decoder layers, those with one input together."""
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, module in linears.items():
        parent, _, attribute = name.rpartition(".")
        siblings = (index for index, names in enumerate(_SIBLINGS) if attribute in names and can_join(module))
        family = next(siblings, name)
        groups.setdefault((parent, family, type(module), module.in_features), []).append(name)
    return list(groups.values())
