"""What a method is given to train with, and what all methods have in common."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers.trainer_callback import PrinterCallback

from adapters.base_model import LoadedBase
from training.config import TrainSettings
from training.progress import Checkpointing, Reporter, StepListener, TrainedCounts

__all__ = ["TrainingRun", "common_arguments", "run_trainer", "trainer_folder"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TrainingRun(Generic[R]):
    """An adapter to train in place, on rows as its method takes them.

    With `checkpointing` the run goes on from a checkpoint and writes more.
    """

    model: PeftModel
    base: LoadedBase
    rows: Sequence[R]
    settings: TrainSettings
    listener: StepListener
    checkpointing: Checkpointing | None = None


@contextmanager
def trainer_folder(run: TrainingRun[Any]) -> Iterator[Path]:
    """Where TRL's trainer writes: the run's checkpoints, or a folder that is gone afterwards."""
    if run.checkpointing is not None:
        yield run.checkpointing.folder
        return
    with tempfile.TemporaryDirectory(prefix="hotswap-train-") as scratch:
        yield Path(scratch)


def run_trainer(trainer: Any, run: TrainingRun[Any], *, take_accuracy: Callable[[], float]) -> TrainedCounts:
    """Let one of TRL's trainers run to its end, or to where the run's watcher stops it.

    The trainer counts the tokens that it saw in `state.num_input_tokens_seen`.
    """
    trainer.add_callback(Reporter(run.listener, take_accuracy, run.checkpointing))
    trainer.remove_callback(PrinterCallback)
    # TRL casts the adapter of a 4-bit base to bfloat16, whose eight bits swallow small updates: back to float32.
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # PEFT would copy every layer's input to the adapter's float32 and keep it for the backward pass; autocast casts
    # the small matrices instead. A step took a quarter less time so (SmolLM2-135M, 4 rows, 2 CPU cores).
    with disable_input_dtype_casting(run.model):
        resume_from = run.checkpointing.resume_from if run.checkpointing else None
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    state = trainer.state
    return TrainedCounts(int(state.global_step), int(state.num_input_tokens_seen), state.global_step >= state.max_steps)


def common_arguments(run: TrainingRun[Any], folder: Path) -> dict[str, Any]:
    """What every method gives its TRL config; checkpoints go into `folder`."""
    settings, base, num_rows = run.settings, run.base, len(run.rows)
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    num_steps = settings.max_steps or math.ceil(num_rows / rows_per_step * settings.epochs)
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        # The first step of a warm-up has learning rate 0: a run of very few steps would learn nothing.
        "warmup_steps": min(settings.warmup_steps, num_steps // 4),
        "weight_decay": settings.weight_decay,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "bf16": False,  # the losses choose the precision themselves
        "use_cpu": base.device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",  # the reporter says when
        "save_total_limit": 2,  # the one before the newest stays until the newest is known to be whole
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": base.device.type == "cuda",
    }
