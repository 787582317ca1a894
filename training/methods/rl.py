"""Reinforcement learning on sampled answers: rloo (arXiv 2402.14740) and grpo (arXiv 2402.03300).

Both sample several answers to a prompt, and an answer is worth what it is above the others' average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import RepeatSampler

from adapters.chat_template import stop_token_ids
from training.length_order import grouped_order
from training.log_probs import eval_mode
from training.losses import Evaluation
from training.methods.references import drop_copy
from training.methods.run import (
    MethodTrainer,
    TrainingRun,
    common_arguments,
    exact_weights,
    pick_logs,
    run_trainer,
    trainer_folder,
)
from training.precision import base_precision
from training.progress import TrainedCounts
from training.prompts import RenderedPrompt

__all__ = ["MAX_VALIDATION_PROMPTS", "train_grpo", "train_rloo", "validate_rl"]

# Answers take long to write on a CPU; a validation must not take longer than the epoch behind it.
MAX_VALIDATION_PROMPTS = 32

_LOGS = {
    "reward": "mean_reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "cut_answers",
}


def train_rloo(run: TrainingRun[RenderedPrompt]) -> TrainedCounts:
    """Train the adapter on answers that it samples, against the average of the other answers to a prompt."""
    return _train(run, _RlooTrainer, RLOOConfig)


def train_grpo(run: TrainingRun[RenderedPrompt]) -> TrainedCounts:
    """Train the adapter on answers that it samples, against the average and spread of all answers to a prompt."""
    return _train(run, _GrpoTrainer, GRPOConfig)


def validate_rl(run: TrainingRun[RenderedPrompt], prompts: Sequence[RenderedPrompt]) -> Callable[[], Evaluation]:
    """What measures the mean reward of the likeliest answers to the first prompts; the loss is that, sign turned."""
    prompts = prompts[:MAX_VALIDATION_PROMPTS]

    def measure() -> Evaluation:
        assert run.score is not None, "the worker gives an rl run its rewards"
        answers = [answer_greedily(run, prompt) for prompt in prompts]
        rewards = torch.tensor(run.score(prompts, answers), dtype=torch.float64)
        return Evaluation.of_rows(-rewards, {"mean_reward": rewards.mean().item()}, scores=rewards)

    return measure


@torch.no_grad()
def answer_greedily(run: TrainingRun[Any], prompt: RenderedPrompt) -> list[int]:
    """The tokens of the likeliest answer, its end among them, at most `max_answer_tokens`."""
    base = run.base
    ids = torch.tensor([prompt.input_ids], device=base.device)
    with eval_mode(run.model), base_precision(base.model):
        output = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=run.settings.max_answer_tokens,
                do_sample=False,
                pad_token_id=base.tokenizer.pad_token_id,
                eos_token_id=_ends(run),
                disable_compile=True,
            ),
        )
    answer: list[int] = output[0, ids.shape[1] :].tolist()
    return answer


def _train(run: TrainingRun[RenderedPrompt], trainer_class: Any, config_class: Any) -> TrainedCounts:
    settings = run.settings
    with trainer_folder(run) as folder:
        arguments = common_arguments(run, folder, rows_per_example=settings.generations)
        with exact_weights(run.model):
            trainer = trainer_class(
                model=run.model,
                args=config_class(
                    **arguments,
                    beta=settings.beta,
                    num_generations=settings.generations,
                    max_completion_length=settings.max_answer_tokens,
                    temperature=settings.temperature,
                ),
                train_dataset=Dataset.from_dict(_columns(run.rows)),
                processing_class=run.base.tokenizer,
                reward_funcs=_reward_function(run),
            )
        if settings.reference == "base":
            drop_copy(run.model)  # without it, TRL takes the model without adapter for the reference
        ends = _ends(run)
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = (
            ends
        )
        trainer.prompt_ids = {_text(number): prompt.input_ids for number, prompt in enumerate(run.rows)}
        try:
            return run_trainer(trainer, run, read_step=pick_logs(_LOGS))
        finally:
            drop_copy(run.model)


def _ends(run: TrainingRun[Any]) -> list[int]:
    """The tokens that end an answer: those at which the server stops."""
    return sorted(stop_token_ids(run.base.tokenizer, run.base.model.generation_config.eos_token_id))


class _EpochSampler(RepeatSampler):  # type: ignore[misc]  # TRL ships no types
    """TRL's order of prompts, but those of one step about equally long, and drawn from the seed and the epoch's number.

    TRL's own draws each epoch's order behind the last one's: a run that goes on from a checkpoint in a later epoch
    would see the orders from the first on again.
    """

    lengths: Sequence[int]

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, also by a run that begins in its middle."""
        self.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        """As TRL's: each prompt of a step as often as answers are sampled to it, each step as often as it is used."""
        order = grouped_order(self.lengths, self.batch_size, self.generator)
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            step = order[start : start + self.batch_size]
            yield from [number for number in step for _ in range(self.mini_repeat_count)] * self.repeat_count


class _AnsweringTrainer(MethodTrainer):
    """Mixed into both: prompts are the run's, by their number; answers are sampled in the base model's precision."""

    counts_inputs = False  # TRL counts prompts and answers where it samples them
    prompt_ids: dict[str, list[int]]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def _get_train_sampler(self, dataset: Any = None) -> _EpochSampler:
        given = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        sampler = _EpochSampler(**{name: getattr(given, name) for name in names})
        sampler.lengths = [len(ids) for ids in self.prompt_ids.values()]
        return sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._precision():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self._precision():  # the log-probabilities of sampled answers
            return super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]


class _RlooTrainer(_AnsweringTrainer, RLOOTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer over prompts that are tokenised."""


class _GrpoTrainer(_AnsweringTrainer, GRPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's trainer over prompts that are tokenised."""


def _columns(prompts: Sequence[RenderedPrompt]) -> dict[str, list[Any]]:
    numbers = range(len(prompts))
    return {"prompt": [_text(number) for number in numbers], "row": list(numbers)}


def _text(number: int) -> str:
    return f"prompt {number}"


def _reward_function(run: TrainingRun[RenderedPrompt]) -> Callable[..., list[float]]:
    assert run.score is not None, "the worker gives an rl run its rewards"
    score = run.score

    def reward(row: list[int], completion_ids: list[list[int]], **others: Any) -> list[float]:
        return score([run.rows[number] for number in row], completion_ids)

    return reward
