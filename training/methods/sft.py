"""Supervised fine-tuning with TRL, mended where it would be slow on a 4-bit base."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from adapters.chat_template import RenderedRow
from training.losses import token_sums
from training.methods.run import TrainingRun, common_arguments, run_trainer, trainer_folder
from training.progress import TrainedCounts
from training.rendering import collate

__all__ = ["train_sft"]


def train_sft(run: TrainingRun[RenderedRow]) -> TrainedCounts:
    """Train the adapter on what the assistant says in the rows."""
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in run.rows],
            "labels": [row.input_ids for row in run.rows],  # TRL builds none of its own; `_collate_rows` masks them
            "loss_mask": [row.loss_mask for row in run.rows],
        }
    )
    with trainer_folder(run) as folder:
        trainer = _MaskedLossTrainer(
            model=run.model,
            args=SFTConfig(**common_arguments(run, folder), max_length=None),
            train_dataset=dataset,
            processing_class=run.base.tokenizer,
            data_collator=partial(_collate_rows, pad_token_id=run.base.tokenizer.pad_token_id),
        )
        return run_trainer(trainer, run, take_accuracy=trainer.take_accuracy)


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


def _collate_rows(examples: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    rows = [RenderedRow(example["input_ids"], example["loss_mask"]) for example in examples]
    return collate(rows, pad_token_id=pad_token_id)
