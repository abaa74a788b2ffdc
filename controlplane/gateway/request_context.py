"""One client's request on its way through the gateway."""

from __future__ import annotations

import zlib
from typing import Any, Final, Literal, TypeAlias

import msgspec

from controlplane.core.access.principal import ANONYMOUS
from controlplane.core.domain.request import Complexity, Priority
from controlplane.core.routing.endpoint_table import EndpointLoad
from controlplane.core.routing.router import RouteDecision
from controlplane.core.routing.tier_table import AUTO, Api, Route, RouteRequest, TierAccess
from controlplane.errors import BadRequest, shown
from controlplane.gateway.request_body import (
    Metadata,
    checked_name,
    parse,
    rewrite,
    without_mark,
)
from controlplane.gateway.request_inputs import inputs_of
from controlplane.gateway.stream_usage import ask_usage, spliced
from controlplane.http.messages import Request

COUNT_TOKENS: Final = "/v1/messages/count_tokens"
APIS: Final = {
    "/v1/chat/completions": Api.CHAT,
    "/v1/completions": Api.COMPLETIONS,
    "/v1/responses": Api.RESPONSES,
    "/v1/messages": Api.MESSAGES,
    COUNT_TOKENS: Api.MESSAGES,
    "/v1/embeddings": Api.EMBEDDINGS,
}
"""The routes that are relayed to engines."""

StreamKind: TypeAlias = Literal["chat", "completion"]
"""The types of streams that can be resumed."""
RESUME_KINDS: Final[dict[Api, StreamKind]] = {Api.CHAT: "chat", Api.COMPLETIONS: "completion"}
"""The APIs whose streams can be resumed, with the type of their streams."""

_COMPLEXITIES: Final = {str(complexity): complexity for complexity in Complexity}
_PRIORITIES: Final = {str(priority): priority for priority in Priority}
_TRUE: Final = msgspec.Raw(b"true")
_LOW: Final = Priority.LOW
_NORMAL: Final = Priority.NORMAL
_HINT_HEADERS: Final = frozenset(
    {b"x-session-id", b"x-complexity", b"x-agent-type", b"x-min-tier", b"x-priority"}
)
MAX_REQUEST_ID: Final = 128
MAX_NUMBER_CHARS: Final = 64
MAX_TIMEOUT_S: Final = 24 * 3600.0
MIN_COMMENTS_S: Final = 0.1


class RequestContext:
    """One request's parameters, and its state while it is served."""

    __slots__ = (
        "accusations", "api", "arrived_s", "attempts", "body", "caller", "comments_s", "deadline_s",
        "decision", "fields",
        "first_byte_s", "generated_tokens", "gpu_s", "identity", "losses", "next_gpu_s", "path", "principal",
        "prompt_tokens", "queued_s", "refused", "request", "request_id", "resumed", "route", "session",
        "span", "stream", "tried",
    )  # fmt: skip

    def __init__(self, request: Request, request_id: str, now_s: float, default_timeout_s: float) -> None:
        """Raises :class:`BadRequest` that names the header or member that is wrong."""
        body = request.body
        if body[:1] != b"{" or b"\0" in body[:4]:  # the usual body has nothing to take away or to refuse
            body = without_mark(body)
        fields = parse(body)
        self.request_id = request_id
        self.identity = request_id
        """The value of ``x-request-id`` for engines; if the request is traced, followed by the trace's header
        lines."""
        self.span: object = None
        """Set by :mod:`controlplane.gateway.telemetry.tracing`."""
        self.path = request.path
        self.api = APIS[request.path]
        self.body = body
        self.fields = fields
        self.stream = bool(fields.stream)
        self.arrived_s = now_s
        self.deadline_s = now_s + _timeout_s(request, fields.metadata, default_timeout_s)
        headers = request.headers
        self.comments_s = _comments_s(request) if b"x-stream-comments" in headers else None
        """How often comments are sent while its stream waits; 0 for never, None if the client did not say."""
        principal = self.principal = request.principal or ANONYMOUS
        self.caller = principal.team or principal.id
        """Among whom a full tier's slots are shared fairly."""
        hints = fields.metadata
        model = checked_name(fields.model, "model") if fields.model else AUTO
        models = fields.model_names() if fields.models else ()
        session = ""
        if hints is None and _HINT_HEADERS.isdisjoint(headers):  # the usual case
            self.request = RouteRequest(
                model,
                models,
                priority=_NORMAL if principal.max_priority is not _LOW else _LOW,
                api=self.api,
                prefix_key=fields.affinity_key(),
            )
        else:
            session = _text(request, hints, b"x-session-id", "session_id")
            self.request = RouteRequest(
                model=model,
                models=models,
                complexity=_one_of(request, hints, b"x-complexity", "complexity", _COMPLEXITIES),
                agent_type=_text(request, hints, b"x-agent-type", "agent_type") or None,
                min_tier=_text(request, hints, b"x-min-tier", "min_tier") or None,
                priority=principal.priority(_one_of(request, hints, b"x-priority", "priority", _PRIORITIES)),
                api=self.api,
                session_key=_hash(f"{self.caller}/{session}") if session else None,
                prefix_key=None if session else fields.affinity_key(),
            )
        if principal.tiers is not None or principal.models is not None:
            access = TierAccess(principal.tiers, principal.models)
            self.request = self.request._replace(access=access)
        self.session = session
        self.route: Route | None = None
        """The tiers that may serve the request; None until they are resolved."""
        self.decision: RouteDecision | None = None
        """The routing decision for the latest attempt or, while the request is queued, the decision to queue
        it."""
        self.tried: frozenset[str] = frozenset()
        """``EndpointLoad.key`` of the endpoints that earlier attempts used."""
        self.attempts = 0
        self.refused = 0
        """Attempts whose connection was refused."""
        self.losses = 0
        """Attempts that were lost with their engine."""
        self.accusations: list[Any] | None = None
        """Failed attempts for which it is not known yet whether the endpoint or the request is to blame
        (:mod:`controlplane.gateway.proxy.verdicts`)."""
        self.resumed = 0
        """How many times the stream was resumed."""
        self.first_byte_s = 0.0
        self.queued_s = 0.0
        """How long it has waited in the queue."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.gpu_s = 0.0
        """GPU time of all attempts so far (device time on engines without a GPU)."""
        self.next_gpu_s: float | None = None
        """What the next more capable tier would have taken; None if that is not known."""

    @property
    def tier(self) -> str:
        """The tier that serves the request or for which it is queued; empty before the first decision."""
        return self.decision.tier if self.decision is not None else ""

    def body_for(self, load: EndpointLoad, *, token_ids: bool, usage: bool = False) -> bytes:
        """The body for an endpoint: with the endpoint's model name, ``return_token_ids`` if ``token_ids``,
        and ``stream_options`` that ask for usage if ``usage``. Byte for byte what the client sent if nothing
        has to change."""
        members: dict[str, Any] = {}
        if self.fields.model != load.endpoint.model:
            members["model"] = load.endpoint.model
        if token_ids:
            members["return_token_ids"] = _TRUE
        if not members and not self.fields.models:
            if not usage:
                return self.body
            if not self.fields.stream_options:
                return spliced(self.body)
        if usage:
            members["stream_options"] = ask_usage(self.fields.stream_options)
        return rewrite(self.body, **members)


def route_request(request: Request) -> RouteRequest:
    """The routing parameters of a request, for ``POST /v1/route``."""
    asked = request.derived("/v1/chat/completions", request.headers, request.body)
    made = RequestContext(asked, "", 0.0, 1.0).request
    return made._replace(inputs=inputs_of(request.body))


def _hash(session: str) -> int:
    return zlib.crc32(session.encode())


def _text(request: Request, hints: Metadata | None, header: bytes, member: str) -> str:
    value = request.header(header)
    if value:
        return checked_name(value, header.decode())
    if hints is None:
        return ""
    hint: str | None = getattr(hints, member)
    return checked_name(hint, f"metadata.{member}") if hint else ""


def _one_of(
    request: Request, hints: Metadata | None, header: bytes, member: str, known: dict[str, Any]
) -> Any:
    value = _text(request, hints, header, member)
    if not value:
        return None
    found = known.get(value.lower())
    if found is None:
        name = header.decode() if request.header(header) else f"metadata.{member}"
        raise BadRequest(f"{name} must be one of {', '.join(known)}, not '{shown(value, 40)}'", param=name)
    return found


def _comments_s(request: Request) -> float | None:
    value = request.header(b"x-stream-comments")
    if not value:
        return None
    try:
        interval_s = float(value[:MAX_NUMBER_CHARS])
    except ValueError:
        interval_s = -1.0
    if interval_s == 0.0 or MIN_COMMENTS_S <= interval_s <= MAX_TIMEOUT_S:
        return interval_s
    limits = f"from {MIN_COMMENTS_S:g} to {MAX_TIMEOUT_S:g}, or 0 for none"
    raise BadRequest(f"x-stream-comments must be a number of seconds {limits}", param="x-stream-comments")


def _timeout_s(request: Request, hints: Metadata | None, default_s: float) -> float:
    name = "x-request-timeout-seconds"
    value: float | str | None = request.header(b"x-request-timeout-seconds")
    if not value:
        name = "metadata.timeout"
        value = hints.timeout if hints is not None else None
        if value is None:
            return default_s
    if isinstance(value, str):
        value = value if len(value) <= MAX_NUMBER_CHARS else ""
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = 0.0
    if not 0.0 < timeout_s <= MAX_TIMEOUT_S:
        raise BadRequest(f"{name} must be a number of seconds over 0 and up to {MAX_TIMEOUT_S:g}", param=name)
    return timeout_s
