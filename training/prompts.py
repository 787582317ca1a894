"""The prompts that rloo and grpo sample answers to: chat rows up to their last answer, which stays as a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters.chat_messages import Message, Tool
from adapters.chat_rows import ChatRow
from adapters.chat_template import render_prompt
from adapters.errors import InvalidInputError
from adapters.row_places import PlacedProblem, data_error, group_problems
from training.formats import Dataset

__all__ = ["RenderedPrompt", "find_prompt_problems", "render_prompts"]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation up to where the assistant is to speak, its tokens, and what the assistant said in the data."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    reference: str
    input_ids: list[int]


def render_prompts(tokenizer: Any, dataset: Dataset, *, max_length: int) -> list[RenderedPrompt]:
    """Tokenise the prompts of chat rows.

    Args:
        tokenizer: The base model's.
        dataset: Chat rows.
        max_length: Most tokens of a prompt; with the longest answer it must fit the setting of that name.

    Raises:
        DataError: rows that are too long or that the chat template refuses, by file and line.
    """
    prompts, problems = _render_all(tokenizer, dataset, max_length)
    if problems:
        raise data_error(group_problems(problems, dataset.name))
    return prompts


def find_prompt_problems(tokenizer: Any, dataset: Dataset, *, max_length: int) -> list[PlacedProblem]:
    """What `render_prompts` would raise, in full, each with its place."""
    return _render_all(tokenizer, dataset, max_length)[1]


def _render_all(tokenizer: Any, dataset: Dataset, max_length: int) -> tuple[list[RenderedPrompt], list[PlacedProblem]]:
    prompts: list[RenderedPrompt] = []
    problems: list[PlacedProblem] = []
    for numbered in dataset.rows:
        try:
            prompt = _render(tokenizer, numbered.row)
        except InvalidInputError as error:
            problems.append(PlacedProblem(numbered.place, str(error)))
            continue
        prompts.append(prompt)
        if len(prompt.input_ids) > max_length:
            text = f"tokens in the prompt; at most {max_length} leave room for max_answer_tokens within max_length"
            problems.append(PlacedProblem(numbered.place, text, len(prompt.input_ids)))
    return prompts, problems


def _render(tokenizer: Any, row: Any) -> RenderedPrompt:
    assert isinstance(row, ChatRow), "the kind was checked when the data was read"
    messages, last = row.messages[:-1], row.messages[-1]
    ids = render_prompt(tokenizer, messages, row.tools)
    return RenderedPrompt(messages, row.tools, str(last["content"]), ids)
