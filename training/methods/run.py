"""What a method is given to train with, and what all methods have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from adapters.base_model import LoadedBase
from training.config import TrainSettings
from training.length_order import LengthSampler
from training.precision import base_precision
from training.progress import Checkpointing, Reporter, StepListener, StepReader, TrainedCounts
from training.scratch import scratch_folder
from training.trackers import tracker_arguments
from training.watching import Watch

__all__ = [
    "AdapterTrainer",
    "MethodTrainer",
    "TrainingRun",
    "common_arguments",
    "exact_weights",
    "pick_logs",
    "run_trainer",
    "trainer_folder",
]

R = TypeVar("R")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class TrainingRun(Generic[R]):
    """An adapter to train in place, on rows as its method takes them.

    With `checkpointing` the run goes on from a checkpoint and writes more. A `watch` validates it and may end it early.
    `head` is the score head that a reward model trains beside its adapter. `score` gives rloo and grpo the rewards of a
    step's answers. `folder` is the run's own, for what it writes.
    """

    model: PeftModel
    base: LoadedBase
    rows: Sequence[R]
    settings: TrainSettings
    listener: StepListener
    checkpointing: Checkpointing | None = None
    watch: Watch | None = None
    head: torch.nn.Linear | None = None
    score: Callable[[Sequence[R], Sequence[list[int]]], list[float]] | None = None
    folder: Path | None = None


@contextmanager
def trainer_folder(run: TrainingRun[Any]) -> Iterator[Path]:
    """Where TRL's trainer writes: the run's checkpoints, or a folder that is gone afterwards."""
    if run.checkpointing is not None:
        yield run.checkpointing.folder
        return
    with scratch_folder(run.folder) as folder:
        yield folder


@contextmanager
def exact_weights(model: PeftModel) -> Iterator[None]:
    """Keep the adapter as it is while a trainer of TRL is made.

    TRL casts the adapter of a 4-bit base to bfloat16, whose eight bits swallow small updates, and which would round the
    weights of a version that a run goes on from.
    """
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data.float()


class AdapterTrainer:
    """Mixed into TRL's trainers: checkpoints hold the adapter alone, and nobody else is told that somebody trains."""

    model: Any
    args: Any
    row_lengths: Sequence[int] | None = None  # of rows that are padded to one length in a batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of rows of about one length, where they are padded."""
        if self.row_lengths is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        size, seed = self.args.per_device_train_batch_size, self.args.seed
        return LengthSampler(self.row_lengths, batch_size=size, seed=seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone: tokenizer and arguments are made again from the settings when a run goes on."""
        self.model.save_pretrained(
            output_dir, state_dict=state_dict, save_embedding_layers=False, selected_adapters=["default"]
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # type: ignore[arg-type]  # TRL would write a model card

    def _send_telemetry(self) -> None:
        """TRL would tell its makers about every run: the device, the model's family, where the data lies."""


class MethodTrainer(AdapterTrainer):
    """Mixed into the trainers of methods whose loss is TRL's own.

    Rows come tokenised, as everywhere here; tokens are counted; products run in the base model's precision.
    """

    counts_inputs = True
    state: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a batch."""
        if self.counts_inputs:  # in the state, since that is what a checkpoint keeps
            self.state.num_input_tokens_seen += int(inputs["attention_mask"].sum())
        with self._precision():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def _precision(self) -> Any:
        return base_precision(self.model)

    def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
        return dataset


def run_trainer(trainer: Any, run: TrainingRun[Any], *, read_step: StepReader) -> TrainedCounts:
    """Let one of TRL's trainers run to its end, or to where the run's watcher stops it.

    The trainer counts the tokens that it saw in `state.num_input_tokens_seen`.
    """
    resume_from = run.checkpointing.resume_from if run.checkpointing else None
    if run.watch is not None and resume_from is not None:
        run.watch.load(resume_from)
        if (end := run.watch.ended_at) is not None:  # it was ended early, and only its result is still to be published
            return TrainedCounts(end.step, end.num_tokens, is_complete=True)
    announce = trainer.log if run.settings.report_to else None
    trainer.add_callback(Reporter(run.listener, read_step, run.checkpointing, run.watch, announce))
    trainer.remove_callback(PrinterCallback)
    # PEFT would copy every layer's input to the adapter's float32 and keep it for the backward pass; autocast casts
    # the small matrices instead. A step took a quarter less time so (SmolLM2-135M, 4 rows, 2 CPU cores).
    with disable_input_dtype_casting(run.model):
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    state = trainer.state
    is_complete = state.global_step >= state.max_steps or (run.watch is not None and run.watch.ended_at is not None)
    return TrainedCounts(int(state.global_step), int(state.num_input_tokens_seen), is_complete)


def pick_logs(names: dict[str, str]) -> StepReader:
    """Reads from a trainer's log what is measured under its names there: `{"rewards/margins": "reward_margin"}`."""

    def read(logs: Any) -> tuple[float | None, dict[str, float]]:
        return None, {ours: float(logs[theirs]) for theirs, ours in names.items() if logs.get(theirs) is not None}

    return read


def common_arguments(run: TrainingRun[Any], folder: Path, *, rows_per_example: int = 1) -> dict[str, Any]:
    """What every method gives its TRL config; checkpoints go into `folder`.

    `rows_per_example` is how many rows of a batch one of the run's rows becomes.
    """
    settings, base = run.settings, run.base
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    num_steps = settings.max_steps or math.ceil(len(run.rows) * rows_per_example / rows_per_step * settings.epochs)
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": _SCHEDULES[settings.schedule],
        # The first step of a warm-up has learning rate 0: a run of very few steps would learn nothing.
        "warmup_steps": min(settings.warmup_steps, num_steps // 4),
        "weight_decay": settings.weight_decay,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_liger_kernel": settings.use_liger_kernel,
        "seed": settings.seed,
        "bf16": False,  # the losses choose the precision themselves
        "use_cpu": base.device.type == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number ends the run, instead of looking like the last one
        "save_strategy": "no",  # the reporter says when
        "save_total_limit": 2,  # the one before the newest stays until the newest is known to be whole
        **tracker_arguments(settings.report_to),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": base.device.type == "cuda",
    }
