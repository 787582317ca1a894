"""Tokens a second of supervised fine-tuning: TRL's own trainer and ours, alternating, on one base model and one file.

    python -m benchmarks.training [--data examples/support.train.jsonl] [--steps 6] [--repeats 3] [--home HOME]

Both get the same rows of tokens with loss on the same of them, the same adapter to begin with, the same order, batch
size, learning rate and seed. The first step of a run is not timed. Processor time is given beside time: on a machine
that others use, it is the steadier of the two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from adapters.base_model import LoadedBase, load_base
from adapters.chat_template import RenderedRow
from adapters.settings import CoreSettings, resolve_home
from benchmarks.conditions import describe_machine, format_conditions
from benchmarks.measure import alternate, paired_ratio
from training.config import TrainSettings
from training.formats import read_dataset
from training.lora import add_adapter
from training.methods import TrainingRun
from training.methods.sft import train_sft
from training.rendering import render_dataset

__all__ = ["Trained", "largest_difference", "run_ours", "run_trl"]

_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Trained:
    """What one run showed: the losses of all steps; tokens and both kinds of seconds from the end of the first step on."""

    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Padding not counted."""
        return self.num_tokens / self.seconds

    @property
    def tokens_per_processor_second(self) -> float:
        """The same by the processor's time, of all threads together."""
        return self.num_tokens / self.processor_seconds


class _Clock(TrainerCallback):
    """Times TRL's trainer; ours tells its steps by the same three functions' names."""

    def __init__(self) -> None:
        self.trained = Trained()
        self._started = (0.0, 0.0)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Note a step; the clock starts at the end of the first."""
        self.trained.losses.append(loss)
        now = (time.perf_counter(), time.process_time())
        if step == 1:
            self._started = now
        self.trained.seconds = now[0] - self._started[0]
        self.trained.processor_seconds = now[1] - self._started[1]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the trainer after every step."""
        if logs and "loss" in logs:
            self.on_step(state.global_step, state.max_steps, float(logs["loss"]))


def run_trl(base: LoadedBase, rows: Sequence[RenderedRow], settings: TrainSettings) -> Trained:
    """Train with TRL's trainer as it comes, told no more than the settings."""
    labels = [
        [token if carries_loss else -100 for token, carries_loss in zip(row.input_ids, row.loss_mask, strict=True)]
        for row in rows
    ]
    dataset = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": labels})
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            seed=settings.seed,
            gradient_checkpointing=settings.gradient_checkpointing,
            max_length=None,
            use_cpu=base.device.type == "cpu",
            dataloader_pin_memory=base.device.type == "cuda",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        set_seed(settings.seed)  # as before our adapter: both begin with the same matrices
        trainer = SFTTrainer(
            model=base.model,
            args=arguments,
            train_dataset=dataset,
            processing_class=base.tokenizer,
            peft_config=LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.trained


def run_ours(base: LoadedBase, rows: Sequence[RenderedRow], settings: TrainSettings) -> Trained:
    """Train as `hotswap train` does."""
    clock = _Clock()
    train_sft(TrainingRun(add_adapter(base, settings), base, rows, settings, clock))
    return clock.trained


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two loss curves at any step, as a share of the second curve's highest loss."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(theirs)
