"""Estimates how long a run takes on this machine and how much memory it needs, before the base model is loaded.

The time is arithmetic over speed: the products of a step are counted from the base model's shapes, the speed of one
product is measured, and what a step does beside products is a factor that was fitted to real runs. docs/data.md says
how far off it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base_model import pick_device, read_module_shapes
from adapters.methods import SAMPLING_METHODS, Method
from adapters.settings import CoreSettings
from training.config import TrainSettings
from training.kinds import count_prompts_a_step
from training.preflight import TokenStatistics

__all__ = ["Estimate", "ModelSize", "count_steps", "estimate_run", "read_model_size"]

# A step takes this many times the seconds of its products alone (dequantisation, attention, LoRA, the optimiser):
# fitted to SmolLM2-135M in NF4 on one core of an AMD EPYC with AVX512-BF16, torch 2.13.0, batches of 8 rows.
_STEP_FACTOR = 2.2
_ERROR_FACTOR = 2.0
_MEMORY_ERROR_FACTOR = 1.3  # the same runs needed 0.97 to 1.26 times what was said
_PROBE_TOKENS = 512
_NUM_PROBES = 30
_PROCESS_BYTES = 900_000_000
_NF4_BYTES = 0.516  # half a byte a weight, and scales in blocks of 64, themselves in 8 bits
_OPTIMISER_BYTES = 16  # of a LoRA weight in float32: itself, its gradient, AdamW's two moments
_ACTIVATION_VALUES = (16, 6)  # kept for the backward pass, a token and layer: in units of the hidden, the inner width
# Why the figures of supervised training are none of another method.
_SAMPLED = "most of a step is spent on writing answers, whose lengths nobody knows before"
_REASONS: Mapping[Method, str] = {
    "dpo": "a step also computes the reference's losses, of both answers of a pair, which was never measured",
    "kto": "a step also computes the reference's losses, and of answers to other prompts, which was never measured",
    "reward": "a step scores both answers of a pair, which was never measured",
    "rloo": _SAMPLED,
    "grpo": _SAMPLED,
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the estimate has to know of a base model: numbers of weights, and widths."""

    num_linear: int
    num_other: int
    num_layers: int
    hidden: int
    inner: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What training alone takes on an otherwise idle machine, without loading and evaluation.

    The true time should lie between `seconds_low` and `seconds_high`. `memory_bytes` is the process at its peak, which
    should lie between its low and its high figure; on a GPU most of it lies on the device. Of methods that nothing was
    fitted to, all of these are None, and `not_estimated` says why.
    """

    num_steps: int
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    memory_bytes: int | None = None
    memory_bytes_low: int | None = None
    memory_bytes_high: int | None = None
    not_estimated: str | None = None


def estimate_run(
    tokens: TokenStatistics, num_rows: int, folder: Path, *, core: CoreSettings, settings: TrainSettings
) -> Estimate:
    """Estimate a run: its steps, and what they take if it is supervised, for which this machine is measured.

    Args:
        tokens: Of all rows of the training data.
        num_rows: How many they are.
        folder: The base model's.
        core: Which device, and whether the base is in 4 bits.
        settings: The run's.
    """
    num_steps = count_steps(num_rows, settings)
    if reason := _REASONS.get(settings.method):
        return Estimate(num_steps, not_estimated=reason)
    size = read_model_size(folder)
    tokens_a_step = tokens.total / num_rows * settings.batch_size * settings.gradient_accumulation
    # Weights are frozen: a backward pass costs a forward pass, not two. The head is computed for targets alone.
    flops = 4.0 * tokens_a_step * (size.num_linear + size.vocab * size.hidden * tokens.loss_share)
    if settings.gradient_checkpointing:
        flops *= 1.5
    seconds = num_steps * _STEP_FACTOR * flops / _measure_flops(core, size)
    memory = _memory(size, tokens.longest * settings.batch_size, core, settings)
    return Estimate(
        num_steps,
        seconds=seconds,
        seconds_low=seconds / _ERROR_FACTOR,
        seconds_high=seconds * _ERROR_FACTOR,
        memory_bytes=memory,
        memory_bytes_low=int(memory / _MEMORY_ERROR_FACTOR),
        memory_bytes_high=int(memory * _MEMORY_ERROR_FACTOR),
    )


def count_steps(num_rows: int, settings: TrainSettings) -> int:
    """Optimiser steps of a run. One of rloo or grpo takes whole groups of answers; prompts left over wait an epoch."""
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.method in SAMPLING_METHODS:
        return math.ceil(settings.epochs * max(1, num_rows // count_prompts_a_step(settings)))
    batches = math.ceil(num_rows / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def read_model_size(folder: Path) -> ModelSize:
    """Count a base model's weights from its config; none of them is read."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    shapes = read_module_shapes(folder)
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    num_embeddings = 1 if config.get("tie_word_embeddings") else 2
    return ModelSize(
        num_linear=sum(inputs * outputs for inputs, outputs in shapes.values()),
        num_other=num_embeddings * vocab * hidden,
        num_layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        inner=max(outputs for _, outputs in shapes.values()),
        vocab=vocab,
    )


def _measure_flops(core: CoreSettings, size: ModelSize) -> float:
    """Floating-point operations a second in a product of the base model's shape, the best of a few."""
    import torch

    device = pick_device(core.device)
    # What this process computes for: on a busy machine the clock would measure the others.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    num_clocks = torch.get_num_threads() if device.type == "cpu" else 1
    x = torch.ones(_PROBE_TOKENS, size.hidden, dtype=torch.bfloat16, device=device)
    weight = torch.ones(size.hidden, size.inner, dtype=torch.bfloat16, device=device)
    best = math.inf
    for _ in range(_NUM_PROBES):
        started = clock()
        float((x @ weight)[0, 0])  # reading a value waits for the device
        best = min(best, (clock() - started) / num_clocks)
    return 2.0 * x.numel() * size.inner / best


def _memory(size: ModelSize, tokens: int, core: CoreSettings, settings: TrainSettings) -> int:
    """Bytes at the peak: the process, the base, the adapter with its optimiser, and what the backward pass needs."""
    weights = size.num_linear * (_NF4_BYTES if core.quantisation == "nf4" else 2) + size.num_other * 2
    adapter = size.num_layers * settings.rank * 8 * (size.hidden + size.inner) * _OPTIMISER_BYTES
    kept = _ACTIVATION_VALUES[0] * size.hidden + _ACTIVATION_VALUES[1] * size.inner
    layers = 1 if settings.gradient_checkpointing else size.num_layers
    return int(_PROCESS_BYTES + weights + adapter + 2.0 * tokens * layers * kept)
