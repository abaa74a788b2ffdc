"""``tierplane validate``: check a configuration file without starting anything."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from controlplane.cli.checking.configuration import load_checked, name_warnings, unset_variables
from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.config import ServeFile, TierConfig
from controlplane.engines.llamacpp import slots
from controlplane.errors import ConfigError, Problem


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, config: str, as_json: bool) -> None:
    """Check a configuration file and report all problems at once.

    What `tierplane up` would refuse here is an error, by the same checks: also files of models that are not
    on this machine. An environment variable that is missing here is only a warning, because the plane may
    run elsewhere; so is a model id that different models have.
    """
    try:
        file = load_checked(config, here=True)
    except ConfigError as error:
        if not as_json:
            raise
        problems = [asdict(problem) for problem in error.problems]
        click.echo(json.dumps({"ok": False, "config": config, "problems": problems}, indent=2))
        ctx.exit(2)
    warnings = [*unset_variables(file, os.environ), *name_warnings(file.plane)]
    if as_json:
        found = {"problems": [], "warnings": [asdict(warning) for warning in warnings]}
        click.echo(json.dumps({"ok": True, "config": config, **found, **_summary(file)}, indent=2))
    else:
        _show(file, warnings)


def _summary(file: ServeFile) -> dict[str, Any]:
    plane = file.plane
    return {
        "application": file.application,
        "tiers": [
            {
                "name": tier.name,
                "engine": tier.engine,
                "model": tier.model,
                "model_id": tier.model_id,
                "replicas": tier.replicas,
                "gpus": tier.engine_gpus * tier.replicas,
                "concurrency_limit": tier.concurrency_limit,
            }
            for tier in plane.tiers
        ],
        "gateway_port": plane.gateway.port,
        "ingress_port": file.http_port,
        "gpus": sum(tier.engine_gpus * tier.replicas for tier in plane.tiers),
    }


def _show(file: ServeFile, warnings: list[Problem]) -> None:
    table = FittingTable(
        *("tier", "engine", "model", "replicas", "GPUs", "requests at once"),
        right=("replicas", "requests at once"),
        leave=("model",),
    )
    for tier in file.plane.tiers:
        table.add_row(
            tier.name,
            tier.engine,
            tier.model or tier.model_id,
            str(tier.replicas),
            _gpus(tier),
            str(tier.concurrency_limit * tier.replicas),
        )
    console = stdout()
    console.print(table)
    gateway = file.plane.gateway
    own_port = f"port {gateway.port}" if gateway.port else "no port of its own"
    console.print(f"Gateway: {own_port}; Serve's ingress: port {file.http_port}", highlight=False)
    for tier in file.plane.tiers:
        count, tokens = slots(tier) if tier.engine == "llamacpp" else (1, None)
        if count > 1 and tokens is not None:
            console.print(
                f"Tier '{tier.name}': a request has {tokens} tokens for prompt and response, "
                f"ctx-size divided by {count} slots (parallel)",
                highlight=False,
            )
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    console.print(f"{file.path}: no problems", style="green", highlight=False)


def _gpus(tier: TierConfig) -> str:
    return f"{tier.engine_gpus * tier.replicas:g}" if tier.engine_gpus else "-"
