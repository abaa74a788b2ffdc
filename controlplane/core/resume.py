"""May a broken stream go on at another endpoint, and would the client see any difference?

The gateway continues a stream with ``POST /v1/completions`` from the token ids of the prompt and of all
that was sent. With greedy decoding that gives the tokens that the undisturbed stream would have given.
:func:`judge` says where that is so, where the continuation is merely a good one, and where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from controlplane.core.tiers import Api


class ResumePolicy(StrEnum):
    """What is resumed."""

    EXACT = "exact"
    """Only what goes on as if nothing had happened."""
    BEST_EFFORT = "best_effort"
    """Also what may go on differently, but sensibly."""
    NEVER = "never"


class Resumable(StrEnum):
    """What a continuation would be worth."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    NO = "no"


class Verdict(NamedTuple):
    """Whether to resume, and why."""

    resumable: Resumable
    reason: str


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What a stream's request asked for and how far it came."""

    api: Api = Api.CHAT
    choices: int = 1
    """``n``."""
    beam_search: bool = False
    echo: bool = False
    tools: bool = False
    """Tools are offered and the model may call them."""
    tool_call_begun: bool = False
    """A part of a tool call was sent."""
    guided: bool = False
    """A grammar, a JSON schema, a regular expression or a choice binds the output."""
    logprobs: bool = False
    greedy: bool = True
    """``temperature`` 0 (or ``top_k`` 1)."""
    seeded: bool = False
    output_penalties: bool = False
    """``presence_penalty`` or ``frequency_penalty`` is not 0. They count generated tokens only, and a
    continuation takes the tokens sent so far for a part of the prompt."""
    token_ids_known: bool = True
    """The ids of the prompt and of every token sent are at hand."""
    buffer_overflow: bool = False
    """The stream grew over the bound of what is kept of it."""
    engine_can: bool = True
    """The engine continues from token ids."""


def judge(facts: StreamFacts, policy: ResumePolicy) -> Verdict:
    """Whether a stream may be resumed under ``policy``. The first reason that applies is given."""
    impossible = _impossible(facts, policy)
    if impossible:
        return Verdict(Resumable.NO, impossible)
    inexact = _inexact(facts)
    if not inexact:
        return Verdict(Resumable.EXACT, "greedy decoding from token ids")
    if policy is ResumePolicy.EXACT:
        return Verdict(Resumable.NO, f"{inexact}, and the policy is 'exact'")
    return Verdict(Resumable.APPROXIMATE, inexact)


def _impossible(facts: StreamFacts, policy: ResumePolicy) -> str:
    if policy is ResumePolicy.NEVER:
        return "the policy is 'never'"
    reasons = (
        (facts.api not in {Api.CHAT, Api.COMPLETIONS}, f"{facts.api} streams can't be continued"),
        (not facts.engine_can, "the engine does not continue from token ids"),
        (facts.buffer_overflow, "more was sent than is kept for a resume"),
        (not facts.token_ids_known, "the token ids of what was sent are not known"),
        (facts.choices != 1, "there is more than one choice"),
        (facts.beam_search, "beam search has no single past"),
        (facts.tool_call_begun, "a tool call was begun"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _inexact(facts: StreamFacts) -> str:
    reasons = (
        (facts.tools, "a tool call after the break would come as text"),
        (facts.guided, "the grammar would start anew at the break"),
        (facts.logprobs, "the log probabilities would have a gap"),
        (facts.echo, "the prompt is echoed"),
        (facts.output_penalties, "presence and frequency penalties would forget what was sent"),
        (not facts.greedy and facts.seeded, "the seed's random numbers would start anew"),
        (not facts.greedy, "sampling without a seed is never repeatable"),
    )
    return next((reason for applies, reason in reasons if applies), "")
