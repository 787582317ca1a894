"""Direct preference optimisation: of two answers to a prompt, the better one becomes likelier than the other.

Source: arXiv 2305.18290, equation 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

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
from training.rendering import RenderedPair

__all__ = ["train_dpo", "validate_dpo"]

_LOGS = {
    "rewards/accuracies": "pair_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}


def train_dpo(run: TrainingRun[RenderedPair]) -> TrainedCounts:
    """Train the adapter on pairs of answers.

    The reference's log-probabilities are computed once, before the first step: no second model or adapter is held.
    """
    collator = _PairCollator(run)
    with trainer_folder(run) as folder:
        arguments = common_arguments(run, folder)
        with exact_weights(run.model):
            trainer = _PairTrainer(
                model=run.model,
                args=DPOConfig(**arguments, beta=run.settings.beta, max_length=None),
                train_dataset=Dataset.from_dict({"row": list(range(len(run.rows)))}),
                processing_class=run.base.tokenizer,
                data_collator=collator,
            )
        trainer.row_lengths = [row.num_tokens for row in run.rows]
        collator.reference = reference_sums(trainer, run, collator)
        trainer.precompute_ref_logps = True  # they come with each batch
        return run_trainer(trainer, run, read_step=pick_logs(_LOGS))


def validate_dpo(run: TrainingRun[Any], rows: Sequence[RenderedPair]) -> Callable[[], Evaluation]:
    """What measures loss, margin and share of pairs in the right order; made before the run's first step."""
    sides = [row.chosen for row in rows] + [row.rejected for row in rows]
    options = {"batch_size": run.settings.batch_size, "pad_token_id": run.base.tokenizer.pad_token_id}
    with as_reference(run.model, run.settings.reference):
        expected = answer_log_probs(run.model, sides, **options)

    def measure() -> Evaluation:
        chosen, rejected = (answer_log_probs(run.model, sides, **options) - expected).chunk(2)
        margins = run.settings.beta * (chosen - rejected)
        losses = -torch.nn.functional.logsigmoid(margins)
        extra = {"pair_accuracy": (margins > 0).float().mean().item(), "reward_margin": margins.mean().item()}
        return Evaluation.of_rows(losses, extra)

    return measure


class _PairTrainer(MethodTrainer, DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer over rows that are tokenised."""


class _PairCollator:
    """Puts pairs into the batch that TRL's trainer reads: all chosen rows, then all rejected ones."""

    def __init__(self, run: TrainingRun[RenderedPair]) -> None:
        self._rows = run.rows
        self._pad_token_id = run.base.tokenizer.pad_token_id
        self.reference: torch.Tensor | None = None  # [num_rows, 2], chosen and rejected

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        numbers = [example["row"] for example in examples]
        pairs = [self._rows[number] for number in numbers]
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        batch = AnswerBatch.make(sides, self._pad_token_id).named("")
        if self.reference is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self.reference[numbers].unbind(1)
        return batch
