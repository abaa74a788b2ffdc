from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.engines.simulated.batching import Finish, Generation, GenerationRequest
from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.engines.simulated.text import (
    ANSWER,
    END,
    decode,
    digest,
    encode,
    generated_length,
    next_tokens,
    vector,
)


@given(st.text())
def test_decode_is_the_inverse_of_encode(text: str) -> None:
    assert decode(encode(text)) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_words_are_one_token_and_other_text_about_three_bytes_each() -> None:
    assert len(encode("Mal bran ren")) == 3
    assert len(encode("abcdefghi")) == 3


def test_unknown_ids_are_no_error() -> None:
    assert decode([999, 5, 1 << 40]) == "\ufffd" * 3


@given(st.lists(st.integers(0, 100_000), min_size=1), st.integers(1, 40), st.integers(0, 39))
def test_continuing_from_any_point_gives_the_undisturbed_tokens(
    prompt: list[int], count: int, cut: int
) -> None:
    cut = min(cut, count)
    whole, _ = next_tokens(digest(prompt), prompt[-1], count)
    resumed = prompt + whole[:cut]
    rest, _ = next_tokens(digest(resumed), resumed[-1], count - cut)
    assert whole[:cut] + rest == whole


def test_different_prompts_get_different_responses() -> None:
    first, _ = next_tokens(digest(encode("one")), ANSWER, 20)
    second, _ = next_tokens(digest(encode("two")), ANSWER, 20)
    assert first != second


@pytest.mark.parametrize(
    ("ids", "count"),
    [([5, 6, ANSWER], 0), ([5, ANSWER, 20, 21], 2), ([5, 6], 0), ([ANSWER, 3, ANSWER, 4], 1)],
)
def test_position_counts_from_the_last_marker(ids: list[int], count: int) -> None:
    assert generated_length(ids) == count


def test_vectors_are_of_length_one_and_depend_on_the_text() -> None:
    one = vector(encode("one"), 16)
    assert sum(x * x for x in one) == pytest.approx(1.0)
    assert one == vector(encode("one"), 16)
    assert one != vector(encode("two"), 16)


class Nowhere:
    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        raise AssertionError("a generation does not emit by itself")

    def truncate(self) -> None:
        raise AssertionError("a generation is not cut by itself")


def take_all(
    generation_request: GenerationRequest, settings: SimulatedSettings, step: int = 1000
) -> tuple[list[int], str, Finish]:
    generation = Generation(generation_request, settings, Nowhere(), 0.0)
    ids: list[int] = []
    text, finish = b"", None
    while finish is None:
        some, texts, finish = generation.take(step)
        ids += some
        text += b"".join(texts)
    return ids, text.decode(), finish


PROMPT = (*encode("user: hello\n"), ANSWER)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_response_ends_by_itself_with_an_end_token(step: int) -> None:
    ids, _, finish = take_all(GenerationRequest(PROMPT), SimulatedSettings(tokens=10), step)
    assert (len(ids), ids[-1], finish.reason) == (11, END, "stop")


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_max_tokens_cuts_shorter(step: int) -> None:
    ids, _, finish = take_all(GenerationRequest(PROMPT, max_tokens=4), SimulatedSettings(tokens=10), step)
    assert (len(ids), finish.reason) == (4, "length")


def test_max_tokens_of_the_whole_response_leaves_no_room_for_the_end_token() -> None:
    ids, _, finish = take_all(GenerationRequest(PROMPT, max_tokens=10), SimulatedSettings(tokens=10))
    assert (len(ids), finish.reason) == (10, "length")


@pytest.mark.parametrize(
    "generation_request",
    [GenerationRequest(PROMPT, max_tokens=30, ignore_eos=True), GenerationRequest(PROMPT, 30, min_tokens=30)],
)
def test_longer_than_its_natural_length_on_request(generation_request: GenerationRequest) -> None:
    ids, _, finish = take_all(generation_request, SimulatedSettings(tokens=10))
    assert (len(ids), finish.reason) == (30, "length")


def test_a_resumed_response_ends_where_the_undisturbed_one_does() -> None:
    settings = SimulatedSettings(tokens=10)
    whole, text, _ = take_all(GenerationRequest(PROMPT), settings)
    rest, rest_text, finish = take_all(GenerationRequest((*PROMPT, *whole[:4])), settings)
    assert whole[:4] + rest == whole
    assert text.endswith(rest_text)
    assert finish.reason == "stop"


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_stop_string_over_token_borders_is_cut_off(step: int) -> None:
    _, whole, _ = take_all(GenerationRequest(PROMPT, max_tokens=8), SimulatedSettings())
    stop = whole[len(whole) // 2 - 2 : len(whole) // 2 + 4]
    ids, text, finish = take_all(
        GenerationRequest(PROMPT, max_tokens=8, stop=("nothing like it", stop)), SimulatedSettings(), step
    )
    assert text == whole[: whole.index(stop)]
    assert (finish.reason, finish.stop_string) == ("stop", stop)
    assert len(ids) < 8


def test_text_withheld_for_a_stop_string_is_not_lost() -> None:
    _, whole, _ = take_all(GenerationRequest(PROMPT, max_tokens=8), SimulatedSettings())
    _, text, finish = take_all(
        GenerationRequest(PROMPT, max_tokens=8, stop=("a stop that never comes",)), SimulatedSettings(), 1
    )
    assert (text, finish.reason) == (whole, "length")
