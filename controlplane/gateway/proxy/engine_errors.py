"""Recognises an engine's error by its fields, in every shape in which engines write one.

An error may be the body of a response, with any status, or an event of a stream that began with 200. The
shapes differ: ``{"error": {…}}``, ``{"error": "text", "error_type": …}`` (TGI), ``{"object": "error", …}``
(vLLM, SGLang), a chunk of a chat with ``error`` (OpenRouter), ``{"type": "error", …}`` (Anthropic, OpenAI's
responses), ``event: error``, and a line ``error: {…}`` (older llama.cpp). What they have in common is read
into a :class:`EngineErrorReport`; its status says whose fault the error is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from html import unescape
from math import isnan
from typing import Any, Final, NamedTuple

import msgspec

from controlplane.http.messages import Headers

MAX_TEXT: Final = 300
"""Characters of an engine's message that clients and logs get."""
MAX_RETRY_AFTER_S: Final = 600.0
"""A longer ``Retry-After`` of an engine counts as this."""

NOT_THE_CLIENTS: Final = frozenset({401, 402, 403, 407, 408, 425, 429})
"""Statuses below 500 that another endpoint may not give: this one rejects the gateway's key or account, or is
busy or slow."""
BACK_PRESSURE: Final = frozenset({408, 425, 429, 503, 529})
"""The endpoint works and can't take the request now."""
UNREACHABLE: Final = frozenset({502, 504, *range(520, 528), 530})
"""A proxy in front of the engine could not reach it: never the request's fault."""

_decode: Final = msgspec.json.Decoder().decode
_encode: Final = msgspec.json.Encoder().encode
_LONG_BYTES: Final = 1024 * 1024
MAX_MEMBER_BYTES: Final = 64 * 1024
"""The longest member that is decoded of a response over 1 MiB."""
_error_members: Final = msgspec.json.Decoder(
    msgspec.defstruct(
        "_ErrorMembers",
        [
            (name, msgspec.Raw, msgspec.Raw())
            for name in (
                "error", "object", "type", "response", "message", "detail", "msg", "error_message",
                "error_type", "code", "status", "status_code", "statusCode", "http_status", "http_code",
            )
        ],
    )
).decode  # fmt: skip
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_STATUS_MEMBERS: Final = ("code", "status", "status_code", "statusCode", "http_status", "http_code")
_NAME_MEMBERS: Final = ("type", "code", "status", "error_type")
_STATUS_OF_NAME: Final = {
    name: status
    for status, names in {
        400: (
            "invalid_request_error", "invalid_request", "BadRequestError", "bad_request", "invalid_prompt",
            "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "context_length_exceeded",
            "ContextLengthExceededError", "ContextWindowExceededError", "exceed_context_size_error",
            "invalid_value", "invalid_type", "unsupported_value", "unsupported_parameter",
            "missing_required_parameter", "string_above_max_length", "ValueError", "content_filter",
            "content_policy_violation", "ContentPolicyViolationError", "VLLMValidationError",
            "image_parse_error", "invalid_image", "invalid_image_format", "invalid_base64_image",
            "image_too_large",
        ),
        401: ("authentication_error", "AuthenticationError", "invalid_api_key", "UNAUTHENTICATED"),
        402: ("billing_error", "insufficient_credits"),
        403: ("permission_error", "PermissionDeniedError", "PERMISSION_DENIED"),
        404: ("not_found_error", "NotFoundError", "not_found", "model_not_found"),
        408: ("timeout_error", "request_timeout"),
        413: ("request_too_large", "payload_too_large", "PayloadTooLargeError"),
        415: ("unsupported_media_type", "UnsupportedMediaTypeError"),
        422: ("validation", "validation_error", "UnprocessableEntityError", "unprocessable_entity"),
        429: (
            "rate_limit_error", "rate_limit_exceeded", "RateLimitError", "insufficient_quota",
            "too_many_requests", "RESOURCE_EXHAUSTED", "overloaded",
        ),
        500: ("server_error", "InternalServerError", "internal_error", "api_error", "generation"),
        501: ("not_supported_error", "NotImplementedError", "UNIMPLEMENTED"),
        503: ("unavailable_error", "ServiceUnavailableError", "service_unavailable", "UNAVAILABLE"),
        504: ("gateway_timeout", "DEADLINE_EXCEEDED"),
        529: ("overloaded_error",),
    }.items()
    for name in ("".join(filter(str.isalnum, text.lower())) for text in names)
}  # fmt: skip

_ERROR_MARK: Final = re.compile(rb'"error"|(?:^|[\r\n])(?:event: ?)?error')
_STREAM_START: Final = re.compile(rb"\s*(?:data|event|id|retry|error)?:")
_TAGS: Final = re.compile(r"(?is)<(script|style)\b.*?</\1\s*>|<[^>]*>")
_VARIABLE: Final = re.compile(r"(?i)\b(?:0x)?[0-9a-f]*[0-9][0-9a-f-]*\b|\b(?:req|chatcmpl|cmpl)[-_]\w+")


class EngineErrorReport(NamedTuple):
    """An error as an engine reported it."""

    status: int
    """The HTTP status that it carries; 0 if none is known."""
    message: str
    """What the engine says, at most :data:`MAX_TEXT` characters."""
    kind: str = ""
    """Its ``type``; empty if it has none."""
    code: str = ""
    """Its ``code``, if that is a word."""
    param: str | None = None
    is_no_answer: bool = False
    """The engine reported no error: its response is not a valid one."""

    @property
    def by_client(self) -> bool:
        """Whether the error is the client's, so that every other engine would give it, too."""
        return 400 <= self.status < 500 and self.status not in NOT_THE_CLIENTS


class StreamError(NamedTuple):
    """An error among the events of a stream."""

    report: EngineErrorReport
    offset: int
    """Where its event begins."""


# -- bodies ----------------------------------------------------------------------------------------------


def report_of(value: Any) -> EngineErrorReport | None:
    """The error in the decoded JSON of a response or an event; None if it is not an error."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if error:
        return _read(error, value)
    if value.get("object") == "error" or value.get("type") == "error":
        return _read(value, value)
    response = value.get("response")
    if isinstance(response, dict) and response.get("error"):
        return _read(response["error"], response)
    choices = value.get("choices")
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and choice.get("error"):
                return _read(choice["error"], choice)
    return None


def response_error(status: int, body: bytes) -> EngineErrorReport:
    """The error of a response whose status is 400 or more. A status 500 whose body carries a client's status
    counts as the client's."""
    try:
        value = _decode(body)
    except _UNREADABLE:
        return EngineErrorReport(status, plain_text(body) or "no text")
    report = report_of(value)
    if report is None:
        report = _read(value, value if isinstance(value, dict) else {})
    return report if status == 500 and report.by_client else report._replace(status=status)


def whole_error(body: bytes, content_type: bytes) -> EngineErrorReport | None:
    """What is wrong with the body of a response of status 200 that is not a stream; None if nothing is."""
    begin, end = body[:1], body[-1:]
    if begin not in b"{[" or end not in b"}]" or not begin:
        text = body.strip(b" \t\r\n\xef\xbb\xbf")
        if not text:
            return _no_answer("the engine's response is empty")
        if text[:1] not in b"{[" or text[-1:] not in b"}]":
            if content_type.lower().startswith((b"application/octet-stream", b"audio/", b"multipart/")):
                return None
            return _no_answer(f"the engine's response is not JSON: {plain_text(text)}")
    named = body.count(b'"error"')
    if not named or named == body.count(b'"error":null') + body.count(b'"error": null'):
        return None
    try:
        return report_of(_decode_members(body))
    except _UNREADABLE:
        return _no_answer(f"the engine's response is not JSON: {plain_text(body)}")


def _decode_members(text: bytes) -> Any:
    """JSON of an engine. Of a long one only the members that may name an error are decoded, and of those only
    the short ones: a response of 256 MiB may have more values than fit in memory."""
    if len(text) <= _LONG_BYTES or text[:64].lstrip()[:1] != b"{":
        return _decode(text) if len(text) <= _LONG_BYTES else None
    found = _error_members(text)
    value: dict[str, Any] = {}
    for name in found.__struct_fields__:
        raw = bytes(getattr(found, name))
        if raw:
            value[name] = _decode(raw) if len(raw) <= MAX_MEMBER_BYTES else plain_text(raw)
    return value


def _no_answer(text: str) -> EngineErrorReport:
    return EngineErrorReport(0, text, is_no_answer=True)


def plain_text(body: bytes) -> str:
    """The beginning of a body as one line of text, without the tags of HTML, at most :data:`MAX_TEXT`
    characters."""
    text = body[: 64 * MAX_TEXT].decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        text = unescape(_TAGS.sub(" ", text))
    return " ".join(text.split())[:MAX_TEXT]


def same_refusal(one: EngineErrorReport, other: EngineErrorReport) -> bool:
    """Whether two engines refused a request alike: the same status and, apart from numbers and ids, the same
    text."""
    return one.status == other.status and _fixed(one.message) == _fixed(other.message)


def retry_after_s(headers: Headers, now_unix_s: float) -> float | None:
    """The time of a ``Retry-After`` header (seconds or an HTTP date) or a ``retry-after-ms`` header, from 0
    to :data:`MAX_RETRY_AFTER_S`; None without such a header, or if it can't be read."""
    for name, value in headers:
        if name not in (b"retry-after", b"retry-after-ms"):
            continue
        text = value.decode("latin-1").strip()
        try:
            left_s = float(text) / (1000.0 if name == b"retry-after-ms" else 1.0)
        except ValueError:
            try:
                left_s = parsedate_to_datetime(text).timestamp() - now_unix_s
            except (ValueError, TypeError, OverflowError):
                continue
        if not isnan(left_s):
            return min(max(left_s, 0.0), MAX_RETRY_AFTER_S)
    return None


# -- events ----------------------------------------------------------------------------------------------


def is_event_stream(begin: bytes) -> bool:
    """Whether a body that begins like this is a stream of events, whatever its content type says."""
    return _STREAM_START.match(begin.removeprefix(b"\xef\xbb\xbf")) is not None


def stream_error(events: bytes) -> StreamError | None:
    """The first error among whole events; None if there is none. Generated text can't be taken for one: what
    looks like an error is decoded and read by its fields."""
    if b"error" not in events or _ERROR_MARK.search(events) is None:
        return None
    for name, data, offset in parsed(events):
        if name == "error" or b'"error"' in data:
            report = _event_error(name, data)
            if report is not None:
                return StreamError(report, offset)
    return None


def parsed(events: bytes) -> Iterator[tuple[str, bytes, int]]:
    """The name (often empty), the data and the offset of each event. A line ``error: …`` counts as data of an
    event of that name."""
    name = ""
    lines: list[bytes] = []
    begin = offset = 0
    for whole_line in events.splitlines(keepends=True):
        offset += len(whole_line)
        line = whole_line.rstrip(b"\r\n")
        if not line:
            if lines:
                yield name, b"\n".join(lines), begin
            name, lines, begin = "", [], offset
            continue
        member, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if member == b"data":
            lines.append(value)
        elif member == b"event":
            name = value.decode("latin-1")
        elif member == b"error":
            name = "error"
            lines.append(value)
    if lines:
        yield name, b"\n".join(lines), begin


def _event_error(name: str, data: bytes) -> EngineErrorReport | None:
    try:
        value = _decode_members(data)
    except _UNREADABLE:
        return EngineErrorReport(0, plain_text(data)) if name == "error" else None
    report = report_of(value)
    if report is None and name == "error":
        return _read(value, value if isinstance(value, dict) else {})
    return report


# -- fields ----------------------------------------------------------------------------------------------


def _read(error: Any, outer: dict[str, Any]) -> EngineErrorReport:
    """The fields of an error; ``outer`` is the object that contains it, or the error itself."""
    inner = error if isinstance(error, dict) else {}
    holders = (inner, outer)
    message = error if isinstance(error, str) else ""
    for holder in holders:
        for name in ("message", "detail", "msg", "error_message", "error"):
            if not message and isinstance(holder.get(name), str):
                message = holder[name]
    if not message:
        message = _encode(error).decode()
    kind = next((h[n] for h in holders for n in ("type", "error_type") if _is_word(h.get(n))), "")
    code: Any = inner.get("code")
    param = inner.get("param")
    return EngineErrorReport(
        _status(holders),
        " ".join(message.split())[:MAX_TEXT],
        kind[:MAX_TEXT],
        code[:MAX_TEXT] if _is_word(code) else "",
        param[:MAX_TEXT] if isinstance(param, str) else None,
    )


def _status(holders: tuple[dict[str, Any], ...]) -> int:
    for holder in holders:
        for name in _STATUS_MEMBERS:
            value = holder.get(name)
            if isinstance(value, str) and value.isdecimal() and len(value) == 3:
                value = int(value)
            if isinstance(value, int | float) and not isinstance(value, bool) and 400 <= value <= 599:
                return int(value)
    for holder in holders:
        for name in _NAME_MEMBERS:
            value = holder.get(name)
            if isinstance(value, str):
                found = _STATUS_OF_NAME.get("".join(filter(str.isalnum, value[:MAX_TEXT].lower())))
                if found is not None:
                    return found
    return 0


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", "error") and not value.isdecimal()


def _fixed(message: str) -> str:
    return _VARIABLE.sub("#", message.lower())
