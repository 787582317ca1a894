"""What is measured on the engine: the right amount of work, on a tiny model; no time is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.adapters8 import RANK, BenchHome, prepared_home
from benchmarks.in_process import NUM_SLOTS, InProcess, opened_engine, story_prompt
from benchmarks.peft_reference import PeftReference
from tests.support.engine import slotted_layers
from tests.support.tiny import tiny_settings


@pytest.fixture
def home(tmp_path: Path, tiny_folders: dict[str, Path]) -> Iterator[BenchHome]:
    """A temporary home over a tiny Llama, with three adapters."""
    with prepared_home(tiny_settings(tiny_folders["llama"], home=tmp_path / "users"), 3) as prepared:
        yield prepared


@pytest.fixture
def bench(home: BenchHome) -> Iterator[InProcess]:
    """The engine over that home."""
    with opened_engine(home.core) as opened:
        yield opened


def test_prompts_differ_and_are_equally_long_when_made(bench: InProcess) -> None:
    """No cache of whole prompts can help, and no variant has more to read."""
    first, second = story_prompt(), story_prompt()
    assert first != second
    assert len(bench.render(first)) == len(bench.render(second))


def test_floor_layers_are_the_base_models_products_when_the_engine_has_joined_them(bench: InProcess) -> None:
    """Four a layer in two layers, and the output head; none of them an adapter's."""
    assert 2 * 4 + 1 == len(bench.linears)
    assert 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 258 == sum(
        layer.num_weights for layer in bench.linears
    )


def test_decode_steps_leave_the_engine_idle_when_timed(bench: InProcess, home: BenchHome) -> None:
    """Requests are cancelled after the steps, so that the next variant starts alone."""
    digests = [adapter.digest for adapter in home.adapters]
    bench.decode_step_ms(digests, 3)
    bench.decode_step_ms([None, None], 3)
    assert bench.engine.is_idle
    assert set(digests) == set(bench.engine.residency.resident)


def test_cold_load_puts_the_version_into_the_slot_when_timed(bench: InProcess, home: BenchHome) -> None:
    """The buffers of an empty slot change: the load is a real one."""
    layers = slotted_layers(bench.base.model).values()
    assert not any(bool(layer.slot_weights(NUM_SLOTS)[0].any()) for layer in layers)
    bench.cold_load_ms(home.adapters[0].digest, NUM_SLOTS)
    assert all(bool(layer.slot_weights(NUM_SLOTS)[0].any()) for layer in layers)


def test_slot_bytes_are_those_of_eight_adapters_when_counted(bench: InProcess) -> None:
    """A and B of rank 8 for every layer and slot, and nothing else."""
    wanted = sum(RANK * (num_in + num_out) * 4 for num_in, num_out in bench.engine.runner.slots.module_shapes.values())
    assert NUM_SLOTS * wanted == bench.engine.runner.slots.num_bytes


def test_peft_answers_every_row_when_mixed_and_when_switching(bench: InProcess, home: BenchHome) -> None:
    """Both ways give the whole answers; prompts of different length are padded."""
    peft = PeftReference(home.core, [adapter.folder for adapter in home.adapters])
    prompts = [bench.render(story_prompt()), bench.render("Hi"), bench.render(story_prompt())]
    assert 0 < peft.mixed_tokens_per_second(prompts, 4)
    assert 0 < peft.switching_tokens_per_second(prompts, 4)
