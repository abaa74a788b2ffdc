"""OpenTelemetry traces of requests, from the client's span to the engine's. Off unless configured.

The gateway creates one span per request, within the client's trace if the request has a W3C ``traceparent``.
It passes its own span on, so that an engine that traces (vLLM with ``otlp-traces-endpoint``) continues the
trace. A thread of the SDK sends the spans, never the request's own path.
"""

from __future__ import annotations

import time
from typing import Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from controlplane.core.domain.request import RequestOutcome
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import Request

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_FAILED: Final = frozenset({RequestOutcome.FAILED, RequestOutcome.SHED})


class Tracing:
    """Starts, propagates and ends the spans of one gateway replica."""

    def __init__(self, exporter: SpanExporter, gateway_id: str, ratio: float = 1.0) -> None:
        """``ratio`` is the share of the traces beginning here that are recorded. A trace that a client began
        is recorded if the client records it."""
        resource = Resource.create({"service.name": "tierplane-gateway", "service.instance.id": gateway_id})
        # shutdown_on_exit would delay the exit of the process if the collector is unreachable.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tierplane")

    def begin(self, context: RequestContext, request: Request) -> None:
        """Start the request's span. Every attempt propagates it to the engine."""
        carrier = {}
        for name in ("traceparent", "tracestate"):
            value = request.header(name.encode())
            if value:
                carrier[name] = value
        parent = _PROPAGATOR.extract(carrier)
        span = self._tracer.start_span(request.path, parent, kind=trace.SpanKind.SERVER)
        passed_on: dict[str, str] = {}
        _PROPAGATOR.inject(passed_on, trace.set_span_in_context(span))
        context.span = span
        # A client's value may hold anything except the end of a line, which the server's parser rejects.
        context.identity = "\r\n".join(
            [context.request_id, *(f"{name}: {value}" for name, value in passed_on.items())]
        )

    def end(self, context: RequestContext, outcome: RequestOutcome, reason: str, now_s: float) -> None:
        """End the request's span with its outcome and the time of its first byte."""
        span = context.span
        if not isinstance(span, Span) or not span.is_recording():
            return
        attributes: dict[str, str | int | bool] = {
            "tierplane.request_id": context.request_id,
            "tierplane.tier": context.tier,
            "tierplane.outcome": outcome.value,
            "tierplane.reason": reason,
            "tierplane.attempts": context.attempts,
            "tierplane.resumed": context.resumed,
            "tierplane.stream": context.stream,
            "gen_ai.request.model": context.request.model,
        }
        span.set_attributes(attributes)
        if context.first_byte_s:
            age_ns = round((now_s - context.first_byte_s) * 1e9)
            span.add_event("first byte", timestamp=time.time_ns() - age_ns)
        if outcome in _FAILED:
            span.set_status(trace.StatusCode.ERROR, reason)
        span.end()

    def close(self) -> None:
        """Send the remaining spans, for at most two seconds, and stop the thread."""
        self._provider.force_flush(2000)
        self._provider.shutdown()


def otlp_tracing(endpoint: str, gateway_id: str, ratio: float) -> Tracing:
    """Tracing to a collector's OTLP/HTTP URL, such as ``http://collector:4318/v1/traces``."""
    # Imported only when needed, because the import takes a third of a second.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint=endpoint, timeout=5), gateway_id, ratio)
