"""Measures what the adapter in training is compared with, on its validation rows: the bare base, and other versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from training.losses import Evaluation
from training.methods import TrainingRun
from training.start import StoredVersion, install_version, lora_config

__all__ = ["Yardstick"]

_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A method's own measure on fixed rows, put to other adapters on the one base model that is loaded.

    `before` is what was measured before the first step.
    """

    run: TrainingRun[Any]
    measure: Callable[[], Evaluation]
    before: Evaluation

    def measure_base(self) -> Evaluation:
        """The base model alone; a reward model's head then gives every answer the same."""
        settings = self.run.settings
        if settings.start_from is None and settings.init != "loftq" and self.run.head is None:
            return self.before  # a fresh adapter changes nothing
        with _other_adapter(self.run, None):
            return self.measure()

    def measure_version(self, version: StoredVersion) -> Evaluation:
        """The base model with a published version.

        Raises:
            ConfigurationError: its tensors don't fit.
        """
        with _other_adapter(self.run, version):
            return self.measure()


@contextmanager
def _other_adapter(run: TrainingRun[Any], version: StoredVersion | None) -> Iterator[None]:
    """Compute with another adapter and head, or with none, and then as before.

    The base alone is computed with an adapter that changes nothing: with adapters switched off, a reward model that
    judges answers would be off, too.
    """
    trained = run.model.active_adapter
    fresh = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")  # its lora_B is zero
    config = lora_config(version) if version else fresh
    run.model.add_adapter(_OTHER, config)
    try:
        if version is not None:
            install_version(run.model, version, _OTHER)
        run.model.set_adapter(_OTHER, inference_mode=True)
        with ExitStack() as stack:
            if run.head is not None:
                stack.enter_context(_other_head(run.head, version.head if version else None))
            yield
    finally:
        run.model.set_adapter(trained)
        run.model.delete_adapter(_OTHER)


@contextmanager
def _other_head(head: torch.nn.Linear, weight: torch.Tensor | None) -> Iterator[None]:
    kept = head.weight.detach().clone()
    head.weight.data.copy_(torch.zeros_like(kept) if weight is None else weight)
    try:
        yield
    finally:
        head.weight.data.copy_(kept)
