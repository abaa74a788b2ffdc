"""``tierplane explain``: where a request would go and why, without sending it (``POST /v1/route``)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, BinaryIO

import click

from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.errors import SetupError
from controlplane.ray_cluster import session

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 10.0
_HINTS = ("complexity", "agent_type", "min_tier", "priority")


@click.command()
@click.option(
    "--url", help="The gateway's address; by default that of the plane that `tierplane up` started."
)
@click.option("--model", help="A tier, a model id or 'auto'.")
@click.option("--complexity", help="simple, moderate or complex.")
@click.option("--agent-type", help="The kind of agent that sends the request.")
@click.option("--min-tier", help="The lowest tier that may serve the request.")
@click.option("--priority", help="low, normal or high.")
@click.option(
    "--body", type=click.File("rb"), help="A file with the body of a request; '-' is standard input."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    url: str | None,
    *,
    model: str | None,
    complexity: str | None,
    agent_type: str | None,
    min_tier: str | None,
    priority: str | None,
    body: BinaryIO | None,
    as_json: bool,
) -> None:
    """Show where a request would go now and why, and why other endpoints were left out.

    Nothing is sent to an engine. The other options override values in --body. Exit status 1 if the request
    would be refused.
    """
    request = _request(body, model)
    values = (complexity, agent_type, min_tier, priority)
    hints = {name: value for name, value in zip(_HINTS, values, strict=True) if value}
    explanation = _explain((url or _running_url()).rstrip("/"), request, hints)
    if as_json:
        click.echo(json.dumps(explanation, indent=2))
    else:
        _print(explanation)
    if explanation["refusal"]:
        raise SystemExit(1)


def _request(body: BinaryIO | None, model: str | None) -> dict[str, Any]:
    request: dict[str, Any] = {"model": "auto"}
    if body is not None:
        try:
            value = json.loads(body.read())
        except ValueError as error:
            raise SetupError(f"--body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise SetupError("--body must be a JSON object, such as a chat request")
        request = value
    if model:
        request = {**request, "model": model}
        request.pop("models", None)
    return request


def _running_url() -> str:
    record = session.load_record()
    return (record.gateway_url or record.ingress_url) if record else DEFAULT_URL


def _explain(url: str, request: dict[str, Any], hints: dict[str, str]) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise SetupError(f"--url: '{url}' is not an address such as {DEFAULT_URL}")
    headers = {"content-type": "application/json"}
    headers |= {f"x-{name.replace('_', '-')}": value for name, value in hints.items()}
    query = urllib.request.Request(f"{url}/v1/route", json.dumps(request).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(query, timeout=TIMEOUT_S) as response:  # noqa: S310 (checked above)
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            message = _error_message(error.read()) or f"the gateway answered with status {error.code}"
            raise SetupError(message) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise SetupError(
            f"no gateway answers at {url} ({reason}): start one with `tierplane up`, or set --url"
        ) from error


def _error_message(body: bytes) -> str:
    """The message of an OpenAI-shaped error; empty if ``body`` is something else."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""


def _print(explanation: dict[str, Any]) -> None:
    console = stdout()
    console.print(_decision(explanation), markup=False, soft_wrap=True)
    tiers = explanation["tiers"]
    for label, key in (("requested", "asked_for"), ("spills to", "spill"), ("bridged by", "bridge")):
        if tiers[key]:
            console.print(f"  {label:<11} {', '.join(tiers[key])}", markup=False)
    if tiers["floor"]:
        console.print(f"  {'not below':<11} {tiers['floor']}", markup=False)
    if not explanation["endpoints"]:
        return
    table = FittingTable("", "endpoint", "tier", "score", "reason", right=("score",))
    for each in explanation["endpoints"]:
        chosen = each["endpoint"] == explanation["endpoint"]
        score = "" if each["score"] is None else f"{each['score']:.3f}"
        table.add_row("→" if chosen else "", each["endpoint"], each["tier"], score, _why(each))
    console.print(table)


def _decision(explanation: dict[str, Any]) -> str:
    if explanation["refusal"]:
        return f"refused: {explanation['message'] or explanation['refusal']}"
    if explanation["endpoint"] is None:
        return f"would wait for {explanation['tier']}: {explanation['reason']}"
    kinds = [kind for kind in ("spilled", "bridged") if explanation[kind]]
    how = f" ({', '.join(kinds)})" if kinds else ""
    return f"{explanation['tier']}{how} → {explanation['endpoint']}: {explanation['reason']}"


def _why(endpoint: dict[str, Any]) -> str:
    if endpoint["left_out"]:
        return "left out: " + "; ".join(endpoint["left_out"])
    parts = [f"{name} {value:.2f}" for name, value in endpoint["scores"].items()]
    return ", ".join(parts + (["preferred for this session or prefix"] if endpoint["affinity"] else []))
