"""``tierplane scale``: sets a tier's number of replicas manually, or returns it to automatic scaling."""

from __future__ import annotations

from typing import Final

import click

from controlplane.cli.console import parse_duration
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.operating.operate import show_response
from controlplane.controller.api import ControllerApi

AUTO: Final = "auto"


def _seconds(text: str) -> float:
    try:
        return parse_duration(f"{text}s" if text.strip()[-1:].isdecimal() else text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--for") from None


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
    for_s = None if duration is None else _seconds(duration)
    if number is None and for_s is not None:
        raise click.BadParameter(f"'{AUTO}' takes no duration", param_hint="--for")
    with connected(address, namespace) as plane:
        response = plane.call(ControllerApi.scale, tier, number, for_s, reason)
    show_response(response, as_json)
