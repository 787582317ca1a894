"""Trackers that are told of every step, if their owner names them: TensorBoard, trackio, Weights & Biases, MLflow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapters.errors import ConfigurationError

__all__ = ["prepare_trackers", "tracker_arguments"]

_PROJECT = "hotswap"


def prepare_trackers(names: Sequence[str], folder: Path) -> None:
    """Check that they are installed, and say where they keep their own, where nobody has said so yet.

    `folder` is the run's.

    Raises:
        ConfigurationError: one of them is not installed; says what to install.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigurationError(f"setting train.report_to: {name} is not installed; pip install {name}")
    if names:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        os.environ.setdefault("WANDB_PROJECT", _PROJECT)


def tracker_arguments(names: Sequence[str]) -> dict[str, Any]:
    """What a trainer is given. Nothing is uploaded but by the tracker itself, as its owner has set it up."""
    return {"report_to": list(names) or "none", "project": _PROJECT, "trackio_static_space_id": False}
