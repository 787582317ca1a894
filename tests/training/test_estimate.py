"""The estimate: arithmetic that can be checked by hand, on a machine whose speed nobody asserts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from adapters.methods import SAMPLING_METHODS, Method
from tests.support.tiny import tiny_settings
from training.config import TrainSettings
from training.estimate import Estimate, ModelSize, count_steps, estimate_run, read_model_size
from training.preflight import TokenStatistics

TOKENS = TokenStatistics(
    total=1000, shortest=50, median=100, p95=150, longest=150, loss_share=0.5, histogram=(), starts={}, ends={}
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 1}, 13),
        ({"epochs": 3}, 39),
        ({"epochs": 2, "gradient_accumulation": 4}, 8),
        ({"epochs": 0.5}, 7),
        ({"max_steps": 5, "epochs": 3}, 5),
    ],
)
def test_count_steps_counts_what_a_run_does_when_settings_vary(
    tmp_path: Path, settings: dict[str, float], expected: int
) -> None:
    """Of 100 rows in batches of 8; the last batch of an epoch may be smaller."""
    assert expected == count_steps(100, TrainSettings.load(tmp_path, **settings))


def test_read_model_size_counts_the_weights_when_a_base_is_tiny(tiny_folders: dict[str, Path]) -> None:
    """Counted by hand from the shapes of the tiny Llama: two layers of width 64, an output head of its own."""
    attention = 2 * 64 * 64 + 2 * 64 * 32
    expected = ModelSize(
        num_linear=2 * (attention + 3 * 64 * 128), num_other=2 * 258 * 64, num_layers=2, hidden=64, inner=128, vocab=258
    )

    assert expected == read_model_size(tiny_folders["llama"])


def _estimate(folder: Path, **settings: Any) -> Estimate:
    core = tiny_settings(folder)
    return estimate_run(TOKENS, 10, folder, core=core, settings=TrainSettings.load(core.home, **settings))


def test_estimate_run_gives_a_range_around_its_guess_when_asked(tiny_folders: dict[str, Path]) -> None:
    """The error is stated, not hidden."""
    estimate = _estimate(tiny_folders["llama"])

    seconds = [estimate.seconds_low or 0, estimate.seconds or 0, estimate.seconds_high or 0]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert 4 * seconds[0] == pytest.approx(seconds[2])
    sizes = [estimate.memory_bytes_low or 0, estimate.memory_bytes or 0, estimate.memory_bytes_high or 0]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert estimate.not_estimated is None


def test_estimate_run_wants_more_memory_when_more_is_kept(tiny_folders: dict[str, Path]) -> None:
    """Larger batches, longer rows and a higher rank take more; recomputing activations takes less."""
    folder = tiny_folders["llama"]
    usual = _memory(_estimate(folder))

    assert usual < _memory(_estimate(folder, batch_size=16))
    assert usual < _memory(_estimate(folder, rank=64))
    assert usual > _memory(_estimate(folder, gradient_checkpointing=True))
    core = tiny_settings(folder)
    longer = estimate_run(replace(TOKENS, longest=1000), 10, folder, core=core, settings=TrainSettings.load(core.home))
    assert usual < _memory(longer)


@pytest.mark.parametrize(("method", "words"), [("dpo", "the reference's losses"), ("rloo", "writing answers")])
def test_estimate_run_gives_steps_and_a_reason_when_a_method_was_never_measured(
    tiny_folders: dict[str, Path], method: str, words: str
) -> None:
    """The figures of supervised training would be of another run."""
    own = {"reward": "tone@v1", "generations": 4} if method == "rloo" else {}
    estimate = _estimate(tiny_folders["llama"], method=method, batch_size=8, epochs=3, **own)

    assert {"dpo": 6, "rloo": 15}[method] == estimate.num_steps
    assert estimate.seconds is estimate.seconds_high is estimate.memory_bytes is None
    assert estimate.not_estimated is not None
    assert words in estimate.not_estimated


def test_estimate_run_has_a_reason_for_every_method_but_the_measured_one(tiny_folders: dict[str, Path]) -> None:
    """A method that is added is either measured, or said not to be."""
    own = {"reward": "tone@v1"}
    others = {
        method: _estimate(tiny_folders["llama"], method=method, **(own if method in SAMPLING_METHODS else {}))
        for method in get_args(Method)
    }
    assert ["sft"] == [method for method, estimate in others.items() if estimate.not_estimated is None]


def _memory(estimate: Estimate) -> int:
    assert estimate.memory_bytes is not None
    return estimate.memory_bytes
