"""Kahneman-Tversky optimisation: answers that were labelled good or bad, one by one, without pairs.

Source: arXiv 2402.01306, equations 7 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from adapters.chat_template import RenderedRow
from training.length_order import grouped_order
from training.log_probs import answer_log_probs, as_reference
from training.losses import Evaluation
from training.methods.references import AnswerBatch, reference_sums
from training.methods.run import (
    MethodTrainer,
    TrainingRun,
    common_arguments,
    exact_weights,
    pick_logs,
    run_trainer,
    trainer_folder,
)
from training.progress import TrainedCounts
from training.rendering import RenderedLabel

__all__ = ["label_weights", "mismatched_rows", "train_kto", "validate_kto"]

_LOGS = {
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "kl": "kl",
}


def train_kto(run: TrainingRun[RenderedLabel]) -> TrainedCounts:
    """Train the adapter on labelled answers.

    TRL takes the rows in one fixed order, since the divergence from the reference is estimated from the mismatched rows
    of each batch: they are shuffled here, once, by the seed, into batches of about one length. The last batch is filled
    up from the first, since a batch of few rows estimates badly.
    """
    settings = run.settings
    lengths = [len(row.row.input_ids) for row in run.rows]
    order = grouped_order(lengths, settings.batch_size, torch.Generator().manual_seed(settings.seed))
    num_batches = math.ceil(len(order) / settings.batch_size)
    filled = islice(cycle(order), num_batches * settings.batch_size)
    run = replace(run, rows=[run.rows[number] for number in filled])
    collator = _LabelCollator(run)
    desirable, undesirable = label_weights([row.label for row in run.rows])
    with trainer_folder(run) as folder:
        arguments = common_arguments(run, folder)
        with exact_weights(run.model):
            trainer = _LabelTrainer(
                model=run.model,
                args=KTOConfig(
                    **arguments,
                    beta=settings.beta,
                    max_length=None,
                    desirable_weight=desirable,
                    undesirable_weight=undesirable,
                ),
                train_dataset=Dataset.from_dict({"row": list(range(len(run.rows)))}),
                processing_class=run.base.tokenizer,
                data_collator=collator,
            )
        collator.reference = reference_sums(trainer, run, collator)
        trainer.precompute_ref_logps = True  # they come with each batch
        return run_trainer(trainer, run, read_step=pick_logs(_LOGS))


def validate_kto(run: TrainingRun[Any], rows: Sequence[RenderedLabel]) -> Callable[[], Evaluation]:
    """What measures the loss and the share of rows on their label's side; made before the run's first step."""
    answers = [row.row for row in rows]
    sides = answers + mismatched_rows(answers, max_length=run.settings.max_length)
    options = {"batch_size": run.settings.batch_size, "pad_token_id": run.base.tokenizer.pad_token_id}
    with as_reference(run.model, run.settings.reference):
        expected = answer_log_probs(run.model, sides, **options)
    is_good = torch.tensor([row.label for row in rows])

    def measure() -> Evaluation:
        ratios, mismatched = (answer_log_probs(run.model, sides, **options) - expected).chunk(2)
        gains = run.settings.beta * (ratios - mismatched.mean().clamp(min=0))
        losses = 1 - torch.sigmoid(torch.where(is_good, gains, -gains))
        accuracy = ((gains > 0) == is_good).float().mean().item()
        return Evaluation.of_rows(losses, {"label_accuracy": accuracy})

    return measure


def label_weights(labels: Sequence[bool]) -> tuple[float, float]:
    """Weights of good and bad rows that make up for unequal numbers: both labels weigh the same in all.

    Source: arXiv 2402.01306, equation 8, at the lower end of its range.
    """
    num_good = sum(labels)
    num_bad = len(labels) - num_good
    return max(1.0, num_bad / num_good), max(1.0, num_good / num_bad)


def mismatched_rows(rows: Sequence[RenderedRow], *, max_length: int) -> list[RenderedRow]:
    """Each row's prompt with the answer of the row before it, cut to `max_length`; the first gets the last's."""
    answers = [_split(row)[1] for row in rows]
    mismatched = []
    for row, answer in zip(rows, [answers[-1], *answers[:-1]], strict=True):
        prompt = _split(row)[0]
        mask = [False] * len(prompt) + [True] * len(answer)
        mismatched.append(RenderedRow((prompt + answer)[:max_length], mask[:max_length]))
    return mismatched


class _LabelTrainer(MethodTrainer, KTOTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer over rows that are tokenised."""


class _LabelCollator:
    """Puts labelled rows into the batch that TRL's trainer reads, and beside each its mismatched row."""

    def __init__(self, run: TrainingRun[RenderedLabel]) -> None:
        self._rows = run.rows
        self._mismatched: list[RenderedRow] = []
        for start in range(0, len(run.rows), run.settings.batch_size):
            batch = [row.row for row in run.rows[start : start + run.settings.batch_size]]
            self._mismatched += mismatched_rows(batch, max_length=run.settings.max_length)
        self._pad_token_id = run.base.tokenizer.pad_token_id
        self.reference: torch.Tensor | None = None  # [num_rows, 2], of the row and of its mismatched row

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        numbers = [example["row"] for example in examples]
        rows = [self._rows[number] for number in numbers]
        batch = AnswerBatch.make([row.row for row in rows], self._pad_token_id).named("")
        batch |= AnswerBatch.make([self._mismatched[number] for number in numbers], self._pad_token_id).named("KL_")
        batch["label"] = torch.tensor([row.label for row in rows])
        if self.reference is not None:
            batch["ref_logps"], batch["ref_KL_logps"] = self.reference[numbers].unbind(1)
        return batch


def _split(row: RenderedRow) -> tuple[list[int], list[int]]:
    """The tokens in front of the answer, and the answer."""
    begin = row.loss_mask.index(True)
    return row.input_ids[:begin], row.input_ids[begin:]
