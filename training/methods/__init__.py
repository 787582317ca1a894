"""One file a training method, and the tables that find what belongs to a method by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapters.methods import SAMPLING_METHODS
from training.config import TrainSettings
from training.formats import Dataset
from training.kinds import check_kind, check_labels, check_prompts
from training.losses import Evaluation
from training.methods.dpo import train_dpo, validate_dpo
from training.methods.kto import train_kto, validate_kto
from training.methods.reward import train_reward, validate_reward
from training.methods.rl import train_grpo, train_rloo, validate_rl
from training.methods.run import TrainingRun
from training.methods.sft import train_sft, validate_sft
from training.progress import TrainedCounts
from training.prompts import render_prompts
from training.rendering import render_dataset

__all__ = ["METHODS", "VALIDATORS", "TrainingRun", "check_trainable", "render_rows"]

METHODS: Mapping[str, Callable[[TrainingRun[Any]], TrainedCounts]] = {
    "sft": train_sft,
    "dpo": train_dpo,
    "kto": train_kto,
    "reward": train_reward,
    "rloo": train_rloo,
    "grpo": train_grpo,
}
# Each takes the run before its first step, which is when the reference is at hand, and the validation rows.
VALIDATORS: Mapping[str, Callable[[TrainingRun[Any], Sequence[Any]], Callable[[], Evaluation]]] = {
    "sft": validate_sft,
    "dpo": validate_dpo,
    "kto": validate_kto,
    "reward": validate_reward,
    "rloo": validate_rl,
    "grpo": validate_rl,
}


def render_rows(tokenizer: Any, dataset: Dataset, settings: TrainSettings) -> Sequence[Any]:
    """Tokenise rows as the settings' method takes them.

    Raises:
        DataError: rows of another kind, rows that are too long or that the chat template refuses.
    """
    check_kind(dataset, settings.method)
    if settings.method in SAMPLING_METHODS:
        return render_prompts(tokenizer, dataset, max_length=settings.max_length - settings.max_answer_tokens)
    return render_dataset(tokenizer, dataset, max_length=settings.max_length)


def check_trainable(rows: Sequence[Any], name: str, settings: TrainSettings) -> None:
    """Refuse training rows from which the method could learn nothing; `name` is what messages call the file.

    Raises:
        DataError: kto's rows all have one label; rloo's or grpo's are too few for a step.
    """
    if settings.method == "kto":
        check_labels([row.label for row in rows], name)
    if settings.method in SAMPLING_METHODS:
        check_prompts(len(rows), name, settings)
