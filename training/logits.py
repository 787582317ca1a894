"""What some families do to logits behind the output head: scale them (Granite, Cohere), cap them (Gemma 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LogitRule", "read_logit_rule"]


@dataclass(frozen=True, slots=True)
class LogitRule:
    """Logits become `cap * tanh(scale * logits / cap)`; without a cap, `scale * logits`."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, of what its head gives."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of what `apply` gave, by what it was given; `logits` are what it gave."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


def read_logit_rule(model: Any) -> LogitRule:
    """The rule of a causal LM, by the names that transformers' configs have for it."""
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = getattr(config, "logit_scale", None) or 1.0
    return LogitRule(float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))
