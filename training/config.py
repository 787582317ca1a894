"""The settings of a training run: `[train]` in hotswap.toml, `HOTSWAP_TRAIN_*`, or flags of `hotswap train`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from adapters.settings import SettingsSection

__all__ = ["TrainSettings"]


class TrainSettings(SettingsSection):
    """QLoRA supervised fine-tuning.

    The defaults suit a few hundred rows: rank 16 on every linear layer, and a learning rate about ten times what full
    fine-tuning would take, since only the small low-rank matrices move.
    """

    model_config = SettingsConfigDict(env_prefix="HOTSWAP_TRAIN_", extra="forbid", frozen=True)
    table: ClassVar[str | None] = "train"

    epochs: float = Field(3, gt=0, le=1000, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimiser steps; overrides epochs.")
    batch_size: int = Field(8, ge=1, le=1024, description="Rows per forward pass.")
    gradient_accumulation: int = Field(1, ge=1, le=1024, description="Forward passes per optimiser step.")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate (cosine schedule).")
    warmup_steps: int = Field(5, ge=0, le=1_000_000, description="Steps of rising learning rate, at most a quarter.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    rank: int = Field(16, ge=1, le=256, description="LoRA rank.")
    alpha: float = Field(32, gt=0, le=4096, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of lora_A.")
    max_length: int = Field(1024, ge=8, le=131_072, description="Longest row in tokens; longer ones are an error.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout.")
