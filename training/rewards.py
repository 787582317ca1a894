"""Where the rewards of rloo and grpo come from: a function in a file of the user's, or a reward model."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from adapters.errors import ConfigurationError
from training.prompts import RenderedPrompt
from training.reward_model import RewardModel, make_head, score_rows
from training.start import StoredVersion, install_version, lora_config

__all__ = [
    "RewardFunction",
    "Scorer",
    "function_scorer",
    "load_reward_function",
    "model_scorer",
    "score_texts",
]

# completions, prompts, references -> one number each
RewardFunction = Callable[[list[str], list[list[dict[str, Any]]], list[str]], Sequence[float]]
# The prompts of a step and the tokens of the answers to them -> one reward each.
Scorer = Callable[[Sequence[RenderedPrompt], Sequence[list[int]]], list[float]]

_REWARD_ADAPTER = "reward"
_SETTING = "setting train.reward"


def load_reward_function(name: str, folder: Path, *, setting: str = _SETTING) -> RewardFunction:
    """Import `file.py:function`; a relative file is looked for in `folder`. This runs the file's code.

    Args:
        name: The file and its function.
        folder: Where a relative file is looked for.
        setting: What errors call the place where the name was given.

    Raises:
        ConfigurationError: no such file or function, or the file fails; says which and why.
    """
    file_name, _, function_name = name.rpartition(":")
    path = (folder / file_name).absolute()
    if not path.is_file():
        raise ConfigurationError(f"{setting}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"hotswap_reward_{path.stem}", path)
    assert spec is not None, "its name ends in .py"
    assert spec.loader is not None, "its name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does: dataclasses and pickle look for a class's module there
    try:
        with _explained(f"{setting}: {path.name} can't be imported", module.__file__):
            spec.loader.exec_module(module)
    except ConfigurationError:
        del sys.modules[spec.name]
        raise
    function = getattr(module, function_name, None)
    if not callable(function):
        names = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"))
        raise ConfigurationError(f"{setting}: {path.name} has no function {function_name!r}; it has {names or 'none'}")
    return function  # type: ignore[no-any-return]


def function_scorer(function: RewardFunction, name: str, tokenizer: Any) -> Scorer:
    """Scores answers by a function of the user's, whose mistakes are told in words."""

    def score(prompts: Sequence[RenderedPrompt], answers: Sequence[list[int]]) -> list[float]:
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        conversations = [[dict(message) for message in prompt.messages] for prompt in prompts]
        return score_texts(function, name, texts, conversations, [prompt.reference for prompt in prompts])

    return score


def score_texts(
    function: RewardFunction,
    name: str,
    answers: list[str],
    prompts: list[list[dict[str, Any]]],
    references: list[str],
    *,
    setting: str = _SETTING,
) -> list[float]:
    """One finite number for each answer by a function of the user's; `name` and `setting` are for errors.

    Raises:
        ConfigurationError: the function fails, or gives something else; says where.
    """
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    with _explained(f"{setting}: {name} failed", file):
        rewards = list(function(answers, prompts, references))
    return _check_rewards(rewards, f"{setting}: {name}", len(answers))


def model_scorer(model: PeftModel, base: LoadedBase, version: StoredVersion, *, batch_size: int) -> Scorer:
    """Scores answers by a reward version, whose adapter is put beside the one that is trained.

    Raises:
        ConfigurationError: the version is no reward model.
    """
    if version.head is None:
        raise ConfigurationError(
            f"setting train.reward: {version.label} is not a reward model; train one with method reward"
        )
    model.add_adapter(_REWARD_ADAPTER, lora_config(version))
    install_version(model, version, _REWARD_ADAPTER)
    judge = RewardModel(model, make_head(base, 0, version.head))
    options = {"batch_size": batch_size, "pad_token_id": base.tokenizer.pad_token_id}

    def score(prompts: Sequence[RenderedPrompt], answers: Sequence[list[int]]) -> list[float]:
        rows = [
            RenderedRow(prompt.input_ids + answer, [False] * len(prompt.input_ids) + [True] * len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        with _active(model, _REWARD_ADAPTER):
            return score_rows(judge, rows, **options).tolist()

    return score


@contextmanager
def _active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Compute with another adapter; what is trained stays the one that was."""
    previous = model.active_adapter
    model.set_adapter(adapter_name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(previous)


@contextmanager
def _explained(what: str, file: str | None) -> Iterator[None]:
    """Tell in words what the user's code in `file` did wrong, and where."""
    try:
        yield
    except Exception as error:
        # The user's code may raise anything.
        problem = f"{type(error).__name__}: {error}{_place_of(error, file)}"
        raise ConfigurationError(f"{what}: {problem}") from error


def _place_of(error: Exception, file: str | None) -> str:
    """Of the way to an error, the last line in the user's file: what helps, also where a library raised it.

    Empty where nothing of the user's ran: a syntax error says itself where it is.
    """
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    lines = [frame for frame in foreign if frame.filename == file] or foreign
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def _check_rewards(rewards: list[Any], name: str, num_answers: int) -> list[float]:
    if len(rewards) != num_answers:
        raise ConfigurationError(f"{name} gave {len(rewards)} rewards for {num_answers} answers; expected one each")
    numbers = [_to_number(reward) for reward in rewards]
    for index, (reward, number) in enumerate(zip(rewards, numbers, strict=True)):
        if not math.isfinite(number):
            raise ConfigurationError(f"{name} gave {reward!r:.80} for answer {index + 1}; expected a finite number")
    return numbers


def _to_number(reward: Any) -> float:
    """A number of Python's, NumPy's or torch's; NaN for anything else."""
    try:
        if callable(item := getattr(reward, "item", None)):
            reward = item()  # raises where there is more than one
        return float(reward) if isinstance(reward, Real) else math.nan
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return math.nan
