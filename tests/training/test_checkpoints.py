"""Checkpoints of a run: going on from one gives the very adapter that an uninterrupted run gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from tests.support.conversations import easy_rows, make_dataset
from tests.support.tiny import load_tiny_base
from training.config import TrainSettings
from training.lora import add_adapter
from training.methods import TrainingRun
from training.methods.sft import train_sft
from training.progress import Checkpointing, NextMove, StepMetrics, TrainedCounts
from training.rendering import render_dataset
from training.worker import SilentListener


@dataclass
class Watcher:
    """Keeps what it is told, and stops the run after a step if it is to."""

    stop_after: int = 0
    move: NextMove = "pause"
    metrics: list[StepMetrics] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    num_asked: int = 0

    def next_move(self) -> NextMove:
        """Asked once a step."""
        self.num_asked += 1
        return self.move if self.num_asked == self.stop_after else "continue"

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Keep one step."""
        self.metrics.append(metrics)

    def on_checkpoint(self, metrics: StepMetrics) -> None:
        """Keep one checkpoint's step."""
        self.checkpoints.append(metrics.step)


@dataclass
class Trained:
    """What a run left."""

    counts: TrainedCounts
    tensors: dict[str, torch.Tensor]


def _settings(home: Path) -> TrainSettings:
    # Dropout draws random numbers at every step, so that a lost random state shows.
    return TrainSettings.load(
        home, rank=4, alpha=8, batch_size=4, epochs=3, learning_rate=1e-2, warmup_steps=1, dropout=0.1
    )


def _rows(folder: Path, base: LoadedBase) -> list[RenderedRow]:
    return render_dataset(base.tokenizer, make_dataset(folder / "rows.jsonl", easy_rows(10)), max_length=64)


def _train(
    tmp_path: Path, tiny_folder: Path, watcher: Watcher, *, resume_from: int | None = None, every: int | None = None
) -> Trained:
    base = load_tiny_base(tiny_folder)
    settings = _settings(tmp_path)
    model = add_adapter(base, settings)
    folder = tmp_path / "checkpoints"
    start = None if resume_from is None else folder / f"checkpoint-{resume_from}"
    keeping = Checkpointing(folder, watcher, every, start)
    counts = train_sft(TrainingRun(model, base, _rows(tmp_path, base), settings, SilentListener(), keeping))
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return Trained(counts, tensors)


def test_run_writes_a_checkpoint_an_epoch_when_no_distance_is_given(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Nine steps in three epochs; the newest two stay, with the adapter alone of the model's weights."""
    watcher = Watcher()
    trained = _train(tmp_path, tiny_folders["llama"], watcher)
    assert watcher.checkpoints == [3, 6, 9]
    assert trained.counts.is_complete
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-9"]
    assert {path.name for path in (folder / "checkpoint-9").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }


def test_run_writes_checkpoints_at_a_distance_when_one_is_given(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Every fourth step, and the last."""
    watcher = Watcher()
    _train(tmp_path, tiny_folders["llama"], watcher, every=4)
    assert watcher.checkpoints == [4, 8, 9]


@pytest.mark.parametrize(("stop_after", "every"), [(3, None), (4, None), (2, 2)])
def test_adapter_has_the_same_bits_when_the_run_was_interrupted(
    tmp_path: Path, tiny_folders: dict[str, Path], stop_after: int, every: int | None
) -> None:
    """At the end of an epoch and in the middle of one: optimiser, schedule, order and dropout go on."""
    whole = _train(tmp_path / "whole", tiny_folders["llama"], Watcher())
    rows = _rows(tmp_path / "whole", load_tiny_base(tiny_folders["llama"]))
    assert whole.counts == TrainedCounts(9, 3 * sum(len(row.input_ids) for row in rows), is_complete=True)
    first = Watcher(stop_after)
    stopped = _train(tmp_path / "parts", tiny_folders["llama"], first, every=every)
    assert (stopped.counts.num_steps, stopped.counts.is_complete) == (stop_after, False)
    assert first.checkpoints[-1] == stop_after
    second = Watcher()
    resumed = _train(tmp_path / "parts", tiny_folders["llama"], second, resume_from=stop_after, every=every)
    assert resumed.counts == whole.counts
    assert [metrics.step for metrics in second.metrics] == list(range(stop_after + 1, 10))
    assert len(whole.tensors) > 10
    for name, expected in whole.tensors.items():
        assert torch.equal(expected, resumed.tensors[name]), name


def test_run_ends_without_a_checkpoint_when_it_is_to_stop_at_once(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """A cancelled job needs none."""
    watcher = Watcher(2, move="stop")
    trained = _train(tmp_path, tiny_folders["llama"], watcher)
    assert (trained.counts.num_steps, watcher.checkpoints) == (2, [])


def test_run_ends_at_once_when_it_goes_on_from_its_last_step(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """A trainer that was killed while it published trains nothing again."""
    whole = _train(tmp_path, tiny_folders["llama"], Watcher())
    again = Watcher()
    resumed = _train(tmp_path, tiny_folders["llama"], again, resume_from=9)
    assert (again.metrics, resumed.counts) == ([], whole.counts)
    for name, expected in whole.tensors.items():
        assert torch.equal(expected, resumed.tensors[name]), name


def test_accuracy_is_the_share_of_right_tokens_when_a_step_is_split(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Rises to all of them on rows that any model learns, whatever the number of forward passes a step."""
    base = load_tiny_base(tiny_folders["llama"])
    settings = _settings(tmp_path).model_copy(
        update={"epochs": 20.0, "gradient_accumulation": 2, "batch_size": 5, "dropout": 0.0}
    )
    watcher = Watcher()
    model = add_adapter(base, settings)
    keeping = Checkpointing(tmp_path / "checkpoints", watcher, 1000)
    train_sft(TrainingRun(model, base, _rows(tmp_path, base), settings, SilentListener(), keeping))
    accuracies = [metrics.accuracy for metrics in watcher.metrics]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert accuracies[-1] == 1.0
    assert accuracies[0] < 0.5
