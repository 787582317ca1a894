"""The engine's pulse, as two processes see it."""

from __future__ import annotations

from pathlib import Path

from adapters.pulse import EnginePulse, pulse_path


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_pulse_beats_for_a_reader_when_the_engine_works(tmp_path: Path) -> None:
    """What one end writes the other sees, until the engine rests."""
    engine, trainer = EnginePulse(pulse_path(tmp_path)), EnginePulse(pulse_path(tmp_path))
    seen = [trainer.is_beating]
    engine.beat()
    seen.append(trainer.is_beating)
    engine.rest()
    seen.append(trainer.is_beating)
    assert seen == [False, True, False]


def test_pulse_is_still_when_the_engine_was_killed(tmp_path: Path) -> None:
    """A beat counts for a second; one from before the machine started anew, whose clock was ahead, not at all."""
    clock = Clock()
    pulse = EnginePulse(tmp_path / "pulse", clock=clock)
    pulse.beat()
    seen = []
    for later in (0.9, 1.1, -50.0):
        clock.now = 100.0 + later
        seen.append(pulse.is_beating)
    assert seen == [True, False, False]


def test_pulse_stays_when_another_end_opens_it(tmp_path: Path) -> None:
    """Opening truncates nothing."""
    engine = EnginePulse(tmp_path / "pulse")
    engine.beat()
    assert EnginePulse(tmp_path / "pulse").is_beating
