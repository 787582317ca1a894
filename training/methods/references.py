"""What the preference methods share: batches of answers as TRL reads them, and the reference's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from adapters.chat_template import RenderedRow
from training.log_probs import eval_mode
from training.methods.run import TrainingRun
from training.precision import base_precision
from training.rendering import IGNORED_LABEL, collate

__all__ = ["AnswerBatch", "drop_copy", "reference_sums"]

_COPY = "ref"  # TRL's name for the copy of the adapter that it makes


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Padded rows and which of their tokens are the answer, each int64 `[batch, seq]`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    @classmethod
    def make(cls, rows: Sequence[RenderedRow], pad_token_id: int) -> AnswerBatch:
        """Pad rows on the right to one length."""
        batch = collate(rows, pad_token_id=pad_token_id)
        return cls(batch["input_ids"], batch["attention_mask"], (batch["labels"] != IGNORED_LABEL).long())

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under TRL's names for them, behind a prefix."""
        names = ("input_ids", "attention_mask", "completion_mask")
        return {f"{prefix}{name}": getattr(self, name) for name in names}


def reference_sums(
    trainer: Any, run: TrainingRun[Any], collator: Callable[[list[dict[str, int]]], dict[str, torch.Tensor]]
) -> torch.Tensor:
    """The reference's log-probabilities of the answers in every row, in the order of the rows, on the CPU.

    Computed by TRL in batches as training takes them, so that both sides of the comparison are rounded alike. Called
    before the first step: the copy of the adapter that TRL has made is the version that the run starts from; it is
    deleted here, and with it the memory that it takes.

    Returns:
        What the trainer's `compute_ref_log_probs` gives, a column each: float32 `[num_rows, 2]`.
    """
    found = []
    if run.settings.reference == "base":
        drop_copy(run.model)  # without one, TRL computes the reference with no adapter at all
    size = run.settings.batch_size
    with eval_mode(run.model), base_precision(run.base.model), disable_input_dtype_casting(run.model):
        for start in range(0, len(run.rows), size):
            numbers = range(start, min(start + size, len(run.rows)))
            batch = collator([{"row": number} for number in numbers])
            batch = {name: tensor.to(run.base.device) for name, tensor in batch.items()}
            sums = trainer.compute_ref_log_probs(run.model, batch)
            found.append(torch.stack([part.float().cpu() for part in sums], dim=1))
    drop_copy(run.model)
    return torch.cat(found)


def drop_copy(model: PeftModel) -> None:
    """Delete the copy of the adapter that TRL makes for a reference, if there is one."""
    if _COPY in model.peft_config:
        model.delete_adapter(_COPY)
