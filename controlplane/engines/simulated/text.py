"""The simulated model's tokens: text ↔ ids, and the next token as a function of all ids before it.

The next token depends only on the ids before it, so a completion continued from ``prompt ids + generated
ids`` has the same tokens as an undisturbed run. This lets tests check without a model that a lost stream is
resumed correctly.

Ids: 0 ends the generated text, 1 marks its beginning, 16… are the model's words (in small letters, then
capitalised), 1024… are one to three raw bytes of text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

END = 0
"""Ends the generated text; has no text itself."""
ANSWER = 1
"""Ends a prompt: what follows is generated. Has no text itself."""

_WORDS_FROM = 16
_CAPITALS_FROM = _WORDS_FROM + 256
_WORDS_END = _CAPITALS_FROM + 256
_BYTES_FROM = 1024
_MASK = (1 << 64) - 1
_SEED = 0x243F6A8885A308D3
_MULTIPLIER = 0x9E3779B97F4A7C15

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st")
_RIMES = ("al", "an", "ar", "el", "en", "er", "il", "in", "ir", "ol", "on", "or", "ul", "un", "ur", "ay")
_WORDS = tuple(onset + rime for onset in _ONSETS for rime in _RIMES)

WORD_TEXT: dict[int, str] = {
    END: "",
    ANSWER: "",
    **{_WORDS_FROM + i: f" {word}" for i, word in enumerate(_WORDS)},
    **{_CAPITALS_FROM + i: word.capitalize() for i, word in enumerate(_WORDS)},
}
"""The text of every id that the model generates. None needs a JSON escape."""

_IDS = {text: token for token, text in WORD_TEXT.items() if text}
_PIECES = re.compile(r" ?[A-Za-z0-9]+|[^A-Za-z0-9]", re.DOTALL)


def encode(text: str) -> list[int]:
    """The ids of ``text``; :func:`decode` is the inverse."""
    ids: list[int] = []
    for piece in _PIECES.findall(text):
        ids += _of_piece(piece)
    return ids


@lru_cache(maxsize=65_536)
def _of_piece(piece: str) -> tuple[int, ...]:
    known = _IDS.get(piece)
    if known is not None:
        return (known,)
    raw = piece.encode("utf-8", "surrogatepass")
    return tuple(_pack(raw[start : start + 3]) for start in range(0, len(raw), 3))


def decode(ids: Sequence[int]) -> str:
    """The text of ``ids``. Unknown ids and broken UTF-8 become the replacement character."""
    parts = bytearray()
    for token in ids:
        word = WORD_TEXT.get(token)
        if word is not None:
            parts += word.encode()
        else:
            parts += _unpack(token)
    return parts.decode("utf-8", "replace")


def digest(ids: Sequence[int]) -> int:
    """The state after ``ids``: 64 bits that determine the next token."""
    state = _SEED
    for token in ids:
        state = ((state ^ token) * _MULTIPLIER) & _MASK
    return state


def next_tokens(state: int, previous: int, count: int) -> tuple[list[int], int]:
    """The next ``count`` tokens after ``state``, whose last id was ``previous``, and the state after them."""
    if count <= 0:
        return [], state
    first = (_WORDS_FROM if _WORDS_FROM <= previous < _WORDS_END else _CAPITALS_FROM) + (state >> 56)
    tokens = [first]
    state = ((state ^ first) * _MULTIPLIER) & _MASK
    for _ in range(count - 1):
        token = _WORDS_FROM + (state >> 56)
        tokens.append(token)
        state = ((state ^ token) * _MULTIPLIER) & _MASK
    return tokens, state


def generated_length(ids: Sequence[int]) -> int:
    """How many of ``ids`` are generated tokens: those after the last :data:`ANSWER`."""
    for back, token in enumerate(reversed(ids)):
        if token == ANSWER:
            return back
    return 0


def vector(ids: Sequence[int], dimensions: int) -> list[float]:
    """A unit vector that depends on ``ids`` alone; vectors of different texts are unrelated."""
    state = digest(ids)
    raw: list[float] = []
    for _ in range(dimensions):
        state = (state * _MULTIPLIER + 1) & _MASK
        raw.append((state >> 40) / (1 << 23) - 1.0)
    norm = sum(x * x for x in raw) ** 0.5 or 1.0
    return [x / norm for x in raw]


def _pack(raw: bytes) -> int:
    return _BYTES_FROM + (0, 0, 1 << 8, (1 << 8) + (1 << 16))[len(raw)] + int.from_bytes(raw, "big")


def _unpack(token: int) -> bytes:
    value = token - _BYTES_FROM
    for size in (1, 2, 3):
        if 0 <= value < 1 << 8 * size:
            return value.to_bytes(size, "big")
        value -= 1 << 8 * size
    return "\ufffd".encode()
