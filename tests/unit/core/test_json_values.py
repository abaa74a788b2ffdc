"""Dataclasses as JSON values and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.json_values import StoredState, shifted, to_value


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


@dataclass(frozen=True, slots=True)
class Times:
    at_s: float
    until_s: float | None
    took_s: float


parts = st.builds(Part, st.text(), st.sampled_from(Colour))
wholes = st.builds(
    Whole,
    st.integers(-(2**53), 2**53),
    st.none() | st.floats(-(2.0**53), 2.0**53),
    st.lists(parts).map(tuple),
    st.none() | st.tuples(st.floats(0, 1), st.sampled_from(Colour)),
    st.lists(st.text()).map(tuple),
    st.none() | parts,
)


@given(wholes)
def test_a_value_reads_back_as_it_was_written(whole: Whole) -> None:
    stored = StoredState({"whole/a": json.loads(json.dumps(to_value(whole)))})
    assert stored.entries("whole/", Whole) == {"a": whole}
    assert stored.damaged == {}


def test_missing_fields_get_defaults_and_unknown_keys_are_ignored() -> None:
    stored = StoredState({"whole/a": {"number": 1, "ratio": None, "dropped_since": [1, 2]}})
    assert stored.entries("whole/", Whole) == {"a": Whole(1, None, more=("usual",))}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"ratio": 1.0}, "missing required field `number`"),
        ({"number": 1, "ratio": 1.0, "also": {"name": "a", "colour": "green"}}, "green"),
        ({"number": 1, "ratio": 1.0, "pair": [1.0]}, "length 2, got 1"),
        (None, "null"),
        ("text", "str"),
    ],
)
def test_a_damaged_entry_is_left_out_alone_and_named_with_the_reason(value: Any, words: str) -> None:
    stored = StoredState({"whole/a": value, "whole/b": {"number": 2, "ratio": 0.5}, "other/c": 3})
    assert stored.entries("whole/", Whole) == {"b": Whole(2, 0.5)}
    [(key, reason)] = stored.damaged.items()
    assert key == "whole/a"
    assert words in reason


def test_entries_without_a_dataclass_are_checked_too() -> None:
    stored = StoredState({"pair/a": [2, 5.5], "pair/b": [2], "pair/c": 1, "single": 7})
    assert stored.entries("pair/", tuple[int, float]) == {"a": (2, 5.5)}
    assert list(stored.damaged) == ["pair/b", "pair/c"]
    assert (stored.value("single", int), stored.value("none", int)) == (7, None)


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 2**53 + 1, 1e300]
)
def test_a_number_that_nothing_can_count_is_damage(number: float) -> None:
    stored = StoredState({"pair/a": [2, number], "pair/b": [2, 5.5], "deep": {"in": [{"it": number}]}})
    assert stored.entries("pair/", tuple[int, float]) == {"b": (2, 5.5)}
    assert stored.value("deep", dict[str, Any]) is None
    assert list(stored.damaged) == ["pair/a", "deep"]


def test_a_change_that_refuses_a_value_damages_it_alone() -> None:
    def checked(text: str) -> str:
        if not text:
            raise ValueError("it is empty")
        return text.upper()

    stored = StoredState({"name/a": "x", "name/b": ""})
    assert stored.entries("name/", str, checked) == {"a": "X"}
    assert stored.damaged == {"name/b": "it is empty"}


def test_times_are_shifted_and_none_stays() -> None:
    assert shifted(Times(1.0, None, 2.0), 10.0, "at_s", "until_s") == Times(11.0, None, 2.0)
    assert shifted(Times(1.0, 3.0, 2.0), -1.0, "at_s", "until_s") == Times(0.0, 2.0, 2.0)
