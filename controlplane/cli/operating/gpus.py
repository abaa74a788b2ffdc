"""``tierplane gpus``: the health, the readings and the users of every GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import click
from rich.text import Text

from controlplane.cli.console import age, stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.gpus.views import GpuHolder, GpuView
from controlplane.core.placement.gangs import WHOLE_MILLI

_GIB = 1024**3
_STYLES = {"healthy": "green", "returned": "green", "suspect": "yellow"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show every GPU: its health, its readings and the endpoints that use it."""
    with connected(address, namespace) as plane:
        gpus = plane.call(ControllerApi.gpus)
    if as_json:
        click.echo(json.dumps({"gpus": [asdict(gpu) for gpu in gpus]}, indent=2))
        return
    console = stdout()
    if not gpus:
        console.print("No node reports a GPU.")
        return
    console.print(gpu_table(gpus))
    for line in unhealthy_lines(gpus, time.time()):
        console.print(line)


def gpu_table(gpus: Sequence[GpuView]) -> FittingTable:
    """One row per GPU, grouped by node. Unknown values are shown as a dash."""
    table = FittingTable(
        *("node", "GPU", "uuid", "state", "busy", "memory", "°C", "W", "used by"), right=("busy", "°C", "W")
    )
    before = ""
    for gpu in gpus:
        state = "cordoned" if gpu.node_cordoned and gpu.state in _STYLES else gpu.state
        table.add_row(
            gpu.node_id[:12] if gpu.node_id != before else "",
            str(gpu.index),
            gpu.uuid[:12],
            Text(state, style=_STYLES.get(state, "bold red")),
            _text(gpu.gpu_ratio, lambda ratio: f"{ratio:.0%}"),
            _memory(gpu),
            _text(gpu.temperature_c, lambda value: f"{value:.0f}"),
            _text(gpu.power_w, lambda value: f"{value:.0f}"),
            ", ".join(_holder(each) for each in gpu.holders),
        )
        before = gpu.node_id
    return table


def unhealthy_lines(gpus: Sequence[GpuView], unix_s: float) -> list[Text]:
    """A line for each GPU whose state is not ``healthy``."""
    return [
        Text(
            f"{gpu.uuid}: {gpu.state} for {age(unix_s - gpu.since_unix_s)}"
            + (f" ({gpu.rule}): {gpu.reason}" if gpu.reason else ""),
            style=_STYLES.get(gpu.state, "red"),
        )
        for gpu in gpus
        if gpu.state != "healthy"
    ]


def _text(value: float | None, render: Callable[[float], str]) -> str:
    return "-" if value is None else render(value)


def _memory(gpu: GpuView) -> str:
    total = _text(gpu.memory_total_bytes, lambda value: f"{value / _GIB:.0f} GiB")
    return f"{_text(gpu.memory_used_bytes, lambda value: f'{value / _GIB:.1f}')} of {total}"


def _holder(holder: GpuHolder) -> str:
    if holder.milli >= WHOLE_MILLI:
        return holder.endpoint_id
    memory = f", {holder.memory_bytes / _GIB:.1f} GiB" if holder.memory_bytes else ""
    return f"{holder.endpoint_id} ({holder.milli / WHOLE_MILLI:g}{memory})"
