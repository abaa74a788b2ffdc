"""Dataclasses as JSON values and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.json_values import from_value, shifted, to_value, under


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    colour: Colour


@dataclass(frozen=True, slots=True)
class Whole:
    number: int
    ratio: float | None
    parts: tuple[Part, ...] = ()
    pair: tuple[float, Colour] | None = None
    more: tuple[str, ...] = field(default_factory=lambda: ("usual",))
    also: Part | None = None


parts = st.builds(Part, st.text(), st.sampled_from(Colour))
wholes = st.builds(
    Whole,
    st.integers(-(2**53), 2**53),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.lists(parts).map(tuple),
    st.none() | st.tuples(st.floats(0, 1), st.sampled_from(Colour)),
    st.lists(st.text()).map(tuple),
    st.none() | parts,
)


@given(wholes)
def test_there_and_back_is_the_same(whole: Whole) -> None:
    assert from_value(Whole, json.loads(json.dumps(to_value(whole)))) == whole


def test_another_version_of_it_is_read_too() -> None:
    found = from_value(Whole, {"number": 1, "ratio": None, "dropped_since": [1, 2]})
    assert found == Whole(1, None)
    assert found.more == ("usual",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"ratio": 1.0}, "'number' of Whole is not there"),
        ({"number": 1, "ratio": 1.0, "also": {"name": "a", "colour": "green"}}, "green"),
        ({"number": 1, "ratio": 1.0, "pair": [1.0]}, "shorter"),
    ],
)
def test_what_can_not_be_read_is_said(value: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_value(Whole, value)


def test_times_move_and_none_stays() -> None:
    assert shifted({"at_s": 1.0, "until_s": None, "took_s": 2.0}, 10.0, "at_s", "until_s") == {
        "at_s": 11.0,
        "until_s": None,
        "took_s": 2.0,
    }


def test_keys_under_a_prefix_lose_it() -> None:
    assert under({"a/x": 1, "a/y": 2, "b/x": 3}, "a/") == {"x": 1, "y": 2}
