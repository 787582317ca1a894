"""Puts together what a method trains with: the adapter, fresh or gone on from, its head, its rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.base_model import LoadedBase
from adapters.errors import ConfigurationError
from adapters.methods import HELD_TO_A_REFERENCE
from adapters.registry import Registry
from training.config import TrainSettings
from training.lora import add_adapter
from training.methods import TrainingRun
from training.progress import StepListener
from training.reward_model import make_head, save_head
from training.rewards import RewardFunction, Scorer, function_scorer, load_reward_function, model_scorer
from training.rewards_file import is_function_name, public_reward
from training.start import StoredVersion, read_version

__all__ = ["PreparedRun", "load_function", "prepare_run"]


class _Listener(StepListener, Protocol):
    def on_stage(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run before its first step; `parent` is the digest of the version that it goes on from."""

    run: TrainingRun[Any]
    parent: str | None

    def save(self, folder: Path) -> None:
        """Write the adapter as it is, and its head if it has one."""
        self.run.model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])
        if self.run.head is not None:
            save_head(self.run.head, folder)


def load_function(settings: TrainSettings, *, is_job: bool) -> RewardFunction | None:
    """The reward function that the settings name, if they name one; before anything heavy is loaded.

    Raises:
        ConfigurationError: there is no such function; or a job names one: clients may not say which code runs.
    """
    if settings.reward is None or not is_function_name(settings.reward):
        return None
    if is_job:
        raise ConfigurationError(
            f"setting train.reward: a job's reward must be a version, found {settings.reward!r}: a function in a file "
            "is code, which only the command line runs"
        )
    return load_reward_function(settings.reward, Path.cwd())


def prepare_run(
    base: LoadedBase,
    rows: Sequence[Any],
    settings: TrainSettings,
    open_versions: Callable[[], AbstractContextManager[Registry]],
    function: RewardFunction | None,
    listener: _Listener,
) -> PreparedRun:
    """Read the versions that the settings name and put the adapter on the base model.

    The run's settings are those given, with rank, alpha, scaling and targets of the version that it goes on from.

    Raises:
        NotFoundError: no such version.
        ConfigurationError: a version of the wrong kind, or settings that don't fit the base model.
    """
    start, judge = _read_versions(base, settings, open_versions, has_function=function is not None)
    if start is not None:
        _check_start(start, settings)
        settings = _with_shape_of(start, settings)
        listener.on_stage(
            f"Going on from {start.label}: its rank {settings.rank}, alpha {settings.alpha:g} and targets "
            f"({', '.join(settings.targets)}) are kept"
        )
    if settings.method in HELD_TO_A_REFERENCE:
        held_to = start.label if start and settings.reference == "start" else "the bare base model"
        listener.on_stage(f"The reference is {held_to}")
    model = add_adapter(base, settings, start)
    head = make_head(base, settings.seed, start.head if start else None) if settings.method == "reward" else None
    score: Scorer | None = None
    if function is not None:
        score = function_scorer(function, str(public_reward(settings.reward)), base.tokenizer)
    elif judge is not None:
        score = model_scorer(model, base, judge, batch_size=settings.batch_size)
    run = TrainingRun(model, base, rows, settings, listener, head=head, score=score)
    return PreparedRun(run, start.digest if start else None)


def _read_versions(
    base: LoadedBase,
    settings: TrainSettings,
    open_versions: Callable[[], AbstractContextManager[Registry]],
    *,
    has_function: bool,
) -> tuple[StoredVersion | None, StoredVersion | None]:
    """The version to go on from, and the one that judges answers."""
    judge_name = None if has_function else settings.reward
    if settings.start_from is None and judge_name is None:
        return None, None
    with open_versions() as registry:
        start = read_version(registry, settings.start_from, base) if settings.start_from else None
        judge = read_version(registry, judge_name, base) if judge_name else None
    return start, judge


def _check_start(start: StoredVersion, settings: TrainSettings) -> None:
    if start.manifest.kind == "reward" and settings.method != "reward":
        raise ConfigurationError(
            f"setting train.start_from: {start.label} is a reward model; only method reward can go on from it, "
            f"found {settings.method}"
        )


def _with_shape_of(start: StoredVersion, settings: TrainSettings) -> TrainSettings:
    config = start.config
    return settings.model_copy(
        update={
            "rank": config.max_rank,
            "alpha": config.lora_alpha,
            "rslora": config.use_rslora,
            "targets": start.targets,
            "init": "default",
        }
    )
