"""One file a training method, and the table that finds it by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.methods.run import TrainingRun
from training.methods.sft import train_sft
from training.progress import TrainedCounts

__all__ = ["METHODS", "TrainingRun"]

METHODS: dict[str, Callable[[TrainingRun[Any]], TrainedCounts]] = {"sft": train_sft}
