"""Every error that tierplane raises on purpose, in one tree.

    TierplaneError
    ├── ConfigError              a configuration file is wrong; holds every problem at once
    ├── SetupError               the machine lacks something; the message names the remedy
    ├── EngineError              an engine process can't be started or was lost
    │   └── EngineStartError     … and starting it again would not help
    ├── IllegalTransition        a life-cycle table has no such move; nothing was changed
    └── RequestError             answered to a client as OpenAI-shaped JSON
        ├── BadRequest           400
        ├── Unauthorized         401
        ├── Forbidden            403
        ├── UnknownModel         404
        ├── DeadlineExceeded     408
        ├── PayloadTooLarge      413
        ├── TooManyRequests      429, with Retry-After
        ├── EngineFailed         502, or what the engine answered
        ├── EndpointLost         502
        ├── NoEndpoint           503, with Retry-After
        └── ControllerUnreachable       503, with Retry-After; pages only, never inference

An infeasible placement, a queue that is full or a recommendation to do nothing are values, not errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TierplaneError(Exception):
    """The root of the tree."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration: where it stands, what is wrong, what to do."""

    path: str
    message: str
    remedy: str = ""
    line: int = 0
    """In the file it was read from, from 1; 0 if there is none."""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        text = f"line {self.line}: {text}" if self.line else text
        return f"{text} ({self.remedy})" if self.remedy else text


class ConfigError(TierplaneError):
    """A configuration is wrong; ``problems`` lists all that was found, in the file's order."""

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
    """A life cycle has no such move. The state is what it was before."""


class RequestError(TierplaneError):
    """A request's failure as the client sees it.

    ``status`` is the HTTP status, ``kind`` and ``code`` are OpenAI's ``error.type`` and ``error.code``,
    ``retry_after_s`` becomes the ``Retry-After`` header (whole seconds, rounded up).
    """

    status: int = 500
    kind: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(RequestError):
    """The request can't be understood (400)."""

    status = 400
    kind = "invalid_request_error"
    code = "bad_request"


class Unauthorized(RequestError):
    """No valid key (401)."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    """The key may not do this (403)."""

    status = 403
    kind = "permission_error"
    code = "forbidden"


class UnknownModel(RequestError):
    """No tier or model of that name (404)."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was whole (408; an error event in a stream)."""

    status = 408
    kind = "timeout_error"
    code = "deadline_exceeded"


class PayloadTooLarge(RequestError):
    """The body is over ``gateway.max_body_bytes`` (413)."""

    status = 413
    kind = "invalid_request_error"
    code = "payload_too_large"


class TooManyRequests(RequestError):
    """The queue is full or a rate limit was hit (429)."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class EngineFailed(RequestError):
    """Every engine that was tried failed the request; ``status`` is what the last one answered (5xx)."""

    status = 502
    kind = "server_error"
    code = "engine_error"

    def __init__(self, message: str, *, status: int = 502, code: str = "engine_error") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


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


class ControllerUnreachable(RequestError):
    """The controller, which alone can answer this page, can't be reached now (503)."""

    status = 503
    kind = "server_error"
    code = "controller_unavailable"
