"""All errors that tierplane raises deliberately, in one tree.

    TierplaneError
    ├── ConfigError                a configuration file is invalid; lists all its problems
    ├── SetupError                 the machine or environment lacks something; the message names the remedy
    ├── EngineError                an engine process can't be started or was lost
    │   └── EngineStartError       … and starting it again would not help
    ├── IllegalTransition          a life-cycle table has no such transition; nothing was changed
    ├── NotSettled                 the controller has just started and can't tell yet; ask again later
    ├── ControllerUnavailable      the controller can't be reached now; Ray restarts it
    └── RequestError               returned to a client as OpenAI-shaped JSON
        ├── BadRequest             400
        ├── Unauthorized           401
        ├── Forbidden              403
        ├── UnknownModel           404
        ├── UnknownRoute           404
        ├── WrongMethod            405
        ├── DeadlineExceeded       408
        ├── RequestTooSlow         408
        ├── PayloadTooLarge        413
        ├── UnsupportedEncoding    415
        ├── TooManyRequests        429, with Retry-After
        ├── UnknownMethod          501
        ├── EngineFailed           502, or the engine's own status
        ├── EngineRefused          the status with which the engine rejected the request
        ├── EndpointLost           502
        ├── NoEndpoint             503, with Retry-After
        ├── GatewayExhausted       503, with Retry-After
        ├── KeysUnknown            503, with Retry-After
        └── ControllerUnreachable  503, with Retry-After; for operators' pages only, never for inference

An infeasible placement, a full queue and a recommendation to do nothing are values, not errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_CHARS = 80


def shown(text: str, limit_chars: int = SHOWN_CHARS) -> str:
    """A client's text for a message or a log: shortened, and with control characters and the like escaped."""
    if len(text) > limit_chars:
        text = text[: limit_chars - 1] + "…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class TierplaneError(Exception):
    """The root of the error tree."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a configuration: its path, what is wrong, and the remedy."""

    path: str
    message: str
    remedy: str = ""
    line: int = 0
    """The line in the file, counted from 1; 0 if the values don't come from a file."""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        text = f"line {self.line}: {text}" if self.line else text
        return f"{text} ({self.remedy})" if self.remedy else text


class ConfigError(TierplaneError):
    """A configuration is invalid; ``problems`` lists all problems, in the file's order."""

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        head = f"{source}: " if source else ""
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{head}{count} problem{'' if count == 1 else 's'}\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...], str]]:
        return type(self), (self.problems, self.source)


class SetupError(TierplaneError):
    """The machine or the environment lacks something; the message names the remedy."""


class EngineError(TierplaneError):
    """An engine process can't be started or was lost; starting it again may help."""


class EngineStartError(EngineError):
    """An engine can't be started and trying again would not help (bad flag, missing model, …)."""


class IllegalTransition(TierplaneError):
    """A life cycle has no such transition. The state is unchanged."""


class NotSettled(TierplaneError):
    """The controller has just started. Ask again later; until then its previous response stays valid."""


class ControllerUnavailable(TierplaneError):
    """The controller can't be reached now; Ray restarts it."""


class RequestError(TierplaneError):
    """The failure of a request as the client sees it.

    ``status`` is the HTTP status; ``kind``, ``code`` and ``param`` are OpenAI's ``error.type``,
    ``error.code`` and ``error.param``; ``retry_after_s`` becomes the ``Retry-After`` header (whole seconds,
    rounded up). ``final`` becomes ``x-should-retry: false``, for statuses that SDKs would try again.
    """

    status: int = 500
    kind: str = "server_error"
    code: str = "internal_error"
    final: bool = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(RequestError):
    """The request is invalid (400)."""

    status = 400
    kind = "invalid_request_error"
    code = "bad_request"


class Unauthorized(RequestError):
    """The request has no valid API key or token (401)."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    """The request is not allowed (403): its key may not do this, or a page on another site, or one that has
    taken over a host name, may have sent it."""

    status = 403
    kind = "permission_error"
    code = "forbidden"

    def __init__(self, message: str, *, param: str | None = None, code: str = "") -> None:
        super().__init__(message, param=param)
        if code:
            self.code = code


class UnknownModel(RequestError):
    """There is no tier or model of that name (404)."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class UnknownRoute(RequestError):
    """There is no such route (404)."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_url"


class WrongMethod(RequestError):
    """The route takes ``method`` and not the request's (405)."""

    status = 405
    kind = "invalid_request_error"
    code = "method_not_supported"

    def __init__(self, message: str, *, method: str) -> None:
        super().__init__(message)
        self.allow = "GET, HEAD" if method == "GET" else method
        """The value of the header ``Allow``."""


class DeadlineExceeded(RequestError):
    """The deadline passed before the response was complete (408; an error event in a started stream)."""

    status = 408
    kind = "timeout_error"
    code = "deadline_exceeded"
    final = True


class RequestTooSlow(RequestError):
    """The client did not send its request in time (408)."""

    status = 408
    kind = "timeout_error"
    code = "request_too_slow"


class PayloadTooLarge(RequestError):
    """The body is larger than ``gateway.max_body_bytes`` (413)."""

    status = 413
    kind = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedEncoding(RequestError):
    """The body's ``Content-Encoding`` is not one that the server decodes (415)."""

    status = 415
    kind = "invalid_request_error"
    code = "unsupported_content_encoding"


class UnknownMethod(RequestError):
    """The server does not know the request's method (501)."""

    status = 501
    kind = "invalid_request_error"
    code = "unknown_method"


class TooManyRequests(RequestError):
    """The queue is full or a rate limit was hit (429)."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class EngineFailed(RequestError):
    """Every engine that was tried failed the request; ``status`` is the status of the last one (5xx)."""

    status = 502
    kind = "server_error"
    code = "engine_error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        code: str = "engine_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status
        self.code = code


class EngineRefused(RequestError):
    """An engine rejected the request, as any other would: the error is the request's. ``status`` is the
    engine's own, and so are ``kind``, ``code`` and ``param`` as far as it gave them."""

    status = 400
    kind = "invalid_request_error"
    code = "bad_request"
    final = True

    def __init__(
        self, message: str, *, status: int, kind: str = "", code: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.kind = kind or (type(self) if status < RequestError.status else RequestError).kind
        self.code = code or (type(self) if status < RequestError.status else EngineFailed).code


class EndpointLost(RequestError):
    """The engine was lost after tokens were sent and the stream could not be resumed (502)."""

    status = 502
    kind = "server_error"
    code = "endpoint_lost"


class NoEndpoint(RequestError):
    """No endpoint can serve the request now (503)."""

    status = 503
    kind = "server_error"
    code = "no_endpoint"


class GatewayExhausted(RequestError):
    """The gateway lacks file descriptors, ports or memory for another connection or request (503)."""

    status = 503
    kind = "server_error"
    code = "gateway_exhausted"


class KeysUnknown(RequestError):
    """This gateway has not yet learned the API keys from the controller (503)."""

    status = 503
    kind = "server_error"
    code = "keys_unknown"


class ControllerUnreachable(RequestError):
    """The page needs the controller, which can't be reached now (503)."""

    status = 503
    kind = "server_error"
    code = "controller_unavailable"
