"""A job gives way while the engine works, computes its share all the same, and the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.base_model import LoadedBase
from adapters.errors import ConfigurationError
from adapters.pulse import EnginePulse
from training.config import TrainSettings
from training.giving_way import SHARE_VARIABLE, Gate, install_gate, share_from_environment
from training.lora import add_adapter


class World:
    """A clock that sleeping moves on, and an engine that works until a given time."""

    def __init__(self, folder: Path, *, busy_until: float = float("inf")) -> None:
        self.now = 0.5
        self.pulse = EnginePulse(folder / "pulse", clock=lambda: self.now)
        self._busy_until = busy_until
        self.go_on(0)

    def go_on(self, seconds: float) -> None:
        """Time passes, and the engine works if it does."""
        self.now += seconds
        if self.now < self._busy_until:
            self.pulse.beat()
        else:
            self.pulse.rest()

    def gate(self, share: float, *, is_ending: Callable[[], bool] = lambda: False) -> Gate:
        """A gate of this world."""
        return Gate(self.pulse, share, is_ending=is_ending, clock=lambda: self.now, sleep=self.go_on)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_gate_leaves_the_job_its_share_when_the_engine_works_on(tmp_path: Path, share: float) -> None:
    """Of all the time, within the length of a nap, the job computes as much as it may."""
    world = World(tmp_path)
    gate = world.gate(share)
    for _ in range(50):
        world.go_on(0.1)
        gate.pass_through()
    computed = 50 * 0.1
    assert computed / (computed + gate.waited_s) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_gate_opens_when_the_engine_comes_to_rest(tmp_path: Path, share: float) -> None:
    """With no share at all the job waits for the whole of the answers, and not longer."""
    world = World(tmp_path, busy_until=3.0)
    gate = world.gate(share)
    world.go_on(0.4)
    gate.pass_through()
    assert gate.waited_s == pytest.approx(2.1 if share == 0 else 1.2, abs=0.02)


def test_gate_opens_for_good_when_the_job_is_told_to_end(tmp_path: Path) -> None:
    """A step that is waited for is not held up, at no further layer; it is asked once a second, not at every nap."""
    world = World(tmp_path)
    asked: list[float] = []

    def is_ending() -> bool:
        asked.append(world.now)
        return world.now >= 4

    gate = world.gate(0.0, is_ending=is_ending)
    for _ in range(3):
        world.go_on(0.1)
        gate.pass_through()
    assert [1.5, 2.5, 3.5, 4.5] == pytest.approx(asked, abs=0.05)
    assert asked[-1] + 0.2 == pytest.approx(world.now)


def test_gate_is_open_when_the_engine_rests(tmp_path: Path) -> None:
    """An idle engine costs a job nothing, whatever its share."""
    world = World(tmp_path, busy_until=0)
    gate = world.gate(0.0)
    world.go_on(5)
    gate.pass_through()
    assert (gate.waited_s, world.now) == (0.0, 5.5)


def test_gate_forgives_when_the_job_computed_for_long(tmp_path: Path) -> None:
    """A pause is bounded: half a second of computing at most is paid for."""
    world = World(tmp_path)
    gate = world.gate(0.5)
    world.go_on(60)
    gate.pass_through()
    assert gate.waited_s == pytest.approx(0.5, abs=0.01)


def test_gate_is_passed_at_every_layer_when_a_model_computes(tmp_path: Path, tiny_base: LoadedBase) -> None:
    """Forwards and backwards; and gradients have the same bits as without it."""
    model = add_adapter(tiny_base, TrainSettings.load(tmp_path / "home", rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(torch.arange(12)[None]).logits.sum(), trained)

    expected = gradients()
    world = World(tmp_path)
    gate = _Counting(world.pulse, 0.5, clock=lambda: world.now, sleep=world.go_on)

    assert install_gate(tiny_base.model, gate) == 2
    found = gradients()

    assert gate.num_passed == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class _Counting(Gate):
    num_passed = 0

    def pass_through(self) -> None:
        self.num_passed += 1
        super().pass_through()


@pytest.mark.parametrize(("text", "share"), [(None, None), ("0.25", 0.25), ("0", 0.0), ("1", 1.0)])
def test_share_is_the_servers_when_a_job_asks(
    monkeypatch: pytest.MonkeyPatch, text: str | None, share: float | None
) -> None:
    """A run by hand has none."""
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(SHARE_VARIABLE, text)
    assert share_from_environment() == share


@pytest.mark.parametrize("text", ["", "half", "1.5", "-0.1", "nan"])
def test_share_is_refused_when_it_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """In words that say what was expected."""
    monkeypatch.setenv(SHARE_VARIABLE, text)
    with pytest.raises(ConfigurationError, match=rf"{SHARE_VARIABLE}: expected a number from 0 to 1"):
        share_from_environment()
