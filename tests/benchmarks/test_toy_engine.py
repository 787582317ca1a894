"""The toy engine keeps to the engine's interface: the API in one process runs over it as over the real one."""

from __future__ import annotations

from benchmarks.toy_engine import ToyEngine
from server.api import obey
from server.messages import CancelCommand, EngineStatus, PinCommand, SubmitCommand, UnloadCommand
from tests.support.engine import ask


def test_toy_engine_answers_in_full_when_driven_as_the_worker_does() -> None:
    """One token a step for everybody, one finish reason each, then idle."""
    toy = ToyEngine()
    for name, count in (("a", 2), ("b", 3)):
        assert [] == obey(toy, SubmitCommand("epoch", ask(name, "hello", max_tokens=count)), "epoch")
    status = EngineStatus.of(toy, "epoch")
    assert (2, 0) == (status.num_running, status.num_waiting)
    steps = []
    while not toy.is_idle:
        steps.append([(event.request_id, event.completion_tokens, event.finish_reason) for event in toy.step()])
    assert [[("a", 1, None), ("b", 1, None)], [("a", 2, "length"), ("b", 2, None)], [("b", 3, "length")]] == steps


def test_toy_engine_ends_a_request_when_it_is_cancelled() -> None:
    """Once, and nothing happens the second time."""
    toy = ToyEngine()
    toy.submit(ask("a", "hello", max_tokens=9))
    (event,) = obey(toy, CancelCommand("a"), "epoch")
    assert ("cancelled", []) == (event.finish_reason, obey(toy, CancelCommand("a"), "epoch"))
    assert toy.is_idle


def test_toy_engine_takes_every_command_when_driven_as_the_worker_does() -> None:
    """Versions are pinned and unloaded at a server's start and while it runs: there is nothing to do."""
    toy = ToyEngine()
    assert [] == obey(toy, PinCommand(("d" * 64,)), "epoch")
    assert [] == obey(toy, UnloadCommand("d" * 64), "epoch")
