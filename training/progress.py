"""What a run tells while it goes on, whom it asks whether it may, and the states that it keeps to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Checkpointing", "NextMove", "Reporter", "RunWatcher", "StepListener", "StepMetrics", "TrainedCounts"]

NextMove = Literal["continue", "pause", "stop"]


@dataclass(frozen=True, slots=True)
class TrainedCounts:
    """Optimiser steps that were taken, and tokens that went through the model, padding not counted.

    Both count from the run's first step, also where it went on from a checkpoint. `is_complete` is False for a run that
    its watcher stopped.
    """

    num_steps: int
    num_tokens: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step: mean loss in nats a token, share of tokens guessed right, and tokens seen since the start."""

    step: int
    num_steps: int
    loss: float
    accuracy: float
    num_tokens: int


class RunWatcher(Protocol):
    """Told how a run that keeps checkpoints goes on, and asked whether it may."""

    def next_move(self) -> NextMove:
        """Asked after every step: go on, stop after a checkpoint, or stop at once."""

    def on_metrics(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_checkpoint(self, metrics: StepMetrics) -> None:
        """The state after this step lies on the disk, whole."""


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Where a run keeps states that it can go on from: `folder/checkpoint-<step>`, the newest two of them.

    `every_steps` None writes one at the end of each epoch. The last step always has one.
    """

    folder: Path
    watcher: RunWatcher
    every_steps: int | None = None
    resume_from: Path | None = None


class StepListener(Protocol):
    """Told of every optimiser step, for a progress bar."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Step `step` of `num_steps` is done; `loss` is its mean in nats a token."""


class Reporter(TrainerCallback):
    """Passes each step on to a listener, and does what the watcher of a run with checkpoints wants.

    Args:
        listener: Told of every step.
        take_accuracy: The share of right guesses in the step that has ended; called once a step.
        checkpointing: Where the run keeps its states, if it does.
    """

    def __init__(
        self, listener: StepListener, take_accuracy: Callable[[], float], checkpointing: Checkpointing | None
    ) -> None:
        self._listener = listener
        self._take_accuracy = take_accuracy
        self._checkpointing = checkpointing
        self._metrics: StepMetrics | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether this step is kept, and whether it is the last."""
        if self._checkpointing is None:
            return
        every_steps = self._checkpointing.every_steps
        is_due = every_steps is not None and state.global_step % every_steps == 0
        control.should_save = is_due or state.global_step == state.max_steps
        move = self._checkpointing.watcher.next_move()
        if move != "continue":
            control.should_training_stop = True
            control.should_save = move == "pause"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the state at the end of an epoch, where no other distance was asked for."""
        is_under_way = not control.should_training_stop and state.global_step < state.max_steps
        if self._checkpointing is not None and self._checkpointing.every_steps is None and is_under_way:
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Called by the trainer after every step, since logging_steps is 1."""
        if not logs or "loss" not in logs:
            return
        self._metrics = StepMetrics(
            step=state.global_step,
            num_steps=state.max_steps,
            loss=float(logs["loss"]),
            accuracy=self._take_accuracy(),
            num_tokens=int(state.num_input_tokens_seen),
        )
        self._listener.on_step(state.global_step, state.max_steps, self._metrics.loss)
        if self._checkpointing is not None:
            self._checkpointing.watcher.on_metrics(self._metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer once a checkpoint is whole."""
        if self._checkpointing is not None and self._metrics is not None:
            self._checkpointing.watcher.on_checkpoint(self._metrics)
