"""The settings of a training run: `[train]` in hotswap.toml, `HOTSWAP_TRAIN_*`, or flags of `hotswap train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from adapters.errors import ConfigurationError
from adapters.expressions import search
from adapters.methods import HELD_TO_A_REFERENCE, METHOD_SETTINGS, SAMPLING_METHODS, Method
from adapters.settings import SettingsSection, split_names
from training.answer_format import check_json_schema

__all__ = ["METHOD_DEFAULTS", "Reference", "TrainSettings"]

Reference = Literal["base", "start"]
_ModuleName = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$", max_length=200)]
_Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=500)]
_Expression = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
_Schema = Annotated[str, StringConstraints(min_length=2, max_length=20_000)]

# Where a method wants another value than supervised fine-tuning; docs/training.md has the reasons and the sources.
METHOD_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "sft": {"learning_rate": 5e-4, "beta": 0.0},
    "dpo": {"learning_rate": 5e-5, "beta": 0.1},
    "kto": {"learning_rate": 5e-5, "beta": 0.1},
    "reward": {"learning_rate": 1e-4, "beta": 0.0},
    "rloo": {"learning_rate": 1e-5, "beta": 0.05},
    "grpo": {"learning_rate": 1e-5, "beta": 0.04},
}
_NEED_BETA = ("dpo", "kto")

_NEEDS_OTHER_BASE = (
    "it changes the base model's weights, and the engine serves one unchanged 4-bit base to all adapters"
)
_REFUSED_INITIALISATIONS = {
    name: f"{name} is not supported: {_NEEDS_OTHER_BASE}" for name in ("pissa", "olora", "corda", "milora")
}
_REFUSED_KEYS = ("dora", "use_dora")
_REFUSED_DORA = (
    "is not supported: DoRA rescales every output by a learned magnitude of base and update together, and the engine "
    "adds plain low-rank updates; rslora is served"
)


def _by_method(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda given: METHOD_DEFAULTS[given.get("method", "sft")][name]


class TrainSettings(SettingsSection):
    """One QLoRA run, by any method.

    The defaults suit a few hundred rows: rank 16 on every linear layer, and a learning rate about ten times what full
    fine-tuning would take, since only the small low-rank matrices move.
    """

    model_config = SettingsConfigDict(env_prefix="HOTSWAP_TRAIN_", extra="forbid", frozen=True)
    table: ClassVar[str | None] = "train"

    method: Method = Field(
        "sft", description="sft, dpo (pairs), kto (labels), reward (a reward model), rloo or grpo (by a reward)."
    )
    start_from: _Text | None = Field(
        None, description="A version to go on from (legal, legal@v2); its rank, alpha and targets are kept."
    )
    reference: Reference = Field(
        default_factory=lambda given: "start" if given.get("start_from") else "base",
        description="What dpo, kto, rloo and grpo hold the model to: the version it starts from, or the bare base.",
    )
    beta: float = Field(
        default_factory=_by_method("beta"), ge=0, le=100, description="How closely to the reference (dpo, kto, rl)."
    )
    reward: _Text | None = Field(
        None, description="Of rloo and grpo: a reward version (tone@v1), or a function (rewards.py:function)."
    )
    generations: int = Field(4, ge=2, le=64, description="Of rloo and grpo: answers sampled to each prompt.")
    max_answer_tokens: int = Field(128, ge=1, le=4096, description="Of rloo and grpo: longest sampled answer.")
    temperature: float = Field(1.0, gt=0, le=2, description="Of rloo and grpo: temperature of the sampled answers.")
    epochs: float = Field(3, gt=0, le=1000, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimiser steps; overrides epochs.")
    batch_size: int = Field(8, ge=1, le=1024, description="Rows per forward pass; of rloo and grpo, answers.")
    gradient_accumulation: int = Field(1, ge=1, le=1024, description="Forward passes per optimiser step.")
    learning_rate: float = Field(
        default_factory=_by_method("learning_rate"), gt=0, le=1, description="Peak learning rate."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes on behind the warm-up: down to zero, or not at all."
    )
    warmup_steps: int = Field(5, ge=0, le=1_000_000, description="Steps of rising learning rate, at most a quarter.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    rank: int = Field(16, ge=1, le=256, description="LoRA rank.")
    alpha: float = Field(32, gt=0, le=4096, description="LoRA alpha; the update is scaled by alpha / rank.")
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(rank) instead.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of lora_A.")
    targets: Annotated[tuple[_ModuleName, ...], NoDecode] = Field(
        (), max_length=200, description="Linear layers that get an adapter, by the end of their path; all by default."
    )
    init: Literal["default", "gaussian", "loftq"] = Field(
        "default", description="How lora_A and lora_B begin: default, gaussian, or loftq (from the error of 4 bits)."
    )
    neftune: float | None = Field(None, gt=0, le=100, description="Of sft: noise on embeddings, NEFTune's alpha.")
    max_length: int = Field(1024, ge=8, le=131_072, description="Longest row in tokens; longer ones are an error.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    use_liger_kernel: bool = Field(
        False,
        description="Liger's kernels for norms, rotary embeddings and MLPs; on a GPU, if liger-kernel is installed.",
    )
    report_to: Annotated[tuple[_Tracker, ...], NoDecode] = Field(
        (), max_length=4, description="Trackers that are told of every step, besides our own files; each if installed."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout.")
    validation_share: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="Without validation data: about this share of the training rows is held out to validate with.",
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Steps between two validations; without it, one at each checkpoint or epoch.",
    )
    patience: int | None = Field(
        None, ge=1, le=1000, description="Validations without a better loss after which training ends early."
    )
    sample_prompts: int = Field(
        2, ge=0, le=32, description="Prompts that are answered at each validation: the first of the validation rows."
    )
    sample_file: _Text | None = Field(None, description="A text file with a prompt a line, asked instead of those.")
    sample_tokens: int = Field(64, ge=1, le=4096, description="Longest sampled answer in tokens.")
    keep_prompts: bool = Field(
        True, description="Keep up to 300 training prompts with the version, in the database, for the router."
    )
    promote: Literal["always", "gate", "never"] = Field(
        "gate", description="When the alias moves to the new version: always, if it passes the gate, or never."
    )
    gate_margin: float = Field(
        0.01, ge=0, le=10, description="By how many nats a token the validation loss must be better, with confidence."
    )
    gate_confidence: float = Field(0.95, ge=0.5, le=0.999, description="Confidence of that, one-sided.")
    gate_forgetting: float = Field(
        1.0, ge=0, le=100, description="Highest rise of the loss on general text, in nats a token."
    )
    gate_samples: int = Field(8, ge=0, le=100, description="Answers that the gate reads; 0 reads none.")
    gate_sample_tokens: int = Field(256, ge=1, le=4096, description="Longest of them in tokens.")
    gate_degenerate: float = Field(
        0.25, ge=0, le=1, description="Highest share of them that may be empty, a loop or without end."
    )
    gate_format_regex: _Expression | None = Field(None, description="A regular expression that whole answers match.")
    gate_format_schema: _Schema | None = Field(None, description="A JSON schema, as JSON text, that answers follow.")
    gate_format_share: float = Field(0.9, ge=0, le=1, description="Lowest share of answers that keep to the format.")

    @classmethod
    def load(cls, home: Path, **flags: Any) -> Self:
        """Resolve the section; a flag that is None counts as not given.

        The environment and the configuration file are for runs by every method: what the run's own does not use of them
        has no effect.

        Raises:
            ConfigurationError: as of every section; or a flag that the method does not use.
        """
        settings = super().load(home, **flags)
        strays = settings._find_strays()
        for name in strays:
            if flags.get(name):  # zero asks for nothing
                methods = ", ".join(METHOD_SETTINGS[name])
                raise ConfigurationError(
                    f"setting train.{name}: method {settings.method} does not use it; it is for {methods}, "
                    f"found {flags[name]!r}"
                )
        return settings.model_copy(update=strays)

    def _find_strays(self) -> dict[str, Any]:
        """Settings that the method does not use and that are not the default, with the default."""
        known = self.model_dump()
        unused = [name for name, methods in METHOD_SETTINGS.items() if self.method not in methods]
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True, validated_data=known) for name in unused}
        return {name: default for name, default in defaults.items() if default != getattr(self, name)}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_reason(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in (key for key in _REFUSED_KEYS if key in given):
                raise ValueError(f"{key} {_REFUSED_DORA}")
        return given

    @field_validator("targets", "report_to", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return split_names(value)

    @field_validator("init", mode="before")
    @classmethod
    def _refuse_initialisations(cls, value: Any) -> Any:
        if reason := _REFUSED_INITIALISATIONS.get(str(value).lower()):
            raise ValueError(reason)
        return value

    @field_validator("gate_format_regex")
    @classmethod
    def _check_expression(cls, value: str | None) -> str | None:
        if value is not None:
            search(value, "")
        return value

    @field_validator("gate_format_schema")
    @classmethod
    def _check_schema(cls, value: str | None) -> str | None:
        if value is not None:
            check_json_schema(value)
        return value

    @model_validator(mode="after")
    def _check_method(self) -> TrainSettings:
        if self.method in _NEED_BETA and self.beta == 0:
            raise ValueError(f"beta must be above 0 for {self.method}: with 0 there is nothing to learn from")
        if self.reference == "start" and self.start_from is None and self.method in HELD_TO_A_REFERENCE:
            raise ValueError("reference start needs start_from, a version to start from; without one it is base")
        if self.method in SAMPLING_METHODS:
            self._check_reward()
        if self.method == "kto" and self.batch_size < 2:
            raise ValueError("kto compares the rows of a batch with one another: batch_size must be 2 or more, found 1")
        return self

    def check_validation(self, *, is_given: bool) -> None:
        """Refuse what asks for validation rows where there are none.

        Raises:
            ConfigurationError: patience, which would never run out.
        """
        if self.patience is not None and not is_given and self.validation_share is None:
            raise ConfigurationError(
                f"setting train.patience: {self.patience} validations without a better loss would end the run, but "
                "there is no validation file; give one or validation_share, or leave patience out"
            )

    def _check_reward(self) -> None:
        if self.reward is None:
            raise ValueError(f"{self.method} needs reward: a reward version (tone@v1) or a function (rewards.py:name)")
        answers = self.batch_size * self.gradient_accumulation
        if answers % self.generations:
            raise ValueError(
                f"a step takes batch_size * gradient_accumulation = {answers} answers, which must be a multiple of "
                f"generations = {self.generations}"
            )
        if self.max_answer_tokens >= self.max_length:
            raise ValueError(
                f"max_answer_tokens ({self.max_answer_tokens}) must be less than max_length ({self.max_length}), which "
                "prompt and answer share"
            )
