"""The settings of a training run: bounds, precedence and what an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adapters.errors import ConfigurationError
from adapters.methods import HELD_TO_A_REFERENCE, METHOD_SETTINGS, ROW_KINDS, SAMPLING_METHODS, Method
from training.config import METHOD_DEFAULTS, TrainSettings

FIELDS = sorted(set(TrainSettings.model_fields) - {"home"})


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(f"HOTSWAP_TRAIN_{name.upper()}", raising=False)


def test_train_settings_hold_their_defaults_when_nothing_is_given(tmp_path: Path) -> None:
    """Without a file, flags or environment every field has its declared default."""
    settings = TrainSettings.load(tmp_path)

    by_method = {"beta", "learning_rate", "reference"}
    declared = {name: TrainSettings.model_fields[name].default for name in FIELDS if name not in by_method}
    assert len(FIELDS) > 10
    assert declared == settings.model_dump(exclude={"home", *by_method})
    assert tmp_path == settings.home


def test_train_settings_read_their_table_when_the_file_has_one(tmp_path: Path) -> None:
    """The [train] table is read and other tables are left to their owners."""
    (tmp_path / "hotswap.toml").write_text('base = "other"\n[train]\nrank = 4\nepochs = 0.5\n[serve]\nrank = 9\n')

    settings = TrainSettings.load(tmp_path)

    assert (settings.rank, settings.epochs) == (4, 0.5)


def test_train_settings_take_the_flag_first_when_all_sources_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag beats the environment, which beats the file; a flag of None counts as not given."""
    (tmp_path / "hotswap.toml").write_text("[train]\nrank = 1\nseed = 1\nbatch_size = 1\n")
    monkeypatch.setenv("HOTSWAP_TRAIN_RANK", "2")
    monkeypatch.setenv("HOTSWAP_TRAIN_SEED", "2")

    settings = TrainSettings.load(tmp_path, rank=3, seed=None)

    assert (settings.rank, settings.seed, settings.batch_size) == (3, 2, 1)


def test_train_settings_keep_a_zero_when_zero_is_legal(tmp_path: Path) -> None:
    """Zero is a value, not an absence."""
    settings = TrainSettings.load(tmp_path, warmup_steps=0, dropout=0.0, seed=0)

    assert (settings.warmup_steps, settings.dropout, settings.seed) == (0, 0.0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "ppo"),
        ("reference", "other"),
        ("beta", -0.1),
        ("beta", 101),
        ("generations", 1),
        ("generations", 65),
        ("max_answer_tokens", 0),
        ("max_answer_tokens", 4097),
        ("temperature", 0),
        ("temperature", 2.1),
        ("schedule", "zigzag"),
        ("neftune", 0),
        ("neftune", 101),
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", 1001),
        ("epochs", float("inf")),
        ("epochs", float("nan")),
        ("max_steps", 0),
        ("max_steps", 10_000_001),
        ("batch_size", 0),
        ("batch_size", 1025),
        ("batch_size", 2.5),
        ("gradient_accumulation", 0),
        ("gradient_accumulation", 1025),
        ("learning_rate", 0),
        ("learning_rate", 1.01),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("warmup_steps", 1_000_001),
        ("weight_decay", -0.1),
        ("weight_decay", 1.1),
        ("rank", 0),
        ("rank", 257),
        ("alpha", 0),
        ("alpha", 4097),
        ("dropout", -0.1),
        ("dropout", 1),
        ("max_length", 7),
        ("max_length", 131_073),
        ("gradient_checkpointing", "perhaps"),
        ("seed", -1),
        ("seed", 2**32),
        ("eval_steps", 0),
        ("validation_share", 0),
        ("validation_share", 0.51),
        ("patience", 0),
        ("patience", 1001),
        ("sample_prompts", -1),
        ("sample_prompts", 33),
        ("sample_tokens", 0),
        ("sample_tokens", 4097),
        ("promote", "sometimes"),
        ("gate_margin", -0.1),
        ("gate_margin", 10.1),
        ("gate_margin", float("nan")),
        ("gate_confidence", 0.4),
        ("gate_confidence", 1),
        ("gate_forgetting", -1),
        ("gate_forgetting", 101),
        ("gate_samples", -1),
        ("gate_samples", 101),
        ("gate_sample_tokens", 0),
        ("gate_sample_tokens", 4097),
        ("gate_degenerate", 1.1),
        ("gate_format_share", -0.1),
    ],
)
def test_train_settings_name_the_key_when_a_value_is_out_of_bounds(tmp_path: Path, name: str, value: Any) -> None:
    """No numeric setting is unbounded, and the error names the setting as the file spells it."""
    with pytest.raises(ConfigurationError, match=rf"^setting train\.{name}: .*found {value!r}$"):
        TrainSettings.load(tmp_path, **{name: value})


def test_train_settings_name_the_key_when_it_is_unknown(tmp_path: Path) -> None:
    """A misspelt key in the file is an error, not a setting without effect."""
    (tmp_path / "hotswap.toml").write_text("[train]\nlerning_rate = 0.1\n")

    with pytest.raises(ConfigurationError, match=r"^setting train\.lerning_rate: "):
        TrainSettings.load(tmp_path)


def test_train_settings_name_the_key_when_the_environment_is_out_of_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is checked as strictly as a flag."""
    monkeypatch.setenv("HOTSWAP_TRAIN_RANK", "many")

    with pytest.raises(ConfigurationError, match=r"^setting train\.rank: .*found 'many'$"):
        TrainSettings.load(tmp_path)


def test_train_settings_refuse_a_change_when_they_are_loaded(tmp_path: Path) -> None:
    """Settings are recorded in the manifest, so that nothing may change them during a run."""
    settings = TrainSettings.load(tmp_path)

    with pytest.raises(ValidationError, match="frozen"):
        settings.rank = 3  # type: ignore[misc]


@pytest.mark.parametrize("method", sorted(METHOD_DEFAULTS))
def test_train_settings_take_their_defaults_from_the_method_when_none_are_given(tmp_path: Path, method: Any) -> None:
    """Learning rate and beta are the method's own; what is given stays."""
    reward = "tone" if method in ("rloo", "grpo") else None

    settings = TrainSettings.load(tmp_path, method=method, reward=reward)
    beta = 2.0 if method in HELD_TO_A_REFERENCE else None
    given = TrainSettings.load(tmp_path, method=method, reward=reward, learning_rate=0.5, beta=beta)

    assert METHOD_DEFAULTS[method] == {"learning_rate": settings.learning_rate, "beta": settings.beta}
    assert (0.5, beta or 0.0) == (given.learning_rate, given.beta)


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ({}, "base"),
        ({"start_from": "legal"}, "start"),
        ({"start_from": "legal", "reference": "base"}, "base"),
    ],
)
def test_reference_is_the_start_when_there_is_one_and_nothing_is_said(
    tmp_path: Path, given: dict[str, Any], reference: str
) -> None:
    """From a version, the model is held to that version unless the bare base is asked for."""
    assert reference == TrainSettings.load(tmp_path, method="dpo", **given).reference


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "grpo"}, "grpo needs reward: a reward version"),
        ({"method": "kto", "beta": 0}, "beta must be above 0 for kto"),
        ({"method": "dpo", "reference": "start"}, "reference start needs start_from"),
        ({"method": "kto", "batch_size": 1}, "batch_size must be 2 or more, found 1"),
        (
            {"method": "grpo", "reward": "tone", "max_answer_tokens": 512, "max_length": 512},
            r"max_answer_tokens \(512\) must be less than max_length \(512\)",
        ),
        ({"method": "rloo", "reward": "tone", "generations": 3}, "= 8 answers, which must be a multiple .* = 3"),
        ({"init": "pissa"}, "init: pissa is not supported: it changes the base model's weights"),
        ({"init": "OLoRA"}, "init: olora is not supported"),
        ({"use_dora": True}, "use_dora is not supported: DoRA rescales"),
        ({"dora": False}, "dora is not supported"),
        ({"targets": ["q_proj;"]}, r"targets.0: .*found 'q_proj;'"),
        ({"report_to": ["paper"]}, "report_to.0: .*found 'paper'"),
    ],
    ids=str,
)
def test_train_settings_say_why_when_they_do_not_go_together(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    """A combination without sense, and an option that could not be served, are refused with the reason."""
    with pytest.raises(ConfigurationError, match=message):
        TrainSettings.load(tmp_path, **given)


def test_lists_come_from_the_environment_when_it_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text with commas or spaces; a name counts once."""
    monkeypatch.setenv("HOTSWAP_TRAIN_TARGETS", "q_proj, v_proj q_proj")

    assert TrainSettings.load(tmp_path).targets == ("q_proj", "v_proj")


# Settings that belong to some methods only.

_OTHERS: dict[str, Any] = {
    "neftune": 5.0,
    "dropout": 0.1,
    "beta": 0.3,
    "reference": "start",
    "reward": "tone",
    "generations": 8,
    "max_answer_tokens": 64,
    "temperature": 0.5,
    "use_liger_kernel": True,
    "sample_prompts": 3,
    "sample_file": "prompts.txt",
    "sample_tokens": 3,
    "gate_forgetting": 0.1,
    "gate_samples": 2,
    "gate_sample_tokens": 9,
    "gate_degenerate": 0.1,
    "gate_format_regex": "[a-z]+",
    "gate_format_schema": "{}",
    "gate_format_share": 0.5,
}
_MISPLACED = [
    (method, name) for name, methods in METHOD_SETTINGS.items() for method in ROW_KINDS if method not in methods
]


def _of(method: Method, **given: Any) -> dict[str, Any]:
    """Settings with what the method can't be without."""
    return {"method": method, "reward": "tone" if method in SAMPLING_METHODS else None} | given


def test_settings_of_methods_are_known_when_they_are_compared_with_the_settings() -> None:
    """The table names settings that exist, each with a value here that is not the default."""
    assert set(_OTHERS) == set(METHOD_SETTINGS) <= set(TrainSettings.model_fields)
    assert len(_MISPLACED) >= 40


@pytest.mark.parametrize(("method", "name"), _MISPLACED)
def test_setting_is_refused_when_the_method_does_not_use_it(tmp_path: Path, method: Method, name: str) -> None:
    """A flag or a line of YAML without effect would be believed to have one; the message says whose it is."""
    users = ", ".join(METHOD_SETTINGS[name])

    with pytest.raises(
        ConfigurationError, match=rf"train\.{name}: method {method} does not use it; it is for {users},"
    ):
        TrainSettings.load(tmp_path, **_of(method, **{name: _OTHERS[name]}))


@pytest.mark.parametrize(("method", "name"), _MISPLACED)
def test_setting_has_no_effect_when_the_file_holds_it_for_other_methods(
    tmp_path: Path, method: Method, name: str
) -> None:
    """The server's own settings are for jobs by every method; one that does not use them is recorded without them."""
    plain = TrainSettings.load(tmp_path, **_of(method))
    value = json.dumps(_OTHERS[name])  # which of texts, numbers and truth is TOML, too
    (tmp_path / "hotswap.toml").write_text(f"[train]\n{name} = {value}\n")

    assert plain == TrainSettings.load(tmp_path, **_of(method))


@pytest.mark.parametrize(("method", "name"), _MISPLACED)
def test_setting_is_taken_when_it_is_the_default_of_a_method_that_does_not_use_it(
    tmp_path: Path, method: Method, name: str
) -> None:
    """It says what is so anyway."""
    plain = TrainSettings.load(tmp_path, **_of(method))

    assert plain == TrainSettings.load(tmp_path, **_of(method, **{name: getattr(plain, name)}))
