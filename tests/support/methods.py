"""Tiny runs of every training method: rows that any model learns, and who listens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters.base_model import LoadedBase
from training.config import TrainSettings
from training.formats import Dataset, read_dataset
from training.lora import add_adapter
from training.losses import Evaluation
from training.methods import TrainingRun, render_rows
from training.progress import Checkpointing, NextMove, StepMetrics
from training.prompts import RenderedPrompt
from training.reward_model import make_head

__all__ = [
    "TinyWatcher",
    "answers_in_lower_case",
    "keep",
    "make_run",
    "method_settings",
    "toy_dataset",
    "trained_tensors",
]

_GOOD, _BAD = "Yes!", "No no"


@dataclass
class TinyWatcher:
    """Listens to a run and watches its checkpoints: keeps what it is told, and stops after a step if it is to."""

    stop_after: int = 0
    move: NextMove = "pause"
    losses: list[float] = field(default_factory=list)
    metrics: list[StepMetrics] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    num_asked: int = 0

    def on_stage(self, message: str) -> None:
        """Keep one stage."""
        self.stages.append(message)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Keep one loss."""
        self.losses.append(loss)

    def next_move(self) -> NextMove:
        """Asked once a step."""
        self.num_asked += 1
        return self.move if self.num_asked == self.stop_after else "continue"

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Keep one step."""
        self.metrics.append(metrics)

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        """Of no interest."""

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """Of no interest."""

    def on_warning(self, message: str) -> None:
        """Of no interest."""


def method_settings(home: Path, method: str, **changes: Any) -> TrainSettings:
    """Settings under which a tiny model learns the toy rows in a dozen steps."""
    defaults: dict[str, Any] = {"rank": 8, "alpha": 16, "batch_size": 4, "epochs": 4, "warmup_steps": 1}
    defaults |= {"promote": "always", "sample_prompts": 0}
    if method != "reward":  # which gives no answers
        defaults |= {"gate_samples": 1, "gate_sample_tokens": 4}
    if method in ("rloo", "grpo"):
        defaults |= {"reward": "toy.py:toy", "max_answer_tokens": 4, "batch_size": 8, "epochs": 2}
    return TrainSettings.load(home, method=method, **(defaults | {"learning_rate": 1e-2, "max_length": 128} | changes))


def toy_dataset(folder: Path, method: str, num_rows: int = 10) -> Dataset:
    """Rows of the kind that a method takes: `Yes!` is the better answer to everything."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{method}.jsonl"
    path.write_text("".join(json.dumps(_toy_row(method, number)) + "\n" for number in range(num_rows)))
    return read_dataset(path)


def make_run(base: LoadedBase, settings: TrainSettings, folder: Path, **changes: Any) -> TrainingRun[Any]:
    """A run of the settings' method over the toy rows, listened to by a watcher."""
    rows = render_rows(base.tokenizer, toy_dataset(folder, settings.method), settings)
    model = add_adapter(base, settings)
    head = make_head(base, settings.seed) if settings.method == "reward" else None
    score = _toy_scorer(base) if settings.method in ("rloo", "grpo") else None
    run = TrainingRun(model, base, rows, settings, TinyWatcher(), head=head, score=score)
    return replace(run, **changes)


def keep(run: TrainingRun[Any], watcher: TinyWatcher, folder: Path, resume_from: int | None = None) -> TrainingRun[Any]:
    """The run with checkpoints at the end of each epoch, and from one of them."""
    start = None if resume_from is None else folder / f"checkpoint-{resume_from}"
    return replace(run, listener=watcher, checkpointing=Checkpointing(folder, watcher, None, start))


def trained_tensors(run: TrainingRun[Any]) -> dict[str, torch.Tensor]:
    """Everything that the run trains, copied."""
    tensors = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return tensors if run.head is None else tensors | {"head": run.head.weight.detach().clone()}


def answers_in_lower_case(answers: Sequence[str]) -> list[float]:
    """The share of small letters: there is always a way up, even for a model that writes noise."""
    return [sum("a" <= letter <= "z" for letter in answer) / max(1, len(answer)) for answer in answers]


def _toy_row(method: str, number: int) -> dict[str, Any]:
    prompt = f"Q{number}{'?' * (number % 5)}"
    if method in ("dpo", "reward"):
        return {"prompt": prompt, "chosen": _GOOD, "rejected": _BAD}
    if method == "kto":
        return {"prompt": prompt, "completion": _GOOD if number % 3 else _BAD, "label": bool(number % 3)}
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": _GOOD}]}


def _toy_scorer(base: LoadedBase) -> Callable[[Sequence[RenderedPrompt], Sequence[list[int]]], list[float]]:
    def score(prompts: Sequence[RenderedPrompt], answers: Sequence[list[int]]) -> list[float]:
        return answers_in_lower_case([base.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers])

    return score
