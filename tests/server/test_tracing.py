"""Spans: one an answer, in the client's trace, with what the conventions name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapters.errors import ConfigurationError
from server import tracing
from server.tracing import check_tracing
from tests.support.engine import Site, on_site

_EXPORTER = InMemorySpanExporter()
_TRACE, _PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
_BODY = {"model": "legal", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": True}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans that were written during the test."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(_EXPORTER))
        trace.set_tracer_provider(provider)  # once a process
    _EXPORTER.clear()
    yield _EXPORTER
    _EXPORTER.clear()


def _ask(site: Site, headers: dict[str, str]) -> tuple[httpx.Response, ReadableSpan]:
    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/chat/completions", json=_BODY, headers=headers)

    response = on_site(site, scenario)
    # FastAPI adds spans of its own, of the request as a whole for one.
    (span,) = [span for span in _EXPORTER.get_finished_spans() if span.name.startswith("chat ")]
    return response, span


def test_span_tells_what_answered_when_an_answer_has_ended(site: Site, spans: InMemorySpanExporter) -> None:
    """Model, version, tokens and times; the first token lies within the span."""
    site.publish("legal", next(iter(site.adapters)))
    response, span = _ask(site, {})
    attributes = dict(span.attributes or {})
    usage = response.json()["usage"]
    assert "chat legal" == span.name
    assert ("legal", "legal@v1") == (attributes["gen_ai.request.model"], attributes["gen_ai.response.model"])
    assert response.json()["id"] == attributes["gen_ai.response.id"]
    assert ("length",) == attributes["gen_ai.response.finish_reasons"]
    tokens = attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]
    assert (usage["prompt_tokens"], 3) == tokens
    assert span.start_time is not None
    assert span.end_time is not None
    (first,) = span.events
    assert span.start_time < first.timestamp <= span.end_time


def test_span_belongs_to_the_clients_trace_when_it_names_one(site: Site, spans: InMemorySpanExporter) -> None:
    """By the W3C header; the next request, without it, begins a trace of its own."""
    site.publish("legal", next(iter(site.adapters)))
    _, span = _ask(site, {"traceparent": f"00-{_TRACE}-{_PARENT}-01"})
    assert int(_TRACE, 16) == span.context.trace_id
    spans.clear()
    _, other = _ask(site, {})
    assert int(_TRACE, 16) != other.context.trace_id


def test_span_has_an_error_when_the_answer_failed(
    site: Site, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason that the exposure holds."""
    version = site.publish("legal", next(iter(site.adapters)))
    (site.registry.store.folder(version.version.digest) / "adapter_model.safetensors").write_bytes(b"damaged")
    response, span = _ask(site, {})
    assert 500 == response.status_code
    assert trace.StatusCode.ERROR == span.status.status_code
    assert ("adapter_failed",) == dict(span.attributes or {})["gen_ai.response.finish_reasons"]


def test_traces_are_refused_when_their_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, and with the command that helps."""
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'hotswap\[traces\]'"):
        check_tracing()
