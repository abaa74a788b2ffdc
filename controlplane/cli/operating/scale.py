"""``tierplane scale``: sets a tier's number of replicas manually, or returns it to automatic scaling."""

from __future__ import annotations

import re
from typing import Final

import click

from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.operating.operate import show_response
from controlplane.controller.api import ControllerApi

AUTO: Final = "auto"
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> float:
    """``90``, ``90s``, ``15m``, ``2h``, ``1d`` → seconds. ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a duration such as 90s, 15m or 2h")
    return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.argument("tier")
@click.argument("replicas")
@click.option(
    "--for",
    "duration",
    help="How long, such as 90s, 15m or 2h; by default until `tierplane scale TIER auto`.",
)
@click.option("--reason", default="", help="The reason; it is displayed, and recorded in the audit log.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(
    tier: str,
    replicas: str,
    duration: str | None,
    reason: str,
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Set the number of REPLICAS of TIER manually; `auto` returns to automatic scaling."""
    number: int | None = None
    if replicas != AUTO:
        if not replicas.isdecimal():
            raise click.BadParameter(f"'{replicas}' is neither a number nor '{AUTO}'", param_hint="REPLICAS")
        number = int(replicas)
    try:
        for_s = None if duration is None else seconds(duration)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--for") from None
    if number is None and for_s is not None:
        raise click.BadParameter(f"'{AUTO}' takes no duration", param_hint="--for")
    with connected(address, namespace) as plane:
        response = plane.call(ControllerApi.scale, tier, number, for_s, reason)
    show_response(response, as_json)
