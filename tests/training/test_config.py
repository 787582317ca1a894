"""The settings of a training run: bounds, precedence and what an error names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adapters.errors import ConfigurationError
from training.config import TrainSettings

FIELDS = sorted(set(TrainSettings.model_fields) - {"home"})


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(f"HOTSWAP_TRAIN_{name.upper()}", raising=False)


def test_train_settings_hold_their_defaults_when_nothing_is_given(tmp_path: Path) -> None:
    """Without a file, flags or environment every field has its declared default."""
    settings = TrainSettings.load(tmp_path)

    assert len(FIELDS) > 10
    assert {name: TrainSettings.model_fields[name].default for name in FIELDS} == settings.model_dump(exclude={"home"})
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
