"""What operators watch, in Prometheus' terms: one registry for each API process, and nothing in the library's own.

The API process owns every counter. The worker sends what it has measured since its last message, so that a restarted
worker, which begins at nothing, takes nothing back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.records import Binding, Exposure, NumberedVersion
from server.engine.core import MAX_TIMINGS, EngineTimings, LoadTiming
from server.engine_client import EngineClient
from server.messages import EngineMessage, EngineStatus

__all__ = ["Metrics"]

# From a decode step on an accelerator to a long answer on a busy processor.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)
_VERSION = ("alias", "version")
_UNKNOWN = ("unknown", "unknown")
_NO_VERSION = ("", "")

# What the worker says of itself: name, text, and where it stands in the status.
_WORKER_GAUGES: tuple[tuple[str, str, Callable[[EngineStatus], int]], ...] = (
    ("hotswap_slots", "Slots for versions.", lambda status: status.num_slots),
    ("hotswap_slots_used", "Slots that hold a version.", lambda status: len(status.resident)),
    ("hotswap_running_requests", "Requests in the batch.", lambda status: status.num_running),
    ("hotswap_running_shadows", "Shadows in the batch.", lambda status: status.num_shadows),
    ("hotswap_waiting_requests", "Requests in the engine's queue.", lambda status: status.num_waiting),
    ("hotswap_waiting_tokens", "Prompt and max_tokens of those.", lambda status: status.num_waiting_tokens),
    ("hotswap_cache_blocks", "Blocks of the KV cache.", lambda status: status.num_cache_total),
    (
        "hotswap_cache_blocks_free",
        "Blocks of the KV cache that a request could have.",
        lambda status: status.num_cache_free,
    ),
)

# A series with the time of creation for each other one would double what a scrape carries.
disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations


class Metrics:
    """All metrics of one API process. Use it from its event loop; docs/metrics.md lists them.

    Only versions that the registry has named become labels, so what clients write into `model` can't add series.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._names: dict[str, tuple[str, str]] = {}  # digest -> alias and version
        self._unnamed: deque[LoadTiming] = deque(maxlen=MAX_TIMINGS)
        self._epoch: str | None = None
        self._make_answer_metrics()
        self._make_engine_metrics()

    def watch(self, engine: EngineClient) -> None:
        """Report the state of this engine, as it is at the time of each scrape."""
        self.registry.register(_EngineGauges(engine, self._names))

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def name_versions(self, versions: Iterable[NumberedVersion]) -> None:
        """Learn what versions are called; a version under several names keeps the first."""
        for named in versions:
            self._names.setdefault(named.version.digest, (named.alias, named.label))
        for load in self._unnamed:
            self._observe_load(load, self._names.get(load.digest, _UNKNOWN))
        self._unnamed.clear()

    def lacks_names(self, resident: Iterable[str]) -> bool:
        """Whether a version is resident, or was loaded, that `name_versions` has not named."""
        return bool(self._unnamed) or any(digest not in self._names for digest in resident)

    def name_binding(self, binding: Binding) -> None:
        """Learn the name of the version that a request is bound to."""
        if binding.digest is not None:
            self._names.setdefault(binding.digest, _labels(binding))

    def observe_queue(self, binding: Binding, seconds: float) -> None:
        """A request has left the engine's queue."""
        self._queue.labels(*_labels(binding)).observe(seconds)

    def observe_first_token(self, binding: Binding, seconds: float) -> None:
        """A request has got its first token so long after it was accepted."""
        self._first_token.labels(*_labels(binding)).observe(seconds)

    def observe_gap(self, binding: Binding, seconds: float) -> None:
        """So long passed between two tokens of one answer."""
        self._gap.labels(*_labels(binding)).observe(seconds)

    def count_answer(self, exposure: Exposure, *, per_token_s: float | None) -> None:
        """An accepted request has ended, well or not; `per_token_s` is its mean time per token after the first."""
        labels = _labels(exposure.binding)
        self._requests.labels(*labels, exposure.finish_reason or "error").inc()
        self._duration.labels(*labels).observe(exposure.total_ms / 1000)
        self._usage.labels(*labels, "input").observe(exposure.prompt_tokens)
        self._usage.labels(*labels, "output").observe(exposure.completion_tokens)
        if per_token_s is not None:
            self._per_token.labels(*labels).observe(per_token_s)

    def count_shadow(self, alias: str, version: str, outcome: str) -> None:
        """A copy of a live request has ended, or was dropped; nothing else here counts it."""
        self._shadows.labels(alias, version, outcome).inc()

    def count_error(self, code: str, binding: Binding | None) -> None:
        """A request was answered with this error, before or after it was bound to a version."""
        self._errors.labels(*(_labels(binding) if binding else _NO_VERSION), code).inc()

    def note_message(self, message: EngineMessage) -> None:
        """Add what the worker has measured; another epoch than before is another worker."""
        if self._epoch not in (None, message.status.epoch):
            self._restarts.inc()
        self._epoch = message.status.epoch
        self._add_timings(message.timings)

    def _add_timings(self, timings: EngineTimings) -> None:
        for step in timings.steps:
            self._steps.labels(str(step.has_prefill).lower()).observe(step.seconds)
        for load in timings.loads:
            if labels := self._names.get(load.digest):
                self._observe_load(load, labels)
            else:
                self._unnamed.append(load)

    def _observe_load(self, load: LoadTiming, labels: tuple[str, str]) -> None:
        self._loads.labels(*labels, "loaded" if load.is_loaded else "failed").observe(load.seconds)

    def _make_answer_metrics(self) -> None:
        """Metrics by alias and version. Names are those of OpenTelemetry's conventions for GenAI where they exist."""
        self._requests = self._counter("hotswap_requests", "Accepted requests that have ended.", "finish_reason")
        self._errors = self._counter("hotswap_errors", "Requests that were answered with an error.", "code")
        self._shadows = self._counter(
            "hotswap_shadow_answers", "Copies of live requests, by what became of them.", "outcome"
        )
        self._duration = self._histogram("gen_ai_server_request_duration_seconds", "From acceptance to the end.")
        self._first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds", "From acceptance to the first token."
        )
        self._per_token = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per token after the first, for answers that end well.",
        )
        self._gap = self._histogram("hotswap_inter_token_seconds", "Between two tokens of one answer.")
        self._queue = self._histogram("hotswap_queue_seconds", "From the engine's queue to a place in the batch.")
        self._usage = Histogram(
            "gen_ai_client_token_usage",
            "Tokens of a request's prompt and answer.",
            (*_VERSION, "gen_ai_token_type"),
            buckets=_TOKENS,
            registry=self.registry,
        )

    def _make_engine_metrics(self) -> None:
        self._loads = self._histogram(
            "hotswap_adapter_load_seconds",
            "Reading a version and copying it into its slot, or asking for it until it failed.",
            "outcome",
        )
        self._steps = Histogram(
            "hotswap_step_duration_seconds",
            "One step of the engine; the largest bounds the gap between two tokens of a running answer.",
            ("has_prefill",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._restarts = Counter("hotswap_engine_restarts", "Workers after the first.", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_VERSION, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, (*_VERSION, *labels), buckets=_SECONDS, registry=self.registry)


class _EngineGauges(Collector):
    """The engine's state as the worker told it last; without a worker there is only the word that it is down."""

    def __init__(self, engine: EngineClient, names: dict[str, tuple[str, str]]) -> None:
        self._engine = engine
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """One family after the other; called at each scrape."""
        engine, status = self._engine, self._engine.status
        yield _gauge("hotswap_engine_up", "Whether a worker takes requests.", int(status is not None))
        yield _gauge("hotswap_in_flight_requests", "Accepted and not ended.", engine.num_in_flight)
        yield _gauge("hotswap_in_flight_tokens", "Prompt and max_tokens of those.", engine.num_tokens_in_flight)
        yield self._residency(status.resident if status else ())
        for name, text, read in _WORKER_GAUGES:
            yield _gauge(name, text, read(status) if status else None)

    def _residency(self, resident: Iterable[str]) -> Metric:
        family = GaugeMetricFamily("hotswap_adapter_resident", "1 for each version in a slot.", labels=_VERSION)
        for labels in sorted({self._names.get(digest, _UNKNOWN) for digest in resident}):
            family.add_metric(labels, 1)
        return family


def _gauge(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _labels(binding: Binding) -> tuple[str, str]:
    return binding.alias, binding.version_label
