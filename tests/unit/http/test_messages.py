"""Errors as clients see them."""

from __future__ import annotations

from controlplane.errors import NoEndpoint, TooManyRequests
from controlplane.http.messages import error_headers, error_value


def test_errors_are_openai_shaped() -> None:
    value = error_value(NoEndpoint("none"))
    assert value == {
        "error": {"message": "none", "type": "server_error", "param": None, "code": "no_endpoint"}
    }
    assert error_headers(TooManyRequests("full", retry_after_s=1.2)) == [(b"retry-after", b"2")]
