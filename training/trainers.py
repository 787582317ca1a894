"""QLoRA supervised fine-tuning with TRL and PEFT, mended where they would be wrong or slow on a 4-bit base."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from training.config import TrainSettings
from training.losses import check_head_is_plain, token_sums
from training.rendering import collate

__all__ = [
    "Checkpointing",
    "NextMove",
    "RunWatcher",
    "StepListener",
    "StepMetrics",
    "TrainedCounts",
    "add_adapter",
    "disable_packed_kernels",
    "train_sft",
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


def add_adapter(base: LoadedBase, settings: TrainSettings) -> PeftModel:
    """Freeze the base model and put a fresh LoRA adapter on every linear layer of its decoder.

    Raises:
        BaseModelError: the model's loss can't be computed here.
    """
    disable_packed_kernels(base.model)
    check_head_is_plain(base.model)
    base.model.requires_grad_(False)
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    # The path of this machine's cache would otherwise travel with every adapter.
    model.peft_config["default"].base_model_name_or_path = base.reference.name
    return model


def disable_packed_kernels(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking the weights of a model that is to be trained; returns how many layers it has.

    With bitsandbytes 0.50.2 on a CPU with AVX512-BF16, the first forward pass in eval mode repacks a Linear4bit for an
    operator without autograd. From then on no gradient passes through that layer, in training mode either: evaluate
    once, and everything that is trained afterwards is trained on wrong gradients (their cosine to the right ones is 0.3
    on SmolLM2-135M), while the loss goes on falling. The flag exists on every machine; it matters where the fast path
    does.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def train_sft(
    model: PeftModel,
    base: LoadedBase,
    rows: Sequence[RenderedRow],
    settings: TrainSettings,
    listener: StepListener,
    checkpointing: Checkpointing | None = None,
) -> TrainedCounts:
    """Train the adapter on `rows` in place; with `checkpointing`, go on from a checkpoint and write more."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.input_ids for row in rows],  # TRL builds none of its own then; `_collate_rows` masks them
            "loss_mask": [row.loss_mask for row in rows],
        }
    )
    with tempfile.TemporaryDirectory(prefix="hotswap-train-") as scratch:
        folder = checkpointing.folder if checkpointing else Path(scratch)
        trainer = _MaskedLossTrainer(
            model=model,
            args=_arguments(settings, base, len(rows), folder),
            train_dataset=dataset,
            processing_class=base.tokenizer,
            data_collator=partial(_collate_rows, pad_token_id=base.tokenizer.pad_token_id),
        )
        trainer.add_callback(_Reporter(listener, trainer, checkpointing))
        trainer.remove_callback(PrinterCallback)
        # TRL casts the adapter of a 4-bit base to bfloat16, whose eight bits swallow small updates: back to float32.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # PEFT would copy every layer's input to the adapter's float32 and keep it for the backward pass; autocast casts
        # the small matrices instead. A step took a quarter less time so (SmolLM2-135M, 4 rows, 2 CPU cores).
        with disable_input_dtype_casting(model):
            resume_from = checkpointing.resume_from if checkpointing else None
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        state = trainer.state
        return TrainedCounts(
            int(state.global_step), int(state.num_input_tokens_seen), state.global_step >= state.max_steps
        )


class _MaskedLossTrainer(SFTTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer with our loss: the same value, without entropy over the vocabulary at each step."""

    num_targets: torch.Tensor | int = 0  # of the optimiser step so far, like num_correct
    num_correct: torch.Tensor | int = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the tokens of the whole optimiser step that carry loss."""
        assert num_items_in_batch is not None, "only the training step calls this"
        # In the state, since that is what a checkpoint keeps.
        self.state.num_input_tokens_seen += int(inputs["attention_mask"].sum())
        sums = token_sums(model.get_base_model(), inputs)
        self.num_targets, self.num_correct = num_items_in_batch, self.num_correct + sums.num_correct
        return sums.loss / num_items_in_batch

    def take_accuracy(self) -> float:
        """The share of right guesses in the step that has ended; the next begins from nothing."""
        accuracy = float(self.num_correct) / float(self.num_targets)
        self.num_correct = 0
        return accuracy

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone: tokenizer and arguments are made again from the settings when a run goes on."""
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL would write a model card


class _Reporter(TrainerCallback):
    """Passes each step on to a listener, and does what the watcher of a run with checkpoints wants."""

    def __init__(
        self, listener: StepListener, trainer: _MaskedLossTrainer, checkpointing: Checkpointing | None
    ) -> None:
        self._listener = listener
        self._trainer = trainer
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
            accuracy=self._trainer.take_accuracy(),
            num_tokens=int(state.num_input_tokens_seen),
        )
        self._listener.on_step(state.global_step, state.max_steps, self._metrics.loss)
        if self._checkpointing is not None:
            self._checkpointing.watcher.on_metrics(self._metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer once a checkpoint is whole."""
        if self._checkpointing is not None and self._metrics is not None:
            self._checkpointing.watcher.on_checkpoint(self._metrics)


def _collate_rows(examples: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    rows = [RenderedRow(example["input_ids"], example["loss_mask"]) for example in examples]
    return collate(rows, pad_token_id=pad_token_id)


def _arguments(settings: TrainSettings, base: LoadedBase, num_rows: int, folder: Path) -> SFTConfig:
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    num_steps = settings.max_steps or math.ceil(num_rows / rows_per_step * settings.epochs)
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        # The first step of a warm-up has learning rate 0: a run of very few steps would learn nothing.
        warmup_steps=min(settings.warmup_steps, num_steps // 4),
        weight_decay=settings.weight_decay,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        bf16=False,  # `summed_loss` chooses the precision itself
        use_cpu=base.device.type == "cpu",
        logging_steps=1,
        save_strategy="no",  # the reporter says when
        save_total_limit=2,  # the one before the newest stays until the newest is known to be whole
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=base.device.type == "cuda",
        max_length=None,
    )
