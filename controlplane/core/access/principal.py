"""Who a request comes from, once that was verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from controlplane.core.access.keys import KeyRecord
from controlplane.core.access.roles import Role
from controlplane.core.domain.request import Priority

_RANK: Final = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a key."""

    id: str
    """The key's id; empty if keys are not required."""
    name: str
    team: str = ""
    role: Role = Role.CLIENT
    tiers: frozenset[str] | None = None
    """The tiers that may serve its requests; None: all."""
    models: frozenset[str] | None = None
    """The models that it may ask for by name; None: all."""
    max_priority: Priority = Priority.NORMAL

    def priority(self, asked: Priority | None) -> Priority:
        """The priority of a request that asks for ``asked``, by default normal; never above the maximum."""
        wanted = Priority.NORMAL if asked is None else asked
        return wanted if _RANK[wanted] <= _RANK[self.max_priority] else self.max_priority


ANONYMOUS: Final = Principal("", "", role=Role.OPERATOR, max_priority=Priority.HIGH)
"""Everybody, while no keys are required."""


def principal_of(record: KeyRecord) -> Principal:
    """The owner of a key."""
    return Principal(
        id=record.key_id,
        name=record.name,
        team=record.team,
        role=record.role,
        tiers=frozenset(record.tiers) if record.tiers else None,
        models=frozenset(record.models) if record.models else None,
        max_priority=record.max_priority,
    )
