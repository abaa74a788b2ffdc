"""What a request needs of an engine beyond its API: images, audio, video, tools.

Only looked for while an endpoint is known to lack one of these, and without decoding the body: the types of
content parts are matched as JSON writes them, which can't occur in a string, where quotes are escaped.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from controlplane.core.routing.tier_table import INPUT_BITS, Input

_MARKS: Final = (
    (b"image", INPUT_BITS[Input.IMAGES], re.compile(rb'"type"\s*:\s*"(?:image|image_url|input_image)"')),
    (b"audio", INPUT_BITS[Input.AUDIO], re.compile(rb'"type"\s*:\s*"(?:audio|audio_url|input_audio)"')),
    (b"video", INPUT_BITS[Input.VIDEO], re.compile(rb'"type"\s*:\s*"(?:video|video_url|input_video)"')),
    (b'"tools"', INPUT_BITS[Input.TOOLS], re.compile(rb'"tools"\s*:\s*\[\s*\{')),
)
MAX_PARTS: Final = 200_000
"""A long body that may have more types and tools than this is left to the engine: examining each would
block other requests for half a second."""
MAX_NAMED_BYTES: Final = 1024 * 1024
"""In a longer body, the part that is not accepted is not named by its position."""

_decode: Final = msgspec.json.Decoder().decode


def inputs_of(body: bytes) -> int:
    """What a body contains, as bits of :data:`INPUT_BITS`; 0 if it has more parts than are searched."""
    if len(body) > MAX_NAMED_BYTES and body.count(b'"t') > MAX_PARTS:
        return 0
    found = 0
    for mark, bit, pattern in _MARKS:
        if mark in body and pattern.search(body) is not None:
            found |= bit
    return found


def first_part(body: bytes, lacking: int) -> str | None:
    """The member of the body that the engines can't take, such as ``messages[0].content[1]``; ``lacking`` are
    bits of :data:`INPUT_BITS`. None if its position is not known."""
    if lacking == INPUT_BITS[Input.TOOLS]:
        return "tools"
    if len(body) > MAX_NAMED_BYTES:
        return None
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    for name in ("messages", "input"):
        items = value.get(name) if isinstance(value, dict) else None
        for i, item in enumerate(items if isinstance(items, list) else ()):
            if _is_lacking(item, lacking):
                return f"{name}[{i}]"
            parts = item.get("content") if isinstance(item, dict) else None
            for j, part in enumerate(parts if isinstance(parts, list) else ()):
                if _is_lacking(part, lacking):
                    return f"{name}[{i}].content[{j}]"
    return None


def _is_lacking(part: Any, lacking: int) -> bool:
    if not isinstance(part, dict):
        return False
    kind = f'"type":"{part.get("type")}"'.encode()
    return any(bit & lacking and pattern.search(kind) is not None for _, bit, pattern in _MARKS)
