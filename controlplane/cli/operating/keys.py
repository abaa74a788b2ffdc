"""``tierplane keys``: the API keys of a plane."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.text import Text

from controlplane.cli.console import age, parse_duration, parse_time, say, stdout, user_name
from controlplane.cli.controller_access import PlaneAccess, connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.cli.operating.operate import show_outcome
from controlplane.controller.api import ControllerApi
from controlplane.controller.keys import KeyRequest, KeyResponse
from controlplane.controller.offline_keys import OfflineKeys
from controlplane.core.access.keys import KeyRecord, find_key
from controlplane.core.access.roles import Role
from controlplane.core.domain.request import Priority
from controlplane.errors import SetupError

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _expiry(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        unix_s = parse_time(text, ahead=True)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expires") from None
    if unix_s <= time.time():
        raise click.BadParameter(f"'{text}' is in the past", param_hint="--expires")
    return unix_s


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _labels(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = [text.partition("=") for text in texts]
    for (name, equals, _), text in zip(pairs, texts, strict=True):
        if not name or not equals:
            raise click.BadParameter(f"'{text}' is not NAME=VALUE", param_hint="--label")
    return tuple((name, value) for name, _, value in pairs)


def _by() -> str:
    """Who runs this command, for the audit log."""
    name = user_name()
    return f"{name} (command line)" if name else "command line"


@click.group()
def command() -> None:
    """API keys: create, list, show, revoke and rotate them.

    Keys are required where gateway.auth.enabled is set. Without a running plane the keys in its store are
    changed.
    """


@command.command()
@click.option("--name", required=True, help="Whose key it is; no two valid keys have the same name.")
@click.option("--team", default="", help="The team, for fair shares, usage and reports.")
@click.option(
    "--role", type=click.Choice([str(role) for role in Role]), default=str(Role.CLIENT), show_default=True,
    help="client: models; viewer: reads what operators see; operator: everything.",
)  # fmt: skip
@click.option("--tiers", default="", help="The tiers that may serve it, with commas; by default all.")
@click.option("--models", default="", help="The models that it may ask for, with commas; by default all.")
@click.option(
    "--max-priority", type=click.Choice([str(priority) for priority in Priority]),
    default=str(Priority.NORMAL), show_default=True, help="The highest priority of its requests.",
)  # fmt: skip
@click.option("--expires", help="When it ends: 30d, or 2027-01-31 (UTC); by default never.")
@click.option("--label", "labels", multiple=True, help="NAME=VALUE; may be repeated.")
@_JSON
@plane_options
def create(
    name: str,
    team: str,
    role: str,
    tiers: str,
    models: str,
    max_priority: str,
    expires: str | None,
    labels: tuple[str, ...],
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Create a key. It is shown once, and can't be shown again."""
    request = KeyRequest(
        name=name,
        team=team,
        role=Role(role),
        tiers=_names(tiers),
        models=_names(models),
        max_priority=Priority(max_priority),
        expires_unix_s=_expiry(expires),
        labels=_labels(labels),
    )
    with connected(address, namespace) as plane:
        response = _keys_of(plane).create(request, _by())
        url = plane.url or "http://127.0.0.1:8080"
    _show_response(response, as_json)
    if response.key and not as_json:
        say(f"\n  {response.key}\n")
        say("It is not stored and can't be shown again. To try it:")
        say(f"  curl {url}/v1/models -H 'Authorization: Bearer {response.key}'")


@command.command("list")
@click.option("--all", "with_revoked", is_flag=True, help="Revoked and expired keys too.")
@_JSON
@plane_options
def list_(with_revoked: bool, as_json: bool, address: str | None, namespace: str | None) -> None:
    """List the keys, without their secrets."""
    with connected(address, namespace) as plane:
        records = _keys_of(plane).records()
    now_s = time.time()
    shown = [record for record in records if with_revoked or not record.problem(record.digest, now_s)]
    if as_json:
        click.echo(json.dumps({"keys": [key_value(record) for record in shown]}, indent=2))
        return
    if not shown:
        say("There are no keys: create one with `tierplane keys create --name NAME`.")
        return
    table = FittingTable(*("id", "name", "team", "role", "tiers", "state"), leave=("tiers", "team"), right=())
    for record in shown:
        state = record.problem(record.digest, now_s).removeprefix("the key ") or _validity(record, now_s)
        tiers = ", ".join(record.tiers) or "all"
        table.add_row(record.key_id, record.name, record.team or "-", str(record.role), tiers, Text(state))
    stdout().print(table)


@command.command()
@click.argument("key")
@_JSON
@plane_options
def show(key: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show KEY (an id or a name): what it may do, and since when."""
    with connected(address, namespace) as plane:
        records = _keys_of(plane).records()
    found = find_key(records, key)
    if found is None:
        raise SetupError(f"there is no key '{key}': `tierplane keys list --all` shows them")
    value = key_value(found)
    if as_json:
        click.echo(json.dumps(value, indent=2))
        return
    for name, item in value.items():
        if item not in (None, "", [], {}):
            say(f"{name.replace('_', ' '):20} {_plain(name, item)}")


@command.command()
@click.argument("key")
@_JSON
@plane_options
def revoke(key: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Revoke KEY (an id or a name): from now on nobody gets in with it."""
    with connected(address, namespace) as plane:
        response = _keys_of(plane).revoke(key, _by())
    _show_response(response, as_json)


@command.command()
@click.argument("key")
@click.option(
    "--grace", default="0s", show_default=True, help="How long the present secret stays valid, such as 1h."
)
@_JSON
@plane_options
def rotate(key: str, grace: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Give KEY (an id or a name) a new secret."""
    try:
        grace_s = 0.0 if grace in ("0", "0s") else parse_duration(grace)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--grace") from None
    with connected(address, namespace) as plane:
        response = _keys_of(plane).rotate(key, grace_s, _by())
    _show_response(response, as_json)
    if response.key and not as_json:
        say(f"\n  {response.key}")


class _PlaneKeys:
    """The keys of a running plane."""

    def __init__(self, plane: PlaneAccess) -> None:
        self._plane = plane

    def create(self, request: KeyRequest, by: str) -> KeyResponse:
        return self._plane.call(ControllerApi.create_key, request, by)

    def revoke(self, subject: str, by: str) -> KeyResponse:
        return self._plane.call(ControllerApi.revoke_key, subject, by)

    def rotate(self, subject: str, grace_s: float, by: str) -> KeyResponse:
        return self._plane.call(ControllerApi.rotate_key, subject, grace_s, by)

    def records(self) -> tuple[KeyRecord, ...]:
        return self._plane.call(ControllerApi.keys)


def _keys_of(plane: PlaneAccess) -> _PlaneKeys | OfflineKeys:
    """The keys of the running plane, or else those in the store of the run folder."""
    if plane.runs:
        return _PlaneKeys(plane)
    path = plane.store_path
    click.echo(f"No plane runs here: this uses its store, {path}", err=True)
    return plane.opened(closing(OfflineKeys(path)))


def _show_response(response: KeyResponse, as_json: bool) -> None:
    """Print the outcome. Raises SetupError, or SystemExit after JSON output, if the action was refused."""
    value: dict[str, Any] = {"key": response.key} if response.key else {}
    if response.record is not None:
        value |= key_value(response.record)
    show_outcome(response.outcome, response.reason, value, as_json)


def key_value(record: KeyRecord) -> dict[str, Any]:
    """A key as JSON: all but its digests."""
    value = asdict(record)
    for name in ("digest", "previous_digest", "key_id"):
        del value[name]
    return {"id": record.key_id, **value, "labels": dict(record.labels)}


def _validity(record: KeyRecord, now_s: float) -> str:
    if record.expires_unix_s is None:
        return "valid"
    return f"ends in {age(record.expires_unix_s - now_s)}"


def _plain(name: str, item: Any) -> str:
    if name.endswith("_unix_s"):
        return datetime.fromtimestamp(item, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return json.dumps(item) if isinstance(item, (dict, list, tuple)) else str(item)
