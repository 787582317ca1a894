"""Reward functions of the user's: found by file and name, and their mistakes told in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigurationError
from tests.support.tiny import make_tokenizer
from training.config import TrainSettings
from training.preparation import load_function
from training.prompts import RenderedPrompt
from training.rewards import function_scorer, load_reward_function
from training.rewards_file import anchor_function, is_function_name, public_reward

_GOOD = "def length(completions, prompts, references):\n    return [len(text) for text in completions]\n"


def _write(folder: Path, content: str) -> Path:
    path = folder / "rewards.py"
    path.write_text(content)
    return path


def test_function_gets_answers_prompts_and_references_when_it_is_called(tmp_path: Path) -> None:
    """As text, as messages and as text; the end of an answer is not part of it."""
    _write(
        tmp_path,
        "def seen(completions, prompts, references):\n"
        "    assert completions == ['Yes', 'No'], completions\n"
        "    assert prompts == [[{'role': 'user', 'content': 'Q'}]] * 2\n"
        "    assert references == ['Perhaps'] * 2\n"
        "    return [1, 2.5]\n",
    )
    tokenizer = make_tokenizer()
    function = load_reward_function("rewards.py:seen", tmp_path)
    prompt = RenderedPrompt(({"role": "user", "content": "Q"},), (), "Perhaps", [1])
    answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("Yes", "No")]

    assert function_scorer(function, "rewards.py:seen", tokenizer)([prompt] * 2, answers) == [1.0, 2.5]


def test_function_is_had_when_its_file_holds_dataclasses(tmp_path: Path) -> None:
    """With annotations as text, a dataclass looks for its module among those that are imported."""
    _write(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Weight:\n    per_letter: float = 2.0\n\n"
        "def weighed(completions, prompts, references):\n"
        "    return [len(text) * Weight().per_letter for text in completions]\n",
    )

    assert load_reward_function("rewards.py:weighed", tmp_path)(["abc"], [[]], [""]) == [6.0]


@pytest.mark.parametrize(
    "values",
    [
        "[1, 0.5]",
        "[np.float32(1), np.float16(0.5)]",
        "np.array([1, 0.5])",
        "torch.tensor([1, 0.5], requires_grad=True)",
        "[True, Fraction(1, 2)]",
        "[np.array([1]), torch.tensor([0.5], dtype=torch.bfloat16)]",
    ],
)
def test_rewards_are_taken_when_they_are_numbers_of_any_kind(tmp_path: Path, values: str) -> None:
    """Python's, NumPy's and torch's, alone or in one array."""
    imports = "from fractions import Fraction\nimport numpy as np\nimport torch\n"
    _write(tmp_path, f"{imports}def found(completions, prompts, references):\n    return {values}\n")
    score = function_scorer(load_reward_function("rewards.py:found", tmp_path), "rewards.py:found", make_tokenizer())

    rewards = score([RenderedPrompt((), (), "", [1])] * 2, [[1], [2]])

    assert rewards == [1.0, 0.5]
    assert [type(reward) for reward in rewards] == [float, float]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "rewards.py:length", r"there is no file .*rewards\.py"),
        (_GOOD, "rewards.py:width", r"rewards\.py has no function 'width'; it has length"),
        ("length = 3", "rewards.py:length", r"has no function 'length'; it has none"),
        (
            "import nowhere_to_be_found",
            "rewards.py:x",
            r"can't be imported: ModuleNotFoundError: .*rewards\.py, line 1",
        ),
        ("def x(:", "rewards.py:x", r"can't be imported: SyntaxError: .* \(rewards\.py, line 1\)$"),
        ("import json\njson.loads('{')", "rewards.py:x", r"JSONDecodeError: .* \(rewards\.py, line 2\)$"),
    ],
)
def test_function_is_refused_with_the_reason_when_it_can_not_be_had(
    tmp_path: Path, content: str | None, name: str, message: str
) -> None:
    """What is missing is named, and so is what is there."""
    if content is not None:
        _write(tmp_path, content)

    with pytest.raises(ConfigurationError, match=rf"^setting train\.reward: .*{message}"):
        load_reward_function(name, tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1]", r"gave 1 rewards for 2 answers"),
        ("return [1, 'much']", r"gave 'much' for answer 2; expected a finite number"),
        ("return [float('nan'), 1]", r"gave nan for answer 1"),
        ("return [None, 1]", r"gave None for answer 1"),
        ("return [10**400, 1]", r"gave 1000"),
        ("import torch\n    return [1, torch.ones(2)]", r"gave tensor\(\[1., 1.\]\) for answer 2"),
        ("return 7", r"failed: TypeError: [^(]*$"),
        ("import json\n    return json.loads('{')", r"failed: JSONDecodeError: .* \(rewards\.py, line 3\)$"),
        ("raise ValueError('no idea')", r"failed: ValueError: no idea \(rewards\.py, line 2\)"),
    ],
)
def test_function_is_blamed_in_words_when_it_gives_no_rewards(tmp_path: Path, body: str, message: str) -> None:
    """Its name, what it did, and where."""
    _write(tmp_path, f"def bad(completions, prompts, references):\n    {body}\n")
    score = function_scorer(load_reward_function("rewards.py:bad", tmp_path), "rewards.py:bad", make_tokenizer())
    prompt = RenderedPrompt((), (), "", [1])

    with pytest.raises(ConfigurationError, match=rf"^setting train\.reward: rewards\.py:bad {message}"):
        score([prompt, prompt], [[1], [2]])


def test_function_is_not_run_when_a_job_names_it(tmp_path: Path) -> None:
    """Clients don't choose which code the server's machine runs."""
    path = _write(tmp_path, "raise SystemExit('run')")
    settings = TrainSettings.load(tmp_path, method="grpo", reward=f"{path}:x")

    with pytest.raises(ConfigurationError, match="a job's reward must be a version"):
        load_function(settings, is_job=True)


@pytest.mark.parametrize(
    ("name", "anchored", "public"),
    [
        ("tone@v1", "tone@v1", "tone@v1"),
        ("rewards.py:polite", "/data/rewards.py:polite", "rewards.py:polite"),
        ("/else/rewards.py:polite", "/else/rewards.py:polite", "rewards.py:polite"),
    ],
)
def test_name_of_a_function_tells_no_folder_when_it_is_recorded(name: str, anchored: str, public: Any) -> None:
    """Relative files are looked for beside the run's file; a manifest names the file alone."""
    assert (anchored, public) == (anchor_function(name, Path("/data")), public_reward(anchored))
    assert is_function_name(name) == name.endswith("polite")
