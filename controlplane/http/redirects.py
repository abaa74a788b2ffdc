"""Which redirects are followed: only those that stay at the same host, which gets the key and the body."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urljoin, urlsplit, urlunsplit

MAX_REDIRECTS: Final = 3
"""Redirects that are followed for one request."""
_TARGET: Final = re.compile(r"[!-~]+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_SHOWN_CHARS: Final = 200


def redirect_target(url: str, location: str) -> str | None:
    """The URL, without a fragment, to which ``Location: location`` leads in the response from ``url``. None
    if it may not be followed: only the same origin may, or the same host with https instead of http."""
    try:
        old, new = urlsplit(url), urlsplit(urljoin(url, location))
        old_port = old.port or _DEFAULT_PORTS.get(old.scheme)
        new_port = new.port or _DEFAULT_PORTS.get(new.scheme)
    except ValueError:
        return None
    same_origin = new.scheme == old.scheme and new_port == old_port
    upgrade = old.scheme == "http" and new.scheme == "https"
    if not location or new.hostname != old.hostname or not (same_origin or upgrade) or "@" in new.netloc:
        return None
    target = urlunsplit((new.scheme, new.netloc, new.path or "/", new.query, ""))
    return target if _TARGET.fullmatch(target) else None


def shown_location(location: str) -> str:
    """A ``Location`` for error messages: without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return "an invalid address"
    text = urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))
    text = "".join(character for character in text if character.isprintable())
    return text[:_SHOWN_CHARS] or "nowhere"
