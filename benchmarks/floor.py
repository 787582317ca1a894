"""The floor under a decode step: its linear layers alone, timed in place; and what the machine's limits allow at best.

Works on the CPU and on CUDA alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from server.engine.frozen import FrozenLinear

__all__ = [
    "bandwidth_floor_ms",
    "compute_floor_ms",
    "linear_floor_ms",
    "measure_bandwidth",
    "measure_compute_rate",
    "step_operations",
    "synchronize",
    "weight_bytes",
]

_BANDWIDTH_BYTES = 1 << 28  # far more than any cache of the CPUs at hand
_MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}
_RATE_REPEATS = 5
_WARM_UP_PASSES = 3


def linear_floor_ms(linears: Sequence[FrozenLinear], *, num_rows: int, num_passes: int, dtype: torch.dtype) -> float:
    """Median time of one pass through the layers, one after another as in a step and nothing between them, in ms.

    The layers are the engine's own products, joined and called as it calls them: a floor that it can't get under.
    The sum over all layers is timed as a whole: each one's weights come from where a step finds them, since the others
    have passed through the caches meanwhile.
    """
    device = linears[0].device
    inputs = {size: torch.randn(num_rows, size, device=device).to(dtype) for size in _input_sizes(linears)}

    def run() -> None:
        for layer in linears:
            layer(inputs[layer.in_features])

    with torch.inference_mode():
        for _ in range(_WARM_UP_PASSES):
            run()
        return statistics.median(_time(run, device) for _ in range(num_passes)) * 1000


def bandwidth_floor_ms(linears: Sequence[FrozenLinear], bytes_per_second: float) -> float:
    """What reading every weight once takes."""
    return weight_bytes(linears) / bytes_per_second * 1000


def compute_floor_ms(linears: Sequence[FrozenLinear], num_rows: int, operations_per_second: float) -> float:
    """What the layers' multiplications and additions take."""
    return step_operations(linears, num_rows) / operations_per_second * 1000


def weight_bytes(linears: Sequence[FrozenLinear]) -> int:
    """Bytes of all weights as stored."""
    return sum(layer.num_bytes for layer in linears)


def step_operations(linears: Sequence[FrozenLinear], num_rows: int) -> int:
    """Multiplications and additions of one step: two for each weight and row."""
    return 2 * num_rows * sum(layer.num_weights for layer in linears)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor moves, reads and writes together; the best of some."""
    source = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(_time(lambda: target.copy_(source), device) for _ in range(_RATE_REPEATS))
    return 2 * _BANDWIDTH_BYTES / seconds


def measure_compute_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product; the best of some."""
    size = _MATRIX_SIZES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = min(_time(lambda: left @ right, device) for _ in range(_RATE_REPEATS))
    return float(2 * size**3 / seconds)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _input_sizes(linears: Sequence[FrozenLinear]) -> set[int]:
    return {layer.in_features for layer in linears}


def _time(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started
