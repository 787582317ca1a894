"""The base model's loss on general text is measured once a home, and again where what is kept is of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.base_model import LoadedBase
from tests.support.methods import make_run, method_settings
from training.gate_evidence import gather_evidence
from training.general_text import general_loss_path, read_number, write_number
from training.methods import TrainingRun


def _measure(run: TrainingRun[Any]) -> tuple[float, float]:
    general = gather_evidence(run, None, candidate=None, present=None, prompts=()).general
    assert general is not None
    return general


def test_loss_of_the_base_is_taken_from_the_home_when_it_was_measured_there(
    tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """A fresh adapter changes nothing, so that both are the same; what is kept is believed."""
    run = make_run(tiny_base, method_settings(tmp_path, "sft"), tmp_path / "rows")
    adapted, base = _measure(run)
    known = general_loss_path(tmp_path, tiny_base)
    assert adapted == pytest.approx(base, rel=1e-6)
    assert read_number(known) == base

    write_number(known, 1.5)
    assert _measure(run)[1] == 1.5

    known.write_text('"damaged"')
    assert _measure(run)[1] == pytest.approx(base, rel=1e-6)


def test_number_is_given_up_when_it_can_not_be_kept(tmp_path: Path) -> None:
    """A full disk or a file in the way must not end a run."""
    (tmp_path / "measured").write_text("in the way")
    write_number(tmp_path / "measured" / "general.json", 1.0)
    assert read_number(tmp_path / "measured" / "general.json") is None
    assert read_number(tmp_path / "nothing.json") is None
