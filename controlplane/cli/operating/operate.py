"""``tierplane cordon | uncordon | drain | restart``: take something out of use, empty it, bring it back."""

from __future__ import annotations

import json

import click

from controlplane.cli.controller_access import connected, plane_options
from controlplane.controller.api import ControllerApi, Method
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.errors import SetupError

_SUBJECT = "A GPU's UUID, a node's id, a tier or an endpoint; ids may be cut short."


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
    show_answer(response, as_json)


def show_answer(answer: ActionResponse, as_json: bool) -> None:
    """What became of a wish. Raises SetupError or SystemExit if it was refused."""
    if as_json:
        said = {"outcome": answer.outcome.value, "reason": answer.reason, "subjects": list(answer.subjects)}
        click.echo(json.dumps(said))
    elif answer.outcome in {ActionOutcome.DONE, ActionOutcome.UNCHANGED}:
        unchanged = "nothing to do: " if answer.outcome is ActionOutcome.UNCHANGED else ""
        names = f"{', '.join(answer.subjects)}: " if unchanged and answer.subjects else ""
        click.echo(f"{unchanged}{names}{answer.reason}")
    else:
        raise SetupError(answer.reason)
    if answer.outcome in {ActionOutcome.REFUSED, ActionOutcome.UNKNOWN}:
        raise SystemExit(1)


_reason = click.option("--reason", required=True, help="Why; it is shown and kept in the audit log.")
_why = click.option("--reason", default="", help="Why; it is kept in the audit log.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def cordon(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Let nothing new come to SUBJECT (a GPU, a node or a tier); what runs there goes on."""
    _act(ControllerApi.cordon, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_why
@_json
@plane_options
def uncordon(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Use SUBJECT again: the end of a cordon, of a drain, or of a hold after crashes."""
    _act(ControllerApi.uncordon, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def drain(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Cordon SUBJECT and have what runs there leave: elsewhere first, if there is room.

    A tier that is drained has no replicas until it is uncordoned; an endpoint that is drained is replaced.
    """
    _act(ControllerApi.drain, subject, reason, as_json=as_json, address=address, namespace=namespace)


@click.command(epilog=_SUBJECT)
@click.argument("subject")
@_reason
@_json
@plane_options
def restart(subject: str, reason: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Replace the engine processes of SUBJECT, those of one tier one after the other."""
    _act(ControllerApi.restart, subject, reason, as_json=as_json, address=address, namespace=namespace)
