"""The training benchmark: two trainers that take the same steps, and what is made of their times."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.chat_template import RenderedRow
from benchmarks.training import Trained, format_results, largest_difference, run_ours, run_trl
from tests.support.conversations import easy_rows, make_dataset
from tests.support.tiny import load_tiny_base
from training.config import TrainSettings
from training.rendering import render_dataset


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainers_take_the_same_steps_when_settings_are_equal(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Same rows, order, start and schedule: the loss curves are one, but for TRL's bfloat16."""
    settings = TrainSettings.load(tmp_path, rank=4, alpha=8, batch_size=2, max_steps=4, warmup_steps=1)
    runs = []
    for train in (run_trl, run_ours):
        base = load_tiny_base(tiny_folders["llama"])
        rows: list[RenderedRow] = render_dataset(
            base.tokenizer, make_dataset(tmp_path / "rows.jsonl", easy_rows(8)), max_length=64
        )
        runs.append(train(base, rows, settings))
    theirs, ours = runs
    assert len(ours.losses) == 4
    assert largest_difference(ours.losses, theirs.losses) < 0.02
    assert min(ours.seconds, ours.processor_seconds, theirs.seconds, theirs.processor_seconds) > 0


def test_results_are_ratios_of_pairs_when_runs_alternate() -> None:
    """Speeds are compared repeat by repeat, loss curves by their largest difference."""
    theirs = [Trained([4.0, 2.0], 8.0, 4.0), Trained([4.0, 2.0], 20.0, 4.0), Trained([4.0, 2.0], 9.0, 4.0)]
    ours = [Trained([4.0, 2.1], 4.0, 1.0), Trained([4.0, 2.0], 10.0, 1.0), Trained([4.0, 2.0], 3.0, 2.0)]
    assert format_results(theirs, ours) == (
        "a step takes TRL 9.00 s, ours 4.00 s: 2.00x the tokens a second, 4.00x those a processor second\n"
        "largest difference of the loss curves: 2.50 % of the highest loss"
    )
