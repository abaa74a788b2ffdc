"""What an operator means by a name: a GPU, a node, a tier or an endpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

MIN_PREFIX = 4
"""An id may be cut short to so many characters, where that names one thing only."""


class SubjectKind(StrEnum):
    """What can be named."""

    GPU = "GPU"
    NODE = "node"
    TIER = "tier"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing, by its full id."""

    kind: SubjectKind
    id: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


def find_subject(
    name: str,
    *,
    gpus: Collection[str],
    nodes: Collection[str],
    tiers: Collection[str],
    endpoints: Collection[str],
) -> Subject | str:
    """What ``name`` says, by its full id or a beginning of it that names one thing; or why nothing."""
    groups = (
        (SubjectKind.TIER, tiers),
        (SubjectKind.ENDPOINT, endpoints),
        (SubjectKind.GPU, gpus),
        (SubjectKind.NODE, nodes),
    )
    for kind, ids in groups:
        if name in ids:
            return Subject(kind, name)
    if len(name) >= MIN_PREFIX:
        found = [Subject(kind, each) for kind, ids in groups for each in ids if each.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(sorted(str(each) for each in found)[:4])
            return f"'{name}' names {len(found)} things: {some}{', …' if len(found) > 4 else ''}"
    return (
        f"there is no GPU, node, tier or endpoint named '{name}': "
        "`tierplane gpus` and `tierplane status` list what there is"
    )
