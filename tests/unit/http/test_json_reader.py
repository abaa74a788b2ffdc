"""Reading JSON from outside."""

from __future__ import annotations

import msgspec
import pytest

from controlplane.http.json_reader import InvalidJson, reader, utf8


class _Kind(msgspec.Struct):
    name: str | None = None


_read = reader(_Kind)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{nope", "not JSON"),
        (b'{"name":NaN}', "not JSON"),
        (b'{"other":Infinity}', "not JSON"),
        (b'{"name":"\xff"}', "not UTF-8"),
        (b'{"name":"\\ud800"}', "half of a surrogate pair"),
        (b'{"name":"\\udc00"}', "half of a surrogate pair"),
        (b'{"name":1}', "Expected `str | null`"),
        (b'{"name":%b}' % (b"1" * 5000), "is wrong"),
        (b'{"other":%b%b}' % (b"[" * 1500, b"]" * 1500), "nested too deep"),
        (b'{"other":%b' % (b"[" * 100_000), "nested too deep"),
        (b"[" * 100_000, "is wrong"),
    ],
)
def test_what_can_not_be_read_is_told_in_words(text: bytes, says: str) -> None:
    with pytest.raises(InvalidJson, match=says.replace("|", r"\|")):
        _read(text)


def test_a_wrong_type_names_its_member() -> None:
    with pytest.raises(InvalidJson) as caught:
        _read(b'{"name":[]}')
    assert caught.value.member == "name"


def test_a_long_or_unprintable_part_of_the_text_is_not_repeated() -> None:
    read = reader(msgspec.defstruct("Strict", [], forbid_unknown_fields=True))
    with pytest.raises(InvalidJson) as caught:
        read(b'{"\\u001b]0;title%b":1}' % (b"a" * 100_000))
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_huge_numbers_and_repeated_members_that_are_skipped_do_no_harm() -> None:
    assert _read(b'{"other":%b,"name":"a","name":"b"}' % (b"1" * 100_000)).name == "b"


@pytest.mark.parametrize("text", [b"{}", b"\xef\xbb\xbf{}"])
def test_a_byte_order_mark_of_utf_8_is_taken_off(text: bytes) -> None:
    assert utf8(text) == b"{}"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_encodings_are_named(encoding: str) -> None:
    with pytest.raises(InvalidJson, match="UTF-16"):
        utf8('{"model":"a"}'.encode(encoding))


def test_members_that_are_skipped_must_be_utf_8_too() -> None:
    assert utf8('{"x":"é"}'.encode()) == '{"x":"é"}'.encode()
    with pytest.raises(InvalidJson, match="not UTF-8"):
        utf8('{"x":"é"}'.encode("latin-1"))
