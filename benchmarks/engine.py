"""Decoding speed in one process: the base model alone against different adapters in one batch.

    python -m benchmarks.engine [--home HOME] [--tokens 64] [--repeats 3]

Random adapters of rank 8 on every linear layer (speed does not depend on their values). Variants alternate, and the
median over the repeats is printed, since shared machines are noisy.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

from adapters.adapter_files import AdapterWeights
from adapters.base_model import load_base
from adapters.chat_template import render_prompt
from adapters.settings import CoreSettings, resolve_home
from server.engine.core import GenerationRequest, SamplingParams
from server.engine.runner import ModelRunner
from server.engine.scheduler import Engine

_RANK = 8
_NUM_ADAPTERS = 8
_PROMPT = [{"role": "user", "content": "Tell me a long story about the sea."}]
_BATCHES = (1, 8, 32)


def main() -> None:
    """Measure and print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    core = CoreSettings.load(resolve_home(options.home))
    base = load_base(core)
    runner = ModelRunner(
        base.model, num_slots=_NUM_ADAPTERS, max_rank=16, max_batch=max(_BATCHES), max_context=options.tokens + 256
    )
    runner.warm_up()
    shapes = runner.slots.module_shapes
    engine = Engine(runner, base.tokenizer, lambda digest: _random_adapter(shapes, seed=int(digest)))
    prompt = tuple(render_prompt(base.tokenizer, _PROMPT))
    _measure(engine, prompt, _BATCHES[1], mixed=True, num_tokens=4)  # loads every adapter
    speeds: dict[tuple[int, bool], list[float]] = {}
    for _ in range(options.repeats):
        for batch in _BATCHES:
            for mixed in (False, True):
                speed = _measure(engine, prompt, batch, mixed=mixed, num_tokens=options.tokens)
                speeds.setdefault((batch, mixed), []).append(speed)
    engine.close()
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, {base.device}, torch {version('torch')}, {core.base}, ",
        end="",
    )
    print(f"{core.quantisation}, rank {_RANK}, {options.tokens} new tokens, median of {options.repeats}\n")
    print("| requests at once | base, tokens/s | up to 8 adapters mixed, tokens/s | ratio |\n|---|---|---|---|")
    for batch in _BATCHES:
        alone, mixed_speed = (statistics.median(speeds[batch, mixed]) for mixed in (False, True))
        print(f"| {batch} | {alone:.0f} | {mixed_speed:.0f} | {mixed_speed / alone:.2f} |")


def _random_adapter(shapes: dict[str, tuple[int, int]], *, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: (
            torch.randn(_RANK, num_in, generator=generator) * 0.02,
            torch.randn(num_out, _RANK, generator=generator) * 0.02,
        )
        for name, (num_in, num_out) in shapes.items()
    }
    return AdapterWeights(_RANK, modules)


def _measure(engine: Engine, prompt: tuple[int, ...], batch: int, *, mixed: bool, num_tokens: int) -> float:
    """Tokens a second from the first request's submission to the last token, prefill included."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0)
    for index in range(batch):
        digest = str(index % _NUM_ADAPTERS) if mixed else None
        engine.submit(GenerationRequest(str(index), prompt, digest, sampling))
    started = time.perf_counter()
    total = 0
    while not engine.is_idle:
        total += sum(event.completion_tokens for event in engine.step() if event.finish_reason)
    return total / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
