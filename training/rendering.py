"""Turns checked rows into tokens with a loss mask, and batches into padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.chat_rows import MAX_PROBLEMS_SHOWN, ChatRow
from adapters.chat_template import RenderedRow, render_training_row
from adapters.errors import DataError, InvalidInputError
from training.formats import Dataset

__all__ = ["IGNORED_LABEL", "collate", "render_dataset"]

IGNORED_LABEL = -100


def render_dataset(tokenizer: Any, dataset: Dataset, *, max_length: int) -> list[RenderedRow]:
    """Tokenise every row.

    A row longer than `max_length` is an error, not cut: an answer without its end teaches the model not to stop.

    Raises:
        DataError: rows that are too long or that the chat template refuses, by file and line.
    """
    rendered: list[RenderedRow] = []
    problems: list[str] = []
    for line, row in ((numbered.line, numbered.row) for numbered in dataset.rows):
        where = f"{dataset.name}:{line}"
        if not isinstance(row, ChatRow):
            raise DataError([f"{where}: expected a chat row, found a {row.kind} row"])
        try:
            result = render_training_row(tokenizer, row.messages)
        except InvalidInputError as error:
            problems.append(f"{where}: {error}")
            continue
        if len(result.input_ids) > max_length:
            problems.append(f"{where}: {len(result.input_ids)} tokens, more than max_length {max_length}")
        rendered.append(result)
    if problems:
        raise DataError(problems[:MAX_PROBLEMS_SHOWN], num_more=max(0, len(problems) - MAX_PROBLEMS_SHOWN))
    return rendered


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
