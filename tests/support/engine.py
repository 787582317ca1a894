"""Real engines over tiny models, an independent reference for their answers, and the API in one process.

`Bench` is an engine without HTTP, `Site` the routes over one. Nothing here imitates a model, a database or a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from fastapi import FastAPI
from peft import PeftModel

from adapters.adapter_files import AdapterWeights, read_adapter_config, read_adapter_weights
from adapters.base_model import LoadedBase
from adapters.chat_template import render_prompt
from adapters.errors import AdapterWeightsError, NotFoundError
from adapters.experiments import ExperimentService
from adapters.keys import KeyService
from adapters.manifest import BaseReference
from adapters.records import NumberedVersion
from adapters.registry import Registry
from adapters.tables import ExposureRow
from server.api import obey
from server.app import equip_app, join_services
from server.config import ServeSettings
from server.engine.core import Constraint, EngineEvent, GenerationRequest, SamplingParams
from server.engine.lora import SlottedLinear
from server.engine.runner import ModelRunner
from server.engine.scheduler import Engine
from server.engine_client import EngineClient
from server.engine_factory import make_weights_reader
from server.messages import Command, EngineMessage, EngineStatus, SubmitCommand
from server.routes import router
from server.services import Services
from tests.support.tiny import (
    CHATML,
    load_tiny_base,
    make_manifest,
    make_tokenizer,
    save_random_adapter,
    tiny_settings,
)

__all__ = [
    "KERNELS_FOLDER",
    "RECIPES",
    "Answer",
    "Bench",
    "EngineTransport",
    "Exchange",
    "GatedReader",
    "Recipe",
    "Reference",
    "SetClock",
    "Site",
    "TokenText",
    "ask",
    "collect",
    "drain",
    "encode",
    "expected_tokens",
    "make_bench",
    "on_site",
    "run_to_end",
    "save_recipes",
    "slotted_layers",
    "tokens_of",
    "wait_for_loads",
]

Result = TypeVar("Result")
KERNELS_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "kernels"
_HEARTBEAT_S = 1.0
_FIRST_CHARACTER = 0x4E00  # a stretch of letters without combining marks, longer than the tiny vocabulary


@dataclass(frozen=True)
class Recipe:
    """How one random adapter is made."""

    seed: int
    rank: int = 4
    alpha: float = 8
    modules: tuple[str, ...] = ()


# Different ranks, scalings and targets, so that a mix-up of any of them shows in the tokens.
RECIPES: dict[str, Recipe] = {
    f"{1:064x}": Recipe(1, rank=4, alpha=8),
    f"{2:064x}": Recipe(2, rank=2, alpha=16, modules=("q_proj", "v_proj")),
    f"{3:064x}": Recipe(3, rank=8, alpha=8, modules=("gate_proj", "up_proj", "down_proj")),
    f"{4:064x}": Recipe(4, rank=1, alpha=12, modules=("k_proj", "o_proj", "up_proj")),
}


class TokenText:
    """A tokenizer that writes one distinct letter per token, so that a text tells its tokens exactly."""

    chat_template = None

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """One letter per id."""
        return "".join(chr(_FIRST_CHARACTER + token) for token in ids)


def tokens_of(text: str) -> list[int]:
    """The tokens behind a text that `TokenText` made."""
    return [ord(letter) - _FIRST_CHARACTER for letter in text]


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return make_tokenizer()


def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text in the tiny models' vocabulary: one per byte."""
    return tuple(_encoder().encode(text))


def save_recipes(root: Path, base_folder: Path, recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, Path]:
    """Write the adapters of some recipes in PEFT's layout."""
    return {
        name: save_random_adapter(
            root / name, base_folder, seed=recipe.seed, rank=recipe.rank, alpha=recipe.alpha, modules=recipe.modules
        )
        for name, recipe in recipes.items()
    }


@dataclass
class Bench:
    """A model with slots and a cache, and the adapters that engines over it can load. Engines come and go."""

    base: LoadedBase
    runner: ModelRunner
    adapters: dict[str, Path]

    def read(self, digest: str) -> AdapterWeights:
        """The reader that engines get unless told otherwise."""
        folder = self.adapters.get(digest)
        if folder is None:
            raise NotFoundError(f"the store has no version {digest!r}")
        dtype = self.base.model.get_input_embeddings().weight.dtype
        weights = read_adapter_weights(folder, read_adapter_config(folder), self.runner.slots.module_shapes)
        return AdapterWeights(weights.rank, {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in weights.modules.items()})

    def engine(
        self,
        *,
        max_prefill_tokens: int = 16,
        tokenizer: Any = None,
        read: Callable[[str], AdapterWeights] | None = None,
        max_host_bytes: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
        max_stall_s: float = 0.2,
    ) -> Engine:
        """A fresh engine with empty slots."""
        return Engine(
            self.runner,
            tokenizer or TokenText(self.base.tokenizer.eos_token_id),
            read or self.read,
            max_prefill_tokens=max_prefill_tokens,
            max_host_bytes=max_host_bytes,
            clock=clock,
            max_stall_s=max_stall_s,
        )


def make_bench(
    folder: Path,
    adapters: dict[str, Path],
    *,
    num_slots: int = 4,
    max_batch: int = 8,
    max_context: int = 128,
    cache_tokens: int | None = None,
    quantisation: str = "none",
    native: bool = True,
    captured: bool = False,
    device: str = "cpu",
) -> Bench:
    """Load a tiny base model and prepare it for engines.

    `native` False computes with torch alone; `captured` decodes in the padded steps that CUDA graphs would be made of.
    """
    base = load_tiny_base(folder, quantisation=quantisation, device=device)
    runner = ModelRunner(
        base.model,
        num_slots=num_slots,
        max_rank=8,
        max_batch=max_batch,
        max_context=max_context,
        cache_tokens=cache_tokens,
        kernels_folder=KERNELS_FOLDER if native else None,
        capture_decode=captured,
    )
    runner.warm_up()
    return Bench(base, runner, adapters)


def slotted_layers(model: torch.nn.Module) -> dict[str, SlottedLinear]:
    """The layers that hold adapters, by their path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlottedLinear)}


class Reference:
    """Greedy answers by transformers' `generate` and PEFT: nothing of the engine takes part in them."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path]) -> None:
        self._tokenizer = make_tokenizer()
        self._model: Any = load_tiny_base(folder).model
        for name, path in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name)
        self._model.eval()
        self._known: dict[tuple[tuple[int, ...], str | None, int], list[int]] = {}

    def tokens(self, prompt: Sequence[int], name: str | None, count: int) -> list[int]:
        """At most `count` tokens behind a prompt, an end-of-sequence token included; `name` None is the base model."""
        key = (tuple(prompt), name, count)
        if key not in self._known:
            self._known[key] = self._generate(list(prompt), name, count)
        return self._known[key]

    def text(self, prompt: Sequence[int], name: str | None, count: int) -> str:
        """The same as text."""
        return str(self._tokenizer.decode(self.tokens(prompt, name, count), skip_special_tokens=True))

    def _generate(self, prompt: list[int], name: str | None, count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with contextlib.ExitStack() as stack:
            if name is None:
                stack.enter_context(self._model.disable_adapter())
            else:
                self._model.set_adapter(name)
            stack.enter_context(torch.inference_mode())
            output = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


class SetClock:
    """Time that a test sets, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass
class Answer:
    """What an engine said about one request."""

    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    num_terminal: int = 0

    @property
    def tokens(self) -> list[int]:
        """The tokens in the text, if `TokenText` made it; an end-of-sequence token is not among them."""
        return tokens_of(self.text)


def ask(
    name: str, prompt: str, digest: str | None = None, *, max_tokens: int = 8, temperature: float = 0, **options: Any
) -> GenerationRequest:
    """A request, greedy unless told otherwise."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, **options)
    return GenerationRequest(name, encode(prompt), digest, sampling)


def collect(events: Iterable[EngineEvent], into: dict[str, Answer]) -> None:
    """Add events to the answers that they belong to."""
    for event in events:
        answer = into.setdefault(event.request_id, Answer())
        answer.text += event.text
        answer.completion_tokens = event.completion_tokens
        answer.num_terminal += event.finish_reason is not None
        answer.finish_reason = event.finish_reason or answer.finish_reason
        answer.error = event.error or answer.error


def wait_for_loads(engine: Engine) -> None:
    """Return once the loader threads have read everything that was asked of them; each reads in order."""
    for loader in (engine.residency._loader, engine.residency._aside_loader):
        loader.submit(bool).result()


def drain(engine: Engine, into: dict[str, Answer]) -> None:
    """Step until nothing is left to do."""
    while not engine.is_idle:
        if engine.residency.is_loading:
            wait_for_loads(engine)
        collect(engine.step(), into)


def run_to_end(engine: Engine, *requests: GenerationRequest) -> dict[str, Answer]:
    """Submit requests together and return all answers."""
    answers: dict[str, Answer] = {}
    for request in requests:
        collect(engine.submit(request), answers)
    drain(engine, answers)
    return answers


def expected_tokens(reference: Reference, request: GenerationRequest, eos: int) -> tuple[list[int], str]:
    """What an engine has to answer: the tokens before an end-of-sequence token, and the finish reason."""
    tokens = reference.tokens(request.prompt, request.digest, request.sampling.max_tokens)
    return (tokens[:-1], "stop") if tokens[-1] == eos else (tokens, "length")


class GatedReader:
    """Reads adapters once it is let: a load takes as long as a test wants. Names in `failing` can't be read."""

    def __init__(self, read: Callable[[str], AdapterWeights]) -> None:
        self._read = read
        self._gate = threading.Event()
        self.failing: set[str] = set()
        self.crashing: set[str] = set()

    def __call__(self, digest: str) -> AdapterWeights:
        """Called in the loader thread."""
        self._gate.wait()
        if digest in self.crashing:
            raise RuntimeError(f"secret path of {digest}")
        if digest in self.failing:
            raise AdapterWeightsError(f"no file for {digest[-1]}")
        return self._read(digest)

    def open(self) -> None:
        """Let loads finish from here on."""
        self._gate.set()

    def close(self) -> None:
        """Hold loads from here on."""
        self._gate.clear()

    def finish_loads(self, engine: Engine) -> None:
        """Let what was asked for be read, and nothing later."""
        self.open()
        wait_for_loads(engine)
        self.close()


class EngineTransport:
    """A line to an engine in the same process: steps it whenever the API waits for messages.

    `permits` bounds the steps, so that a test can act in the middle of an answer; None is no bound. `script`, if not
    empty, is what the model has to say to every request: a grammar leaves it no other choice.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.epoch = "epoch-1"
        self.permits: int | None = None
        self.script = ""
        self.commands: list[Command] = []
        self._events: list[EngineEvent] = []
        self._has_greeted = False

    def restart(self, engine: Engine, *, epoch: str) -> None:
        """Let another worker speak, beginning with a sign of life."""
        self.engine, self.epoch, self._has_greeted = engine, epoch, False
        self._events.clear()

    async def send(self, command: Command) -> None:
        """Obey at once, as the worker's loop does."""
        self.commands.append(command)
        if isinstance(command, SubmitCommand):
            command = replace(command, request=_scripted(command.request, self.script))
        self._events += obey(self.engine, command, self.epoch)

    async def receive(self) -> list[EngineMessage]:
        """The events of the next step that has any; the first message, and one a second of silence, is a sign of life.

        Without it the client would take the worker for stuck after a while, and kill its process: this one.
        """
        started = time.monotonic()
        while True:
            if not self._has_greeted or time.monotonic() - started > _HEARTBEAT_S:
                self._has_greeted = True
                return [self._message(())]
            # Gives the routes their turn; the engine's steps are what passes the time here.
            await asyncio.sleep(0)
            if not self.engine.is_idle and self.permits != 0:
                if self.engine.residency.is_loading:
                    wait_for_loads(self.engine)
                self.permits = None if self.permits is None else self.permits - 1
                self._events += self.engine.step()
            if self._events:
                events, self._events = tuple(self._events), []
                return [self._message(events)]

    def _message(self, events: tuple[EngineEvent, ...]) -> EngineMessage:
        status = EngineStatus.of(self.engine, self.epoch)
        return EngineMessage(status, events, self.engine.take_timings(), self.engine.residency.report())


def _scripted(request: GenerationRequest, script: str) -> GenerationRequest:
    if not script:
        return request
    constraint = Constraint("grammar", grammar=f"start: {json.dumps(script)}")
    return replace(request, sampling=replace(request.sampling, constraint=constraint))


@dataclass
class Site:
    """The API over a real engine, registry and database, in one process."""

    app: FastAPI
    services: Services
    engine: Engine
    transport: EngineTransport
    base: LoadedBase
    adapters: dict[str, Path]
    settings: ServeSettings

    @property
    def registry(self) -> Registry:
        """Versions and aliases."""
        return self.services.registry

    @property
    def experiments(self) -> ExperimentService:
        """Experiments, exposures and feedback."""
        return self.services.experiments

    @property
    def keys(self) -> KeyService:
        """API keys; there are none until a test makes one."""
        return self.services.keys

    @property
    def client(self) -> EngineClient:
        """The API's end of the line to the engine."""
        return self.services.engine

    @classmethod
    def build(
        cls,
        bench: Bench,
        registry: Registry,
        home: Path,
        *,
        max_waiting: int = 64,
        max_context: int = 128,
        max_queued_tokens: int = 200_000,
        send_timeout_s: float = 60.0,
        chat_template: str = CHATML,
        clock: Callable[[], float] = time.monotonic,
        keep_conversations: bool = False,
    ) -> Site:
        """The API as `server.app` joins it, with an engine in this process; the base model is called `tiny`."""
        home.mkdir(parents=True, exist_ok=True)
        named = home / "tiny"
        if not named.exists():
            named.symlink_to(bench.base.folder)
        settings = ServeSettings.load(
            home,
            slots=bench.runner.slots.num_slots,
            max_context=max_context,
            max_tokens=12,
            max_waiting=max_waiting,
            max_queued_tokens=max_queued_tokens,
            send_timeout_s=send_timeout_s,
            max_body_bytes=1_000_000,
            max_file_bytes=200_000,
            keep_conversations=keep_conversations,
        )
        read = make_weights_reader(registry.store, bench.base, bench.runner.slots.module_shapes)
        engine = bench.engine(tokenizer=bench.base.tokenizer, read=read, clock=clock)
        transport = EngineTransport(engine)
        app = FastAPI()
        equip_app(app, settings)
        app.include_router(router)
        core = tiny_settings(named, home=home)
        services = join_services(registry, transport, make_tokenizer(chat_template), core, settings)
        app.state.services = services
        return cls(app, services, engine, transport, bench.base, bench.adapters, settings)

    def publish(
        self,
        alias: str,
        adapter: str,
        *,
        promote: bool = True,
        reference: BaseReference | None = None,
        prompts: Sequence[str] = (),
    ) -> NumberedVersion:
        """Publish one of the bench's adapters."""
        recipe = RECIPES[adapter]
        manifest = make_manifest(reference or self.base.reference, rank=recipe.rank, alpha=recipe.alpha)
        source = self.adapters[adapter]
        return self.registry.publish(source, manifest, alias=alias, promote=promote, prompts=prompts)[0]

    def prompt(self, text: str) -> tuple[int, ...]:
        """The tokens that the model is asked with for one user message."""
        return tuple(render_prompt(_encoder(), [{"role": "user", "content": text}]))

    def exposures(self) -> list[ExposureRow]:
        """All exposures in the database."""
        with self.registry.database.read() as session:
            return list(session.query(ExposureRow).order_by(ExposureRow.served_at))


def on_site(site: Site, scenario: Callable[[httpx.AsyncClient], Awaitable[Result]], *, is_up: bool = True) -> Result:
    """Run a scenario against the API while its engine is up, or while there is none."""

    async def run() -> Result:
        listening = asyncio.create_task(site.client.run()) if is_up else None
        while is_up and site.client.status is None:
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(app=site.app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await scenario(http)
        finally:
            if listening is not None:
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listening

    return asyncio.run(run())


class Exchange:
    """One POST driven by hand, so that a test can act between two chunks of the answer, or hang up."""

    def __init__(self, app: FastAPI, path: str, body: Mapping[str, Any]) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content = json.dumps(body).encode()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # what uvicorn says
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
            "root_path": "",
        }

        async def send(message: Any) -> None:
            self._outgoing.put_nowait(dict(message))

        self._tasks_before = asyncio.all_tasks()
        self._task = asyncio.ensure_future(app(scope, self._incoming.get, send))

    async def start(self) -> tuple[int, dict[str, str]]:
        """Wait for the answer's status and headers."""
        message = await self._outgoing.get()
        return int(message["status"]), {key.decode(): value.decode() for key, value in message["headers"]}

    async def chunk(self) -> bytes:
        """Wait for the next piece of the body; empty at its end."""
        body: bytes = (await self._outgoing.get())["body"]
        return body

    async def rest(self) -> bytes:
        """Read the body to its end."""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        await self._task
        return b"".join(parts)

    async def hang_up(self) -> None:
        """Leave, and wait until the server has noticed, and has written what it writes behind an answer."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*(asyncio.all_tasks() - self._tasks_before), return_exceptions=True)
