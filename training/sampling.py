"""Asks the model in training for answers, greedily, and says which of them are no answers at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row
from adapters.chat_template import render_prompt, stop_token_ids
from adapters.errors import DataError, InvalidInputError
from training.precision import base_precision

__all__ = [
    "LONGER_THAN_REFERENCE",
    "Flaw",
    "Sample",
    "SamplePrompt",
    "find_flaw",
    "is_loop",
    "make_prompts",
    "read_prompts",
    "sample_answers",
]

LONGER_THAN_REFERENCE = 3  # times its row's own answer: such an answer is too long

Flaw = Literal["empty", "loop", "too long"]

_MIN_REPEATS = 4
_MIN_LOOP_TOKENS = 24
_MAX_PERIOD = 64
_PLAIN_LOOP = 3  # so many times what makes a loop ends an answer
_LOOP_CHECK_TOKENS = 8
_TEXT_PROMPT_TOKENS = 24
_MAX_PROMPTS = 100


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """What the model is asked: text for people, tokens, and how many tokens the row's own answer has, if it has one."""

    text: str
    input_ids: tuple[int, ...]
    reference_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy answer. `has_ended` is False where it was cut at the limit."""

    prompt: SamplePrompt
    text: str
    tokens: tuple[int, ...]
    has_ended: bool


def make_prompts(tokenizer: Any, rows: Sequence[Row], *, limit: int) -> list[SamplePrompt]:
    """The prompts of the first rows, as the server would render them; of plain text its beginning."""
    return [_make_prompt(tokenizer, row) for row in rows[:limit]]


def read_prompts(tokenizer: Any, path: Path) -> list[SamplePrompt]:
    """Prompts of one's own: a text file with one a line; blank lines are skipped.

    Raises:
        DataError: the file can't be read, holds none, or one that the chat template refuses.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([f"sample_file {path}: can't be read: {error}"], param="sample_file") from None
    if not 1 <= len(lines) <= _MAX_PROMPTS:
        problem = f"sample_file {path}: expected 1 to {_MAX_PROMPTS} prompts, one a line, found {len(lines)}"
        raise DataError([problem], param="sample_file")
    try:
        ids = [render_prompt(tokenizer, [{"role": "user", "content": line}]) for line in lines]
    except InvalidInputError as error:
        raise DataError([f"sample_file {path}: {error}"], param="sample_file") from None
    return [SamplePrompt(line, tuple(found)) for line, found in zip(lines, ids, strict=True)]


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SamplePrompt],
    *,
    max_tokens: int,
    batch_size: int,
    ends_flawed: bool = False,
) -> list[Sample]:
    """The likeliest answer to each prompt, in eval mode; no random number is drawn.

    With `ends_flawed` no answer is written further once its flaw is plain (`_Enough`), which nobody is to read.
    """
    was_training = model.training
    model.eval()
    samples: list[Sample] = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            samples += _sample_batch(model, tokenizer, batch, max_tokens, ends_flawed=ends_flawed)
    finally:
        model.train(was_training)
    return samples


def find_flaw(sample: Sample) -> Flaw | None:
    """What makes an answer degenerate: nothing said, the same said over and over, or no end in sight.

    Too long is an answer that was cut at more than three times the tokens of the row's own; without an own one, length
    is not judged.
    """
    if not sample.text.strip():
        return "empty"
    if is_loop(sample.tokens):
        return "loop"
    reference = sample.prompt.reference_tokens
    if reference is not None and not sample.has_ended and len(sample.tokens) > LONGER_THAN_REFERENCE * reference:
        return "too long"
    return None


def is_loop(tokens: Sequence[int], *, times: int = 1) -> bool:
    """Whether the answer ends in one sequence of up to 64 tokens, four times or more, over 24 tokens at least.

    With `times`, so many times as often and as long.
    """
    for period in range(1, _MAX_PERIOD + 1):
        length = times * max(_MIN_LOOP_TOKENS, _MIN_REPEATS * period)
        if len(tokens) < length:
            break
        tail = tokens[-length:]
        if all(tail[index] == tail[index - period] for index in range(period, length)):
            return True
    return False


def _make_prompt(tokenizer: Any, row: Row) -> SamplePrompt:
    match row:
        case ChatRow():
            last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
            messages, answer = row.messages[:last], row.messages[last].get("content")
        case PreferenceRow():
            messages, answer = row.prompt, row.chosen.get("content")
        case LabelledRow():
            messages, answer = row.prompt, row.completion.get("content")
        case _:
            ids = tokenizer(row.text).input_ids[:_TEXT_PROMPT_TOKENS]
            return SamplePrompt(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids))
    ids = render_prompt(tokenizer, messages, row.tools)
    reference = len(tokenizer.encode(answer, add_special_tokens=False)) if answer else None
    return SamplePrompt(str(messages[-1].get("content") or "") if messages else "", tuple(ids), reference)


def _sample_batch(
    model: Any, tokenizer: Any, prompts: Sequence[SamplePrompt], max_tokens: int, *, ends_flawed: bool
) -> list[Sample]:
    width = max(len(prompt.input_ids) for prompt in prompts)
    # On the left, so that every answer begins in the same column.
    padded = [[tokenizer.pad_token_id] * (width - len(p.input_ids)) + list(p.input_ids) for p in prompts]
    mask = [[0] * (width - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts]
    stops = stop_token_ids(tokenizer, model.generation_config.eos_token_id)
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )
    enough = _Enough(prompts, width)
    with base_precision(model):
        made = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([enough] if ends_flawed else []),
        )
    answers = [row[:length] for row, length in zip(made[:, width:].tolist(), enough.lengths, strict=True)]
    return [_to_sample(tokenizer, prompt, row, stops) for prompt, row in zip(prompts, answers, strict=True)]


class _Enough(StoppingCriteria):
    """Ends answers whose flaw is plain, so that a batch does not wait for them: far too long, or a loop for long.

    Whatever they would have gone on with, the flaw would be the same; only a loop that is left after three times what
    makes one would have been none. `lengths` are the tokens after which each was ended, None while it was not.
    """

    def __init__(self, prompts: Sequence[SamplePrompt], width: int) -> None:
        self._limits = [LONGER_THAN_REFERENCE * p.reference_tokens + 1 if p.reference_tokens else None for p in prompts]
        self._width = width
        self.lengths: list[int | None] = [None] * len(prompts)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        """Which of the answers are at their end, `[batch]`."""
        num_tokens = input_ids.shape[1] - self._width
        for index, limit in enumerate(self._limits):
            if self.lengths[index] is None and self._is_enough(input_ids[index], num_tokens, limit):
                self.lengths[index] = num_tokens
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

    def _is_enough(self, row: torch.Tensor, num_tokens: int, limit: int | None) -> bool:
        if limit is not None and num_tokens >= limit:
            return True
        return num_tokens % _LOOP_CHECK_TOKENS == 0 and is_loop(row[self._width :].tolist(), times=_PLAIN_LOOP)


def _to_sample(tokenizer: Any, prompt: SamplePrompt, made: list[int], stops: frozenset[int]) -> Sample:
    end = next((index for index, token in enumerate(made) if token in stops), None)
    tokens = tuple(made if end is None else made[:end])
    return Sample(prompt, tokenizer.decode(tokens, skip_special_tokens=True), tokens, end is not None)
