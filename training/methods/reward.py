"""A reward model: gives the better one of two answers the higher score.

Source: arXiv 2203.02155, equation 1 (Bradley-Terry).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from training.losses import Evaluation
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
from training.rendering import RenderedPair, collate
from training.reward_model import RewardModel, score_rows

__all__ = ["train_reward", "validate_reward"]

_LOGS = {"accuracy": "pair_accuracy", "margin": "reward_margin", "mean_reward": "mean_reward"}


def train_reward(run: TrainingRun[RenderedPair]) -> TrainedCounts:
    """Train the adapter and the run's head on pairs of answers."""
    model = _reward_model(run)

    def collate_pairs(examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        pairs = [run.rows[example["row"]] for example in examples]
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        batch = collate(sides, pad_token_id=run.base.tokenizer.pad_token_id)
        del batch["labels"]
        return batch

    with trainer_folder(run) as folder:
        with exact_weights(run.model):
            trainer = _ScoreTrainer(
                model=model,
                args=RewardConfig(**common_arguments(run, folder), max_length=None),
                train_dataset=Dataset.from_dict({"row": list(range(len(run.rows)))}),
                processing_class=run.base.tokenizer,
                data_collator=collate_pairs,
            )
        trainer.row_lengths = [row.num_tokens for row in run.rows]
        return run_trainer(trainer, run, read_step=pick_logs(_LOGS))


def validate_reward(run: TrainingRun[Any], rows: Sequence[RenderedPair]) -> Callable[[], Evaluation]:
    """What measures loss, margin and share of pairs in the right order."""
    model = _reward_model(run)
    sides = [row.chosen for row in rows] + [row.rejected for row in rows]

    def measure() -> Evaluation:
        rewards = score_rows(
            model, sides, batch_size=run.settings.batch_size, pad_token_id=run.base.tokenizer.pad_token_id
        )
        chosen, rejected = rewards.chunk(2)
        margins = chosen - rejected
        losses = -torch.nn.functional.logsigmoid(margins)
        extra = {"pair_accuracy": (margins > 0).float().mean().item(), "reward_margin": margins.mean().item()}
        return Evaluation.of_rows(losses, extra, scores=(margins.sign() + 1) / 2)

    return measure


class _ScoreTrainer(MethodTrainer, RewardTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer over rows that are tokenised, and a model of which only adapter and head are kept."""

    def _precision(self) -> Any:
        return nullcontext()  # the model chooses it itself, since the head is computed in float32

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load(Path(resume_from_checkpoint))


def _reward_model(run: TrainingRun[Any]) -> RewardModel:
    assert run.head is not None, "the worker gives a reward run its head"
    return RewardModel(run.model, run.head)
