"""Traces for OpenTelemetry: one span an answer, as the conventions for generative AI name its attributes.

It lies in the span that FastAPI makes of every request, which belongs to the client's trace where the client sends
`traceparent`. Without an SDK every call here does nothing. `OTEL_EXPORTER_OTLP_ENDPOINT` and the SDK's other variables
say where spans go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from opentelemetry import trace

from adapters.errors import ConfigurationError
from adapters.records import Exposure

__all__ = ["check_tracing", "exported_traces", "trace_answer"]

_SERVICE = "hotswap"
_NS_PER_MS = 1_000_000


def check_tracing() -> None:
    """Say before anything is started that traces can't be written.

    Raises:
        ConfigurationError: the packages for it are not installed.
    """
    if any(find_spec(name) is None for name in ("opentelemetry.sdk", "opentelemetry.exporter")):
        raise ConfigurationError("setting serve.traces: packages are missing: pip install 'hotswap[traces]'")


@contextmanager
def exported_traces() -> Iterator[None]:
    """Send spans by OTLP over HTTP while the block runs, and what is left of them at its end; for this process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # type: ignore[import-not-found]
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def trace_answer(exposure: Exposure, *, operation: str) -> None:
    """Write the span of an answer that has just ended.

    Source: OpenTelemetry's semantic conventions for generative AI, spans of inference.
    """
    ended = time.time_ns()
    started = ended - int(exposure.total_ms * _NS_PER_MS)
    binding = exposure.binding
    span = trace.get_tracer(_SERVICE).start_span(
        f"{operation} {binding.alias}", kind=trace.SpanKind.INTERNAL, start_time=started
    )
    span.set_attributes(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _SERVICE,
            "gen_ai.request.model": binding.alias,
            "gen_ai.response.model": binding.version_label,
            "gen_ai.response.id": exposure.response_id,
            "gen_ai.response.finish_reasons": [exposure.finish_reason or "error"],
            "gen_ai.usage.input_tokens": exposure.prompt_tokens,
            "gen_ai.usage.output_tokens": exposure.completion_tokens,
            "hotswap.route": binding.route,
            "hotswap.arm": binding.arm or "",
        }
    )
    if exposure.ttft_ms is not None:
        span.add_event("gen_ai.first_token", timestamp=started + int(exposure.ttft_ms * _NS_PER_MS))
    if exposure.error is not None:
        span.set_status(trace.Status(trace.StatusCode.ERROR, exposure.error))
    span.end(ended)
