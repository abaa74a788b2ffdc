"""``/ui``: a page that shows the data of the gateway's JSON pages.

The page loads nothing else. Its Content-Security-Policy allows only its own script and style, by their
digests, so no other script can run, even if a diagnosis or a name contains one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Final

from controlplane.http.messages import Headers

_FILE: Final = Path(__file__).with_name("ui.html")


@cache
def page() -> tuple[Headers, bytes]:
    """Headers and body of the page."""
    text = _FILE.read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_digest(text, 'script')}; style-src {_digest(text, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ], text.encode()


def _digest(text: str, element: str) -> str:
    """The digest of the content of the page's only ``element``, in the syntax of a
    Content-Security-Policy."""
    [inner] = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
