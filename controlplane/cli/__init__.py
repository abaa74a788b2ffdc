"""The command line ``tierplane``.

A subcommand is imported only when it is used: ``tierplane validate`` must not wait for the import of Ray.
So the table below repeats each command's one-line help; a test compares them.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from typing import Any

import click

from controlplane import __version__
from controlplane.errors import ConfigError, TierplaneError
from controlplane.paths import run_dir
from controlplane.terminal import printable

COMMANDS: dict[str, tuple[str, str]] = {
    "init": (
        "controlplane.cli.lifecycle.init:command",
        "Write an example configuration to FILE.",
    ),
    "up": (
        "controlplane.cli.lifecycle.up:command",
        "Start every tier of CONFIG and the gateway in front of them.",
    ),
    "down": (
        "controlplane.cli.lifecycle.down:command",
        "Stop the plane that `tierplane up` started, and nothing else.",
    ),
    "status": (
        "controlplane.cli.lifecycle.status:command",
        "Show each tier: replicas, state, model, endpoint, requests in flight.",
    ),
    "logs": (
        "controlplane.cli.lifecycle.logs:command",
        "Show the logs of the engines, the replicas, the gateway and the controller.",
    ),
    "gpus": (
        "controlplane.cli.operating.gpus:command",
        "Show every GPU: its health, its readings and the endpoints that use it.",
    ),
    "keys": (
        "controlplane.cli.operating.keys:command",
        "API keys: create, list, show, revoke and rotate them.",
    ),
    "nodes": (
        "controlplane.cli.operating.nodes:command",
        "Show every node: its CPUs, memory and disks, and how old the figures are.",
    ),
    "events": (
        "controlplane.cli.operating.events:command",
        "Show the audit log: events of GPUs, nodes, tiers and endpoints, actions taken, and reasons.",
    ),
    "alerts": (
        "controlplane.cli.operating.alerts:command",
        "Show the plane's alerts, acknowledge one, or silence some for a while.",
    ),
    "cordon": (
        "controlplane.cli.operating.operate:cordon",
        "Start no new replicas on SUBJECT (a GPU, a node or a tier); those that run there continue.",
    ),
    "uncordon": (
        "controlplane.cli.operating.operate:uncordon",
        "Use SUBJECT again after a cordon, a drain, or a hold because of crashes.",
    ),
    "drain": (
        "controlplane.cli.operating.operate:drain",
        "Cordon SUBJECT and move its replicas elsewhere; if there is room, replacements start first.",
    ),
    "restart": (
        "controlplane.cli.operating.operate:restart",
        "Restart the engine processes of SUBJECT, those of one tier one after another.",
    ),
    "report": (
        "controlplane.cli.operating.report:command",
        "Report on every tier and endpoint over the last minutes, hours or days.",
    ),
    "requests": (
        "controlplane.cli.operating.requests:command",
        "Show single requests that have ended: where they were served, how fast, at what cost.",
    ),
    "sessions": (
        "controlplane.cli.operating.requests:sessions",
        "Show the sessions that cost most, or have most requests or tokens; whole hours are counted.",
    ),
    "trace": (
        "controlplane.cli.operating.trace:command",
        "Export the plane's own traffic to a file that `tierplane simulate --trace` replays.",
    ),
    "scale": (
        "controlplane.cli.operating.scale:command",
        "Set the number of REPLICAS of TIER manually; `auto` returns to automatic scaling.",
    ),
    "recommendations": (
        "controlplane.cli.operating.recommendations:command",
        "Show each tier's target and its reason, current recommendations, and how past ones turned out.",
    ),
    "explain": (
        "controlplane.cli.operating.explain:command",
        "Show where a request would go now and why, and why other endpoints were left out.",
    ),
    "usage": (
        "controlplane.cli.operating.usage:command",
        "Show what keys, teams, tiers or sessions have used, and what it would have cost a tier higher.",
    ),
    "validate": (
        "controlplane.cli.checking.validate:command",
        "Check a configuration file and report all problems at once.",
    ),
    "doctor": (
        "controlplane.cli.checking.doctor:command",
        "Check whether this machine can run a plane, or the plane of CONFIG.",
    ),
    "command": (
        "controlplane.cli.planning.command:command",
        "Print the vLLM command that serves MODEL with the flags of a scenario template.",
    ),
    "fit": (
        "controlplane.cli.planning.fit:command",
        "Check whether MODEL fits a GPU: memory by part, sequences at once, or the smallest change needed.",
    ),
    "size": (
        "controlplane.cli.planning.size:command",
        "Choose GPUs, parallelism, weight format and replicas for an expected load, at the lowest cost.",
    ),
    "plan": (
        "controlplane.cli.planning.plan:command",
        "Plan which GPUs the replicas of CONFIG run on, in a described or in the running cluster.",
    ),
    "k8s": (
        "controlplane.cli.k8s:command",
        "Generate Kubernetes manifests from a configuration file.",
    ),
    "monitoring": (
        "controlplane.cli.monitoring:command",
        "Write rules, alerts and dashboards for Prometheus and Grafana.",
    ),
    "simulate": (
        "controlplane.cli.planning.simulate:command",
        "Replay recorded arrivals on a simulated fleet of CONFIG: SLO attainment, GPU hours, latencies.",
    ),
    "bench": (
        "controlplane.cli.bench:command",
        "Run a benchmark; each prints a table, or JSON with --json.",
    ),
}
"""Name → (``module:attribute`` of the click command, its one-line help), in the order of ``--help``."""


class LazyGroup(click.Group):
    """A group that imports its commands on use and prints tierplane's own errors without a traceback.

    Exit status: 0 success, 1 an error or a failed check, 2 wrong usage or an invalid configuration file.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in ``--help``, from the table, so that nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; one of tierplane's own errors, or a full or read-only disk, ends it with a
        message instead of a traceback."""
        try:
            return super().invoke(ctx)
        except TierplaneError as error:
            if ctx.params.get("debug"):
                raise
            _show_error(str(error))
            ctx.exit(2 if isinstance(error, ConfigError) else 1)
        except OSError as error:
            message = unwritable(error)
            if ctx.params.get("debug") or not message:
                raise
            _show_error(message)
            ctx.exit(1)


def unwritable(error: OSError) -> str:
    """The message about a file that can't be written because the disk or the user's share of it is full, or
    is read-only; empty for any other error."""
    if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}:
        return ""
    what = f"can't write {error.filename}" if error.filename else "can't write a file"
    return (
        f"{what}: {os.strerror(error.errno)}; free space on the disks of the run folder ({_run_folder()}) "
        "and of /tmp, or set TIERPLANE_RUN_DIR to a folder on another disk"
    )


def _run_folder() -> str:
    try:
        return str(run_dir())
    except TierplaneError:
        return "TIERPLANE_RUN_DIR"


def _show_error(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be a file on the same full disk
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {printable(text)}", err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tierplane")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Serve tiers of small language models on vLLM through Ray Serve."""
