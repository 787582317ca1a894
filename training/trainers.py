"""QLoRA supervised fine-tuning with TRL and PEFT, mended where they would be wrong or slow on a 4-bit base."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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
from training.losses import check_head_is_plain, summed_loss
from training.rendering import collate

__all__ = ["StepListener", "TrainedCounts", "add_adapter", "disable_packed_kernels", "train_sft"]


@dataclass(frozen=True, slots=True)
class TrainedCounts:
    """Optimiser steps that were taken, and tokens that went through the model, padding not counted."""

    num_steps: int
    num_tokens: int


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
) -> TrainedCounts:
    """Train the adapter on `rows` in place."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.input_ids for row in rows],  # TRL builds none of its own then; `_collate_rows` masks them
            "loss_mask": [row.loss_mask for row in rows],
        }
    )
    with tempfile.TemporaryDirectory(prefix="hotswap-train-") as scratch:
        trainer = _MaskedLossTrainer(
            model=model,
            args=_arguments(settings, base, len(rows), Path(scratch)),
            train_dataset=dataset,
            processing_class=base.tokenizer,
            data_collator=partial(_collate_rows, pad_token_id=base.tokenizer.pad_token_id),
            callbacks=[_Reporter(listener)],
        )
        trainer.remove_callback(PrinterCallback)
        # TRL casts the adapter of a 4-bit base to bfloat16, whose eight bits swallow small updates: back to float32.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # PEFT would copy every layer's input to the adapter's float32 and keep it for the backward pass; autocast casts
        # the small matrices instead. A step took a quarter less time so (SmolLM2-135M, 4 rows, 2 CPU cores).
        with disable_input_dtype_casting(model):
            trainer.train()
        return TrainedCounts(int(trainer.state.global_step), trainer.num_tokens_seen)


class _MaskedLossTrainer(SFTTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer with our loss: the same value, without entropy and accuracy over the vocabulary at each step."""

    num_tokens_seen = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the tokens of the whole optimiser step that carry loss."""
        assert num_items_in_batch is not None, "only the training step calls this"
        self.num_tokens_seen += int(inputs["attention_mask"].sum())
        return summed_loss(model.get_base_model(), inputs) / num_items_in_batch


class _Reporter(TrainerCallback):
    """Passes each step's loss on to a listener."""

    def __init__(self, listener: StepListener) -> None:
        self._listener = listener

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Called by the trainer after every step, since logging_steps is 1."""
        if logs and "loss" in logs:
            self._listener.on_step(state.global_step, state.max_steps, float(logs["loss"]))


def _collate_rows(examples: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    rows = [RenderedRow(example["input_ids"], example["loss_mask"]) for example in examples]
    return collate(rows, pad_token_id=pad_token_id)


def _arguments(settings: TrainSettings, base: LoadedBase, num_rows: int, scratch: Path) -> SFTConfig:
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    num_steps = settings.max_steps or math.ceil(num_rows / rows_per_step * settings.epochs)
    return SFTConfig(
        output_dir=str(scratch),
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
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=base.device.type == "cuda",
        max_length=None,
    )
