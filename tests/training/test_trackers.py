"""Trackers: none is needed, each is told only if it is named, and what is missing is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trl import SFTConfig

from adapters.errors import ConfigurationError
from training.trackers import prepare_trackers, tracker_arguments

_VARIABLES = ("TENSORBOARD_LOGGING_DIR", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_tracker_is_refused_with_its_package_when_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("training.trackers.find_spec", lambda package: None)

    with pytest.raises(ConfigurationError, match=rf"train\.report_to: {name} is not installed; pip install {name}"):
        prepare_trackers([name], tmp_path)


def test_trackers_keep_their_own_where_the_run_does_when_nobody_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's files would else lie in a folder that is gone after the run."""
    monkeypatch.setattr("training.trackers.find_spec", lambda package: package)
    monkeypatch.setenv("WANDB_PROJECT", "mine")

    prepare_trackers(["tensorboard", "wandb"], tmp_path)

    assert [os.environ[name] for name in _VARIABLES] == [str(tmp_path / "tensorboard"), "hotswap", "mine"]


def test_nobody_is_told_when_no_tracker_is_named(tmp_path: Path) -> None:
    """Nothing is set, nothing is checked, and the trainer reports to none."""
    prepare_trackers([], tmp_path)

    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **tracker_arguments([]))
    assert config.report_to == []
    assert [name for name in _VARIABLES if name in os.environ] == []
