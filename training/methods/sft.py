"""Supervised fine-tuning with TRL, mended where it would be slow on a 4-bit base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from adapters.chat_template import RenderedRow
from training.embedding_noise import noisy_embeddings
from training.flat_rows import has_row_attention, make_batch
from training.losses import Evaluation, evaluate, token_sums
from training.methods.run import (
    AdapterTrainer,
    TrainingRun,
    common_arguments,
    exact_weights,
    run_trainer,
    trainer_folder,
)
from training.progress import TrainedCounts

__all__ = ["train_sft", "validate_sft"]


def train_sft(run: TrainingRun[RenderedRow]) -> TrainedCounts:
    """Train the adapter on what the assistant says in the rows."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in run.rows],
            "labels": [row.input_ids for row in run.rows],  # TRL builds none of its own; `_batch_rows` masks them
            "loss_mask": [row.loss_mask for row in run.rows],
        }
    )
    with trainer_folder(run) as folder:
        with exact_weights(run.model):
            trainer = _MaskedLossTrainer(
                model=run.model,
                args=SFTConfig(**common_arguments(run, folder), max_length=None),
                train_dataset=dataset,
                processing_class=run.base.tokenizer,
                data_collator=partial(_batch_rows, model=run.base.model, pad_token_id=run.base.tokenizer.pad_token_id),
            )
        trainer.neftune = run.settings.neftune
        if not has_row_attention(run.base.model):  # otherwise nothing is padded
            trainer.row_lengths = [len(row.input_ids) for row in run.rows]
        return run_trainer(trainer, run, read_step=lambda logs: (trainer.take_accuracy(), {}))


def validate_sft(run: TrainingRun[Any], rows: Sequence[RenderedRow]) -> Callable[[], Evaluation]:
    """What measures loss and accuracy on what the assistant says."""
    options = {"batch_size": run.settings.batch_size, "pad_token_id": run.base.tokenizer.pad_token_id}
    return lambda: evaluate(run.base.model, rows, **options)


class _MaskedLossTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer with our loss: the same value, without entropy over the vocabulary at each step."""

    neftune: float | None = None  # not TRL's: that goes by the length of the whole batch
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
        base = model.get_base_model()
        noise = noisy_embeddings(base.get_input_embeddings(), inputs, self.neftune) if self.neftune else nullcontext()
        with noise:
            sums = token_sums(base, inputs)
        self.num_targets, self.num_correct = num_items_in_batch, self.num_correct + sums.num_correct
        return sums.loss / num_items_in_batch

    def take_accuracy(self) -> float:
        """The share of right guesses in the step that has ended; the next begins from nothing."""
        accuracy = float(self.num_correct) / float(self.num_targets)
        self.num_correct = 0
        return accuracy


def _batch_rows(examples: list[dict[str, Any]], *, model: Any, pad_token_id: int) -> dict[str, torch.Tensor]:
    rows = [RenderedRow(example["input_ids"], example["loss_mask"]) for example in examples]
    return make_batch(model, rows, pad_token_id=pad_token_id)
