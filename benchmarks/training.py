"""Tokens a second of supervised fine-tuning: TRL's own trainer and ours, alternating, on one base model and one file.

    python -m benchmarks.training [--data examples/support.train.jsonl] [--steps 6] [--repeats 3] [--home HOME]

Both get the same rows of tokens with loss on the same of them, the same adapter to begin with, the same order, batch
size, learning rate and seed. The first step of a run is not timed. Processor time is given beside time: on a machine
that others use, it is the steadier of the two.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from training.rendering import IGNORED_LABEL, render_dataset

__all__ = ["Trained", "format_results", "largest_difference", "main", "run_ours", "run_trl"]

_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Trained:
    """What one run showed: the losses of all steps, and seconds and processor seconds of all but the first."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float = 0.0


class _Clock(TrainerCallback):
    """Times either trainer: TRL's as a callback, ours as its listener."""

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
        [
            token if carries_loss else IGNORED_LABEL
            for token, carries_loss in zip(row.input_ids, row.loss_mask, strict=True)
        ]
        for row in rows
    ]
    dataset = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": labels})
    num_steps = settings.max_steps or math.ceil(len(rows) / settings.batch_size * settings.epochs)
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(settings.warmup_steps, num_steps // 4),  # as ours does it
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


def main() -> None:
    """Alternate the two and print the ratios of tokens a second, and how far the loss curves are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=_ROOT / "examples" / "support.train.jsonl")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a run, the first not timed (default 6)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on for both; TRL's own default")
    parser.add_argument("--home", type=Path, default=None)
    options = parser.parse_args()
    core = CoreSettings.load(resolve_home(options.home))
    settings = TrainSettings.load(
        core.home,
        batch_size=options.batch_size,
        max_steps=options.steps,
        warmup_steps=1,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    print(format_conditions(describe_machine(core)))
    variants = {"trl": _on(core, settings, options.data, run_trl), "ours": _on(core, settings, options.data, run_ours)}
    results = alternate(variants, options.repeats)
    print(format_results(results["trl"], results["ours"]))


def format_results(theirs: Sequence[Trained], ours: Sequence[Trained]) -> str:
    """How many times as fast ours is, by time and by processor time, and the loss curves' largest difference.

    Both take the same rows in the same order: the ratio of their times is that of their tokens a second.
    """
    by_time = paired_ratio([run.seconds for run in theirs], [run.seconds for run in ours])
    by_processor = paired_ratio([run.processor_seconds for run in theirs], [run.processor_seconds for run in ours])
    medians = [statistics.median(run.seconds / (len(run.losses) - 1) for run in runs) for runs in (theirs, ours)]
    largest = max(largest_difference(a.losses, b.losses) for a, b in zip(ours, theirs, strict=True))
    return (
        f"a step takes TRL {medians[0]:.2f} s, ours {medians[1]:.2f} s: {by_time:.2f}x the tokens a second, "
        f"{by_processor:.2f}x those a processor second\n"
        f"largest difference of the loss curves: {100 * largest:.2f} % of the highest loss"
    )


def _on(
    core: CoreSettings,
    settings: TrainSettings,
    data: Path,
    run: Callable[[LoadedBase, Sequence[RenderedRow], TrainSettings], Trained],
) -> Callable[[], Trained]:
    """A run on a base model that is loaded afresh: training changes the layers that it is given."""

    def measure() -> Trained:
        base = load_base(core)
        rows: list[RenderedRow] = render_dataset(base.tokenizer, read_dataset(data), max_length=settings.max_length)
        trained = run(base, rows, settings)
        print(
            f"{run.__name__}: {trained.seconds:.1f} s, losses {[round(loss, 3) for loss in trained.losses]}", flush=True
        )
        return trained

    return measure


if __name__ == "__main__":
    main()
