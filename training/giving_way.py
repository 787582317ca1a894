"""Lets a job give way to chat on the machine that both share: while answers are written, it computes in part only.

It waits inside its steps, between two layers: a step takes seconds, and most answers are over by then. What is computed
is the same as without waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from adapters.errors import ConfigurationError
from adapters.pulse import EnginePulse

__all__ = ["SHARE_VARIABLE", "Gate", "install_gate", "share_from_environment"]

# Set by the server for its jobs (`job_share`); a run by hand has none and never waits.
SHARE_VARIABLE = "HOTSWAP_JOB_SHARE"
_NAP_S = 0.005
_ASK_EVERY_S = 1.0
# Time that was computed before this long ago is forgiven: a job must not wait for what it did on an idle machine.
_MAX_DEBT_S = 0.5


class Gate:
    """Keeps a job to its share of the time in which the engine is at work.

    Args:
        pulse: Says whether it is.
        share: The part of that time in which the job may compute: 1 is all of it, 0 is none.
        is_ending: Asked about once a second of waiting: whether the job was told to end or pause after its step. From
            then on the gate is open, since somebody waits for the step.
        clock: In seconds.
        sleep: Waits as many.
    """

    def __init__(
        self,
        pulse: EnginePulse,
        share: float,
        *,
        is_ending: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._pulse = pulse
        self._share = share
        self._is_ending = is_ending
        self._clock = clock
        self._sleep = sleep
        self._left_at = self._asked_at = clock()
        self._is_open = False
        self.waited_s = 0.0

    def pass_through(self) -> None:
        """Return at once if the engine is idle; otherwise wait until what was computed since is the job's share."""
        arrived = self._clock()
        computed = min(arrived - self._left_at, _MAX_DEBT_S)
        while (
            not self._is_open and self._pulse.is_beating and self._computes_too_much(computed, self._clock() - arrived)
        ):
            self._sleep(_NAP_S)
            self._ask()
        self._left_at = self._clock()
        self.waited_s += self._left_at - arrived

    def _ask(self) -> None:
        if self._clock() - self._asked_at >= _ASK_EVERY_S:
            self._is_open = self._is_ending()
            self._asked_at = self._clock()

    def _computes_too_much(self, computed: float, waited: float) -> bool:
        return computed > self._share * (computed + waited)


def share_from_environment() -> float | None:
    """The share that the server gives its jobs; None for a run that nobody gave one.

    Raises:
        ConfigurationError: it is no number from 0 to 1.
    """
    text = os.environ.get(SHARE_VARIABLE)
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigurationError(f"{SHARE_VARIABLE}: expected a number from 0 to 1, found {text!r:.40}")
    return share


def install_gate(model: Any, gate: Gate) -> int:
    """Have a model pass through the gate at each layer of its decoder, forwards and backwards; returns how many."""
    layers = model.get_decoder().layers
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: _pass_forwards(gate, output))
    return len(layers)


def _pass_forwards(gate: Gate, output: Any) -> None:
    gate.pass_through()
    hidden = output[0] if isinstance(output, tuple) else output
    if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
        hidden.register_hook(lambda gradient: gate.pass_through())  # type: ignore[no-untyped-call]
