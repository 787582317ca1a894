"""Liger's kernels: refused in words where there are none, and given to the trainer where there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base_model import LoadedBase
from adapters.errors import ConfigurationError
from adapters.settings import CoreSettings
from tests.support.methods import make_run, method_settings
from training.config import TrainSettings
from training.liger import check_liger
from training.methods.run import common_arguments


def _settings(tmp_path: Path) -> tuple[TrainSettings, CoreSettings]:
    return TrainSettings.load(tmp_path, use_liger_kernel=True), CoreSettings.load(tmp_path, device="cpu")


def test_liger_is_refused_when_there_is_no_gpu(tmp_path: Path) -> None:
    """It would fail in the first step otherwise."""
    with pytest.raises(
        ConfigurationError, match=r"train\.use_liger_kernel: .* on a GPU alone, and the device is cpu; leave"
    ):
        check_liger(*_settings(tmp_path))


def test_liger_is_refused_when_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is only said to be there; what to install is named."""
    monkeypatch.setattr("training.liger.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("training.liger.find_spec", lambda package: None)
    with pytest.raises(
        ConfigurationError, match=r"train\.use_liger_kernel: .*; pip install liger-kernel, or leave it out"
    ):
        check_liger(*_settings(tmp_path))


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_trainer_is_told_of_liger_when_it_is_asked_for(
    tmp_path: Path, tiny_base: LoadedBase, is_asked_for: bool
) -> None:
    """And of nothing when it is not, so that nothing is checked then."""
    changes: dict[str, Any] = {"use_liger_kernel": is_asked_for}
    run = make_run(tiny_base, method_settings(tmp_path, "sft", **changes), tmp_path)
    assert is_asked_for == common_arguments(run, tmp_path)["use_liger_kernel"]
