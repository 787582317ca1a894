"""The floor's sums, on layers small enough to count by hand."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.floor import (
    bandwidth_floor_ms,
    compute_floor_ms,
    linear_floor_ms,
    step_operations,
    weight_bytes,
)
from server.engine.frozen import FrozenLinear

_LAYERS = [nn.Linear(4, 6, bias=False), nn.Linear(6, 2)]
_LINEARS = [FrozenLinear([layer]) for layer in _LAYERS]


def test_operations_are_two_a_weight_and_row_when_summed() -> None:
    """4 x 6 and 6 x 2 weights, 3 rows."""
    assert 2 * 3 * (24 + 12) == step_operations(_LINEARS, 3)


def test_bytes_are_those_of_the_stored_weights_when_summed() -> None:
    """float32 weights, biases left out; packed 4-bit weights count half a byte each."""
    packed = nn.Linear(4, 6, bias=False)
    packed.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert 4 * 36 == weight_bytes(_LINEARS)
    assert 12 == weight_bytes([FrozenLinear([packed])])


def test_floors_divide_by_the_machines_rates_when_computed() -> None:
    """144 bytes at 1.44 MB/s, and 216 operations at 108 kflop/s."""
    assert 0.1 == round(bandwidth_floor_ms(_LINEARS, 1.44e6), 9)
    assert 2.0 == round(compute_floor_ms(_LINEARS, 3, 108e3), 9)


def test_linear_floor_runs_every_layer_with_all_rows_when_timed() -> None:
    """Each pass computes each layer once on the step's rows, after three passes to warm up."""
    shapes = []

    class Watched(FrozenLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return super().__call__(x)

    linear_floor_ms([Watched([layer]) for layer in _LAYERS], num_rows=3, num_passes=2, dtype=torch.float32)
    assert [(3, 4), (3, 6)] * 5 == shapes
