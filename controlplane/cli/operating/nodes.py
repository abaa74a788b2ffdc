"""``tierplane nodes``: the CPUs, memory and disks of every node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import click
from rich.text import Text

from controlplane.cli.console import age, stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.alerts.rules import BY_NAME
from controlplane.core.gpus.node_views import NodeView

_GIB: Final = 1024**3
_SHOWN_ID: Final = 12
_OLD_S: Final = 10.0
"""Figures that are older are marked with their age."""
_MEMORY_LIMIT: Final = BY_NAME["TierplaneNodeMemoryLow"].threshold
_DISK_LIMIT: Final = BY_NAME["TierplaneNodeDiskFull"].threshold


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show every node: its CPUs, memory and disks, and how old the figures are."""
    with connected(address, namespace) as plane:
        nodes = plane.call(ControllerApi.nodes)
    if as_json:
        click.echo(json.dumps({"nodes": [asdict(node) for node in nodes]}, indent=2))
        return
    console = stdout()
    if not nodes:
        console.print("No node has reported yet.")
        return
    console.print(node_table(nodes))
    for node in nodes:
        if node.cordoned:
            console.print(Text(f"{node.node_id[:_SHOWN_ID]} is out of use: {node.cordoned}", style="yellow"))


def node_table(nodes: Sequence[NodeView]) -> FittingTable:
    """One row per node, and one more for each further file system. Unknown values are shown as a dash."""
    table = FittingTable(
        *("node", "host", "CPUs", "busy", "load", "memory", "disk", "at", "GPUs", "measured"),
        right=("CPUs", "busy", "load", "GPUs"),
        leave=("at", "disk"),
    )
    for node in nodes:
        used = node.memory_used_ratio
        old = node.age_s is None or node.age_s > _OLD_S
        first, *more = node.disks or (None,)
        table.add_row(
            node.node_id[:_SHOWN_ID],
            node.hostname,
            "-" if node.cpu_count is None else str(node.cpu_count),
            "-" if node.cpu_ratio is None else f"{node.cpu_ratio:.0%}",
            "-" if node.load_1m is None else f"{node.load_1m:.1f}",
            _space(node.memory_available_bytes, node.memory_total_bytes, used, _MEMORY_LIMIT),
            _space(first.free_bytes, first.total_bytes, first.used_ratio, _DISK_LIMIT) if first else "-",
            first.path if first else "",
            str(node.gpus),
            Text(
                "never" if node.age_s is None else f"{age(node.age_s)} ago",
                style="bold yellow" if old else "",
            ),
        )
        for disk in more:
            space = _space(disk.free_bytes, disk.total_bytes, disk.used_ratio, _DISK_LIMIT)
            table.add_row("", "", "", "", "", "", space, disk.path, "", "")
    return table


def _space(free: int | None, total: int | None, used: float | None, limit: float) -> Text:
    """``12.3 of 30.0 GiB free``; red past the limit of the alert."""
    if free is None or total is None:
        return Text("-")
    style = "bold red" if used is not None and used > limit else ""
    return Text(f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free", style=style)
