"""Roles, and what each of them may do."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Permission(StrEnum):
    """What a route asks of the principal that uses it."""

    PUBLIC = "public"
    """Nothing: no key is needed."""
    KEY = "key"
    """Any valid key."""
    INFER = "infer"
    """Have a request served by a model."""
    READ = "read"
    """See the state of the plane, and everybody's usage."""
    OPERATE = "operate"
    """Change the plane: scale, drain, create keys …"""


class Role(StrEnum):
    """What a key is for."""

    CLIENT = "client"
    """Requests to models, and its own usage."""
    VIEWER = "viewer"
    """Reads everything that operators see, and changes nothing; may not use models."""
    OPERATOR = "operator"
    """Everything."""

    def allows(self, permission: Permission) -> bool:
        """Whether this role has the permission."""
        return permission in _ALLOWED[self]


_ANY: Final = frozenset({Permission.PUBLIC, Permission.KEY})
_ALLOWED: Final[Mapping[Role, frozenset[Permission]]] = MappingProxyType(
    {
        Role.CLIENT: _ANY | {Permission.INFER},
        Role.VIEWER: _ANY | {Permission.READ},
        Role.OPERATOR: frozenset(Permission),
    }
)
