"""How much worse a run's model has become at text that has nothing to do with its domain."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from training.general_text import general_loss_path, read_number, render_general_text, write_number
from training.losses import evaluate
from training.methods import TrainingRun

__all__ = ["Forgetting"]

_BATCH = 32  # beginnings of 32 tokens: large, since each batch of a 4-bit base unpacks all its weights


class Forgetting:
    """The loss on general text in nats a token: with the run's adapter as it is now, and of the base model."""

    def __init__(self, run: TrainingRun[Any]) -> None:
        self._run = run
        self._rows = render_general_text(run.base.tokenizer)

    @cached_property
    def base_loss(self) -> float:
        """The base model's, measured once a home."""
        known = general_loss_path(self._run.settings.home, self._run.base)
        if (loss := read_number(known)) is None:
            with self._run.model.disable_adapter():
                loss = self.measure()
            write_number(known, loss)
        return loss

    def measure(self) -> float:
        """The adapter's, now."""
        base = self._run.base
        return evaluate(base.model, self._rows, batch_size=_BATCH, pad_token_id=base.tokenizer.pad_token_id).loss

    def rise(self) -> float:
        """By how much the adapter's is higher than the base model's."""
        return self.measure() - self.base_loss
