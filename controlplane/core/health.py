"""An endpoint's life as a transition table.

A state that is not listed under the current one is an illegal move: it raises
:class:`~controlplane.errors.IllegalTransition` and changes nothing. The table is closed under "and then":
whoever sees states only now and then (the controller gets heartbeats) never takes a legal life for an
illegal one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from controlplane.core.domain import Endpoint, EndpointState
from controlplane.errors import IllegalTransition

_S = EndpointState

MOVES: Mapping[EndpointState, frozenset[EndpointState]] = MappingProxyType(
    {
        _S.STARTING: frozenset({_S.READY, _S.RESTARTING, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.READY: frozenset({_S.RESTARTING, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.RESTARTING: frozenset({_S.READY, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.DRAINING: frozenset({_S.STOPPED}),
        _S.FAILED: frozenset({_S.RESTARTING, _S.READY, _S.DRAINING, _S.STOPPED}),
        _S.STOPPED: frozenset(),
    }
)
"""From each state, where an endpoint may go. Staying is no move and always allowed."""

SERVING = frozenset({_S.READY})
"""States in which an endpoint takes new requests."""

ENDED = frozenset({_S.FAILED, _S.STOPPED})
"""States that an endpoint does not come back from by itself; a failed one can be revived by hand."""


def check(current: EndpointState, new: EndpointState) -> None:
    """Raise IllegalTransition unless an endpoint in ``current`` may be found in ``new``."""
    if new != current and new not in MOVES[current]:
        raise IllegalTransition(f"an endpoint that is {current} can't become {new}")


def move(
    endpoint: Endpoint,
    state: EndpointState,
    *,
    unix_s: float,
    phase: str | None = None,
    diagnosis: str | None = None,
) -> Endpoint:
    """The endpoint in ``state``, entered at ``unix_s``; staying keeps the time it was entered.

    ``phase`` and ``diagnosis`` are kept where they are None. Raises IllegalTransition.
    """
    check(endpoint.state, state)
    return replace(
        endpoint,
        state=state,
        since_unix_s=endpoint.since_unix_s if state == endpoint.state else unix_s,
        phase=endpoint.phase if phase is None else phase,
        diagnosis=endpoint.diagnosis if diagnosis is None else diagnosis,
    )
