"""``tierplane nodes`` as a table."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from controlplane.cli.operating.nodes import node_table
from controlplane.core.gpus.node_views import DiskView, NodeView
from controlplane.core.telemetry.series import Freshness
from tests.support.samples import GIB

NODE = NodeView(
    node_id="0123456789abcdef",
    hostname="host-a",
    freshness=Freshness.FRESH,
    age_s=1.0,
    cordoned="",
    cpu_count=8,
    cpu_ratio=0.25,
    load_1m=2.5,
    memory_total_bytes=64 * GIB,
    memory_available_bytes=16 * GIB,
    disks=(DiskView("/run/tierplane", 100 * GIB, 4 * GIB), DiskView("/tmp", 10 * GIB, 9 * GIB)),
    gpus=2,
)


def shown(*nodes: NodeView) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(node_table(nodes))
    return capture.get()


def test_a_node_is_a_row_and_each_further_disk_another() -> None:
    lines = shown(NODE).splitlines()
    assert len(lines) == 3
    for part in (
        "0123456789ab",
        "host-a",
        "25%",
        "2.5",
        "16.0 of 64.0 GiB free",
        "4.0 of 100.0 GiB free",
        "1 s ago",
    ):
        assert part in lines[1]
    assert "9.0 of 10.0 GiB free" in lines[2]
    assert "/tmp" in lines[2]


def test_what_is_not_known_is_a_dash_and_old_figures_say_so() -> None:
    unknown = replace(
        NODE, age_s=None, cpu_count=None, cpu_ratio=None, load_1m=None, memory_available_bytes=None, disks=()
    )
    text = shown(unknown, replace(NODE, age_s=95.0))
    assert "never" in text
    assert text.splitlines()[1].count(" - ") >= 4
    assert "1 m 35 s ago" in text
