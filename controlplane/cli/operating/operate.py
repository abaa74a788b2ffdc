"""``tierplane cordon | uncordon | drain | restart``: take a part of a plane out of use, or bring it back."""

from __future__ import annotations

import json
from typing import Any

import click

from controlplane.cli.console import say
from controlplane.cli.controller_access import connected, plane_options
from controlplane.controller.api import ControllerApi, Method
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.errors import SetupError

_SUBJECT = "SUBJECT is a GPU's UUID, a node's id, a tier or an endpoint; the beginning of an id is enough."


def _act(
    action: Method[[str, str], ActionResponse],
    subject: str,
    reason: str,
    *,
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    with connected(address, namespace) as plane:
        response = plane.call(action, subject, reason)
    show_response(response, as_json)


def show_response(response: ActionResponse, as_json: bool) -> None:
    """Print the outcome of an operator's action; raises as :func:`show_outcome`."""
    unchanged = "nothing to do: " if response.outcome is ActionOutcome.UNCHANGED else ""
    names = f"{', '.join(response.subjects)}: " if unchanged and response.subjects else ""
    text = f"{unchanged}{names}{response.reason}"
    value = {"outcome": response.outcome.value, "reason": response.reason}  # first, in this order
    show_outcome(
        response.outcome, response.reason, {**value, "subjects": list(response.subjects)}, as_json, text
    )


def show_outcome(
    outcome: ActionOutcome, reason: str, value: dict[str, Any], as_json: bool, text: str = ""
) -> None:
    """Print the outcome of an action: ``value`` with it and its reason as JSON, or ``text`` (by default the
    reason). Raises SetupError, or SystemExit after JSON output, if the action was refused."""
    refused = outcome in {ActionOutcome.REFUSED, ActionOutcome.UNKNOWN}
    if as_json:
        click.echo(json.dumps({**value, "outcome": outcome.value, "reason": reason}))
    elif refused:
        raise SetupError(reason)
    else:
        say(text or reason)
    if refused:
        raise SystemExit(1)


_reason = click.option(
    "--reason", required=True, help="The reason; it is displayed, and recorded in the audit log."
)
_optional_reason = click.option("--reason", default="", help="The reason, for the audit log.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def cordon(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Start no new replicas on SUBJECT (a GPU, a node or a tier); those that run there continue."""
    _act(ControllerApi.cordon, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_optional_reason
@_json
@plane_options
def uncordon(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Use SUBJECT again after a cordon, a drain, or a hold because of crashes."""
    _act(ControllerApi.uncordon, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def drain(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Cordon SUBJECT and move its replicas elsewhere; if there is room, replacements start first.

    A drained tier has no replicas until it is uncordoned. A drained endpoint is replaced.
    """
    _act(ControllerApi.drain, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def restart(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Restart the engine processes of SUBJECT, those of one tier one after another."""
    _act(ControllerApi.restart, subject, reason, as_json=as_json, address=address, namespace=namespace)
