"""Islands, NUMA groups and distances."""

from __future__ import annotations

import pytest

from controlplane.core.placement.topology import (
    Distance,
    Gpu,
    Node,
    islands,
    numa_groups,
    spread_of,
)


def node(links: dict[int, list[int]], numa: list[int | None] | None = None, size: int = 4) -> Node:
    places = numa or [None] * size
    return Node(
        "n",
        tuple(
            Gpu(f"g{i}", i, nvlink_peers=frozenset(f"g{j}" for j in links.get(i, [])), numa_node=places[i])
            for i in range(size)
        ),
    )


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ({}, ((0,), (1,), (2,), (3,))),
        ({0: [1], 1: [0]}, ((0, 1), (2,), (3,))),
        ({1: [0]}, ((0, 1), (2,), (3,))),
        ({0: [2], 2: [3]}, ((0, 2, 3), (1,))),
        ({0: [1, 2, 3]}, ((0, 1, 2, 3),)),
        ({0: [7]}, ((0,), (1,), (2,), (3,))),
    ],
    ids=["no links", "a pair", "one end reports it", "through another", "all", "a peer that is not here"],
)
def test_islands(links: dict[int, list[int]], expected: tuple[tuple[int, ...], ...]) -> None:
    assert islands(node(links).gpus) == expected


def test_numa_groups() -> None:
    assert numa_groups(node({}, [1, 0, 1, 0]).gpus) == ((0, 2), (1, 3))
    assert numa_groups(node({}).gpus) == ((0, 1, 2, 3),)


def test_distances() -> None:
    here = node({0: [1]}, [0, 0, 0, 1])
    assert spread_of(here, ["g2"]) is Distance.SAME
    assert spread_of(here, ["g0", "g1"]) is Distance.ISLAND
    assert spread_of(here, ["g1", "g2"]) is Distance.NUMA
    assert spread_of(here, ["g0", "g1", "g3"]) is Distance.NODE
    with pytest.raises(KeyError):
        spread_of(here, ["h0"])
