"""What a run tells while it goes on, whom it asks whether it may, and the states that it keeps to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from training.losses import Evaluation
    from training.watching import Watch

__all__ = [
    "Checkpointing",
    "NextMove",
    "Reporter",
    "RunWatcher",
    "StepListener",
    "StepMetrics",
    "StepReader",
    "TrainedCounts",
]

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
    """One optimiser step: its loss, share of tokens guessed right, and tokens seen since the start.

    The loss of supervised fine-tuning is the mean in nats a token; that of other methods is their own. `accuracy` is
    None where no tokens are guessed. `extra` is what a method measures besides, by name. `gradient_norm` is that before
    clipping.
    """

    step: int
    num_steps: int
    loss: float
    accuracy: float | None
    num_tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    gradient_norm: float | None = None


class RunWatcher(Protocol):
    """Told how a run that keeps checkpoints goes on, and asked whether it may."""

    def next_move(self) -> NextMove:
        """Asked after every step: go on, stop after a checkpoint, or stop at once."""

    def on_metrics(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        """The state after this step lies on the disk, whole; `validation` is its result, if it was validated."""


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Where a run keeps states that it can go on from: `folder/checkpoint-<step>`, the newest two of them.

    `every_steps` None writes one at the end of each epoch. The last step always has one.
    """

    folder: Path
    watcher: RunWatcher
    every_steps: int | None = None
    resume_from: Path | None = None


# What a trainer logs of a step -> share of tokens guessed right, and what else its method measures.
StepReader = Callable[[Mapping[str, Any]], tuple[float | None, dict[str, float]]]


class StepListener(Protocol):
    """Told of every optimiser step, for a progress bar."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Step `step` of `num_steps` is done; `loss` is its mean in nats a token."""


class Reporter(TrainerCallback):
    """Passes each step on to a listener, has it watched, and does what the watcher of a run with checkpoints wants.

    What is due after a step depends on the step alone: a run that is paused and goes on does the same as another.

    Args:
        listener: Told of every step.
        read_step: What the method measures in a step; called once a step with what its trainer logs.
        checkpointing: Where the run keeps its states, if it does.
        watch: Validates, and may end the run early.
        announce: Tells trackers what was validated; None where there are none.
    """

    def __init__(
        self,
        listener: StepListener,
        read_step: StepReader,
        checkpointing: Checkpointing | None,
        watch: Watch | None,
        announce: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._listener = listener
        self._read_step = read_step
        self._checkpointing = checkpointing
        self._watch = watch
        self._announce = announce
        self._is_validation_due = False
        self._metrics: StepMetrics | None = None
        self._validation: Evaluation | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether this step is kept and validated, and whether it is the last."""
        is_last = state.global_step == state.max_steps
        is_scheduled = is_last or self._ends_stretch(state)
        self._is_validation_due = self._watch is not None and self._watch.is_due(
            state.global_step, is_scheduled=is_scheduled, is_last=is_last
        )
        if self._checkpointing is None:
            return
        control.should_save = is_scheduled
        move = self._checkpointing.watcher.next_move()
        if move != "continue":
            control.should_training_stop = True
            control.should_save = move == "pause"
            self._is_validation_due = self._is_validation_due and move == "pause"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Called by the trainer after every step, since logging_steps is 1, and before the state is saved."""
        if not logs or "loss" not in logs:
            return
        accuracy, extra = self._read_step(logs)
        metrics = self._metrics = StepMetrics(
            step=state.global_step,
            num_steps=state.max_steps,
            loss=float(logs["loss"]),
            accuracy=accuracy,
            num_tokens=int(state.num_input_tokens_seen),
            extra=extra,
            learning_rate=logs.get("learning_rate"),
            gradient_norm=logs.get("grad_norm"),
        )
        self._listener.on_step(metrics.step, metrics.num_steps, metrics.loss)
        if self._checkpointing is not None:
            self._checkpointing.watcher.on_metrics(metrics)
        self._validation = None
        if self._watch is not None:
            self._watch_step(self._watch, metrics, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer once its part of a checkpoint is whole; the watch adds its own."""
        if self._checkpointing is None or self._metrics is None:
            return
        if self._watch is not None:
            self._watch.save(self._checkpointing.folder / f"checkpoint-{state.global_step}")
        self._checkpointing.watcher.on_checkpoint(self._metrics, self._validation)

    def _ends_stretch(self, state: TrainerState) -> bool:
        """Whether a checkpoint is due: so many steps after another, or at the end of an epoch."""
        every_steps = self._checkpointing.every_steps if self._checkpointing else None
        if every_steps is not None:
            return state.global_step % every_steps == 0
        return float(state.epoch or 0).is_integer()

    def _watch_step(self, watch: Watch, metrics: StepMetrics, control: TrainerControl) -> None:
        watch.on_step(metrics)
        if not self._is_validation_due:
            return
        self._validation = watch.evaluate(metrics)
        if self._announce is not None and self._validation is not None:
            # The trainer's word for a validation, by which trackers sort what they are told.
            measured = {"loss": self._validation.loss, "accuracy": self._validation.accuracy, **self._validation.extra}
            self._announce({f"eval_{name}": value for name, value in measured.items() if value is not None})
        if watch.ended_at is not None:
            control.should_training_stop = True
            control.should_save = self._checkpointing is not None
