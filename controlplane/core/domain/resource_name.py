"""Resolves the name that an operator gave: to a GPU, a node, a tier or an endpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

MIN_PREFIX = 4
"""An id may be abbreviated to this many characters or more, if the abbreviation is unambiguous."""


class ResourceKind(StrEnum):
    """What an operator can name."""

    GPU = "GPU"
    NODE = "node"
    TIER = "tier"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class ResourceName:
    """One resource, by its full id."""

    kind: ResourceKind
    id: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


def find_resource(
    name: str,
    *,
    gpus: Collection[str],
    nodes: Collection[str],
    tiers: Collection[str],
    endpoints: Collection[str],
) -> ResourceName | str:
    """The resource with the id ``name``, or the only one whose id begins with it; else why there is none."""
    groups = (
        (ResourceKind.TIER, tiers),
        (ResourceKind.ENDPOINT, endpoints),
        (ResourceKind.GPU, gpus),
        (ResourceKind.NODE, nodes),
    )
    for kind, ids in groups:
        if name in ids:
            return ResourceName(kind, name)
    if len(name) >= MIN_PREFIX:
        found = [ResourceName(kind, each) for kind, ids in groups for each in ids if each.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(sorted(str(each) for each in found)[:4])
            return f"'{name}' matches {len(found)} resources: {some}{', …' if len(found) > 4 else ''}"
    return (
        f"there is no GPU, node, tier or endpoint named '{name}': "
        "`tierplane gpus` and `tierplane status` list what there is"
    )
