"""Turns checked rows into tokens with a loss mask, and batches into padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.chat_messages import Message
from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row, TextRow
from adapters.chat_template import RenderedRow, render_plain_text, render_training_row, render_training_rows
from adapters.errors import InvalidInputError
from adapters.row_places import PlacedProblem, RowPlace, data_error, group_problems
from training.formats import Dataset

__all__ = [
    "IGNORED_LABEL",
    "Rendered",
    "RenderedLabel",
    "RenderedPair",
    "collate",
    "render_dataset",
    "render_row",
    "token_rows",
]

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """Two answers to one prompt: both rows begin with the same tokens, and carry loss on the answer alone."""

    chosen: RenderedRow
    rejected: RenderedRow

    @property
    def num_tokens(self) -> int:
        """Of the longer one, to which a batch pads the other."""
        return max(len(self.chosen.input_ids), len(self.rejected.input_ids))


@dataclass(frozen=True, slots=True)
class RenderedLabel:
    """An answer to a prompt, which carries the loss, and whether it is a good one."""

    row: RenderedRow
    label: bool


Rendered = RenderedRow | RenderedPair | RenderedLabel


def render_dataset(tokenizer: Any, dataset: Dataset, *, max_length: int) -> list[Any]:
    """Tokenise every row: chat and text give `RenderedRow`, preference `RenderedPair`, labelled `RenderedLabel`.

    A chat row may become several, see `render_training_rows`. A row longer than `max_length` is an error, not cut: an
    answer without its end teaches the model not to stop.

    Raises:
        DataError: rows that are too long or that the chat template refuses, by file and line.
    """
    rendered: list[Rendered] = []
    problems: list[PlacedProblem] = []
    for numbered in dataset.rows:
        try:
            results = render_row(tokenizer, numbered.row)
        except InvalidInputError as error:
            problems.append(PlacedProblem(numbered.place, str(error)))
            continue
        rows = [row for result in results for row in token_rows(result)]
        if problem := find_excess(rows, numbered.place, max_length):
            problems.append(problem)
        rendered += results
    if problems:
        raise data_error(group_problems(problems, dataset.name))
    return rendered


def render_row(tokenizer: Any, row: Row) -> Sequence[Rendered]:
    """Tokenise one row of any kind; only a chat row may give more than one.

    Raises:
        InvalidInputError: the chat template refuses it.
    """
    match row:
        case ChatRow():
            return render_training_rows(tokenizer, row.messages, row.tools)
        case TextRow():
            return [render_plain_text(tokenizer, row.text)]
        case PreferenceRow():
            chosen, rejected = (_render_answer(tokenizer, row, answer) for answer in (row.chosen, row.rejected))
            return [RenderedPair(chosen, rejected)]
        case LabelledRow():
            return [RenderedLabel(_render_answer(tokenizer, row, row.completion), row.label)]


def token_rows(rendered: Rendered) -> tuple[RenderedRow, ...]:
    """The rows of tokens that something rendered is made of."""
    match rendered:
        case RenderedRow():
            return (rendered,)
        case RenderedPair():
            return (rendered.chosen, rendered.rejected)
        case RenderedLabel():
            return (rendered.row,)


def find_excess(rows: Sequence[RenderedRow], place: RowPlace, max_length: int) -> PlacedProblem | None:
    """What is wrong with the row at a place, if the longest of its rows of tokens is too long."""
    longest = max(len(row.input_ids) for row in rows)
    return PlacedProblem(place, f"tokens, more than max_length {max_length}", longest) if longest > max_length else None


def _render_answer(tokenizer: Any, row: PreferenceRow | LabelledRow, answer: Message) -> RenderedRow:
    return render_training_row(tokenizer, (*row.prompt, answer), row.tools, only_last=True)


def collate(rows: Sequence[RenderedRow], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one length.

    Padding is masked by position, not by token id, so that a pad token equal to EOS hides no real EOS.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 `[batch, seq]`; labels are IGNORED_LABEL without loss.
    """
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids = torch.tensor(row.input_ids)
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        labels[index, :length] = ids.where(torch.tensor(row.loss_mask), IGNORED_LABEL)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
