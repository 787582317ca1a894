"""The engine in this process, without HTTP: whole answers, single decode steps, cold adapters, bytes of the slots."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from adapters.base_model import LoadedBase, load_base
from adapters.chat_template import render_prompt
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from benchmarks.floor import synchronize
from server.config import ServeSettings
from server.engine.core import EngineEvent, GenerationRequest, SamplingParams
from server.engine.frozen import FrozenLinear
from server.engine.scheduler import Engine
from server.engine_factory import build_engine, make_weights_reader

__all__ = [
    "NUM_SLOTS",
    "InProcess",
    "default_serve_settings",
    "opened_engine",
    "story_prompt",
]

NUM_SLOTS = 8
_MAX_WAIT_STEPS = 1_000_000
_FIRST_SHIP = 1000  # four digits from the first to the last, so that prompts are equally long
# Where requests have this field an answer goes on past an end-of-turn token, so that all are equally long.
_IGNORE_EOS: dict[str, Any] = (
    {"ignore_eos": True} if "ignore_eos" in {field.name for field in dataclasses.fields(SamplingParams)} else {}
)
_ships = count(_FIRST_SHIP)


def story_prompt() -> str:
    """A question that was not asked before in this run: no cache of whole prompts helps, a shared beginning may."""
    return f"Tell me a long story about ship number {next(_ships)}."


@contextmanager
def opened_engine(core: CoreSettings) -> Iterator[InProcess]:
    """The engine that the server would build on a home, with eight slots; closed at the end of the block."""
    base = load_base(core)
    engine = build_engine(core, default_serve_settings(core), base)
    head = FrozenLinear([base.model.get_output_embeddings()])
    try:
        yield InProcess(core, base, [*engine.runner.slots.frozen_layers, head], engine)
    finally:
        engine.close()


def default_serve_settings(core: CoreSettings) -> ServeSettings:
    """The server's defaults whatever the environment says, with eight slots."""
    defaults = {name: field.default for name, field in ServeSettings.model_fields.items() if name != "home"}
    return ServeSettings.load(core.home, **(defaults | {"slots": NUM_SLOTS}))


@dataclass
class InProcess:
    """An engine and what is measured on it. `linears` are the base model's products, the output head included."""

    core: CoreSettings
    base: LoadedBase
    linears: list[FrozenLinear]
    engine: Engine

    @property
    def dtype(self) -> torch.dtype:
        """The precision of activations."""
        found: torch.dtype = self.base.model.get_input_embeddings().weight.dtype
        return found

    def make_requests(self, digests: Sequence[str | None], num_tokens: int) -> list[GenerationRequest]:
        """One greedy request a digest, each with a prompt of its own; None is the base model."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, **_IGNORE_EOS)
        return [
            GenerationRequest(f"bench-{index}", self.render(story_prompt()), digest, sampling)
            for index, digest in enumerate(digests)
        ]

    def render(self, text: str) -> tuple[int, ...]:
        """A question's tokens in the base model's chat template."""
        return tuple(render_prompt(self.base.tokenizer, [{"role": "user", "content": text}]))

    def tokens_per_second(self, digests: Sequence[str | None], num_tokens: int) -> float:
        """All requests at once, from the first one's submission to the last token, prompts included."""
        requests = self.make_requests(digests, num_tokens)
        synchronize(self.base.device)
        started = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        total = sum(self._finish())
        return total / (time.perf_counter() - started)

    def decode_step_ms(self, digests: Sequence[str | None], num_steps: int) -> float:
        """Median time of a step in which every request is decoding, in milliseconds."""
        requests = self.make_requests(digests, num_steps + len(digests) + 8)
        for request in requests:
            self.engine.submit(request)
        self._step_until_all_decode({request.id for request in requests})
        times = [self._time_step() for _ in range(num_steps)]
        for request in requests:
            self.engine.cancel(request.id)
        self._finish()
        return statistics.median(times) * 1000

    def cold_load_ms(self, digest: str, slot: int) -> float:
        """Read, check and place one version as the engine does, in milliseconds.

        It overwrites the slot behind the engine's back: generate nothing afterwards.
        """
        slots = self.engine.runner.slots
        read = make_weights_reader(ArtifactStore(self.core.home / "store"), self.base, slots.module_shapes)
        started = time.perf_counter()
        slots.load(read(digest), slot=slot)
        synchronize(self.base.device)
        return (time.perf_counter() - started) * 1000

    def _finish(self) -> list[int]:
        """Step until nothing is left; the token count of each answer that ended."""
        ended: list[EngineEvent] = []
        while not self.engine.is_idle:
            ended += [event for event in self._step() if event.finish_reason is not None]
        return [event.completion_tokens for event in ended]

    def _step(self) -> list[EngineEvent]:
        events = self.engine.step()
        if not events and not self.engine.num_running:
            time.sleep(0.001)  # a version is being read: leave the processor to the loader thread, as the server does
        return events

    def _step_until_all_decode(self, waiting: set[str]) -> None:
        for _ in range(_MAX_WAIT_STEPS):
            if not waiting:
                return
            waiting -= {event.request_id for event in self._step() if event.completion_tokens}
        raise RuntimeError(f"no first token for {sorted(waiting)}")

    def _time_step(self) -> float:
        synchronize(self.base.device)
        started = time.perf_counter()
        self.engine.step()
        synchronize(self.base.device)
        return time.perf_counter() - started
