"""The prompts that rloo and grpo sample answers to: chat rows up to their last answer, which stays as a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters.chat_messages import Message, Tool
from adapters.chat_rows import MAX_PROBLEMS_SHOWN, ChatRow
from adapters.chat_template import render_prompt
from adapters.errors import DataError, InvalidInputError
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
        shown = [f"{dataset.name}:{line}: {problem}" for line, problem in problems[:MAX_PROBLEMS_SHOWN]]
        raise DataError(shown, num_more=len(problems) - len(shown))
    return prompts


def find_prompt_problems(tokenizer: Any, dataset: Dataset, *, max_length: int) -> list[tuple[int, str]]:
    """What `render_prompts` would raise, in full, each with its line."""
    return _render_all(tokenizer, dataset, max_length)[1]


def _render_all(
    tokenizer: Any, dataset: Dataset, max_length: int
) -> tuple[list[RenderedPrompt], list[tuple[int, str]]]:
    prompts: list[RenderedPrompt] = []
    problems: list[tuple[int, str]] = []
    for numbered in dataset.rows:
        try:
            prompts.append(_render(tokenizer, numbered.row, max_length))
        except InvalidInputError as error:
            problems.append((numbered.line, str(error)))
    return prompts, problems


def _render(tokenizer: Any, row: Any, max_length: int) -> RenderedPrompt:
    assert isinstance(row, ChatRow), "the kind was checked when the data was read"
    messages, last = row.messages[:-1], row.messages[-1]
    ids = render_prompt(tokenizer, messages, row.tools)
    if len(ids) > max_length:
        raise InvalidInputError(
            f"the prompt has {len(ids)} tokens; with an answer of max_answer_tokens it would exceed max_length: "
            f"at most {max_length} are left for it"
        )
    return RenderedPrompt(messages, row.tools, str(last["content"]), ids)
