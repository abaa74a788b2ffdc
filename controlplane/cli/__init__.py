"""The command line ``tierplane``.

Subcommands are loaded when they are asked for: ``tierplane validate`` must not wait for Ray to import.
So the table below also holds each command's one-line help; a test keeps the two the same.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from controlplane import __version__
from controlplane.errors import ConfigError, TierplaneError

COMMANDS: dict[str, tuple[str, str]] = {
    "up": (
        "controlplane.cli.lifecycle.up:command",
        "Start every tier of CONFIG and the gateway in front of them.",
    ),
    "down": (
        "controlplane.cli.lifecycle.down:command",
        "Stop what `tierplane up` started, and only that.",
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
        "Show every GPU: its health, its readings, and which endpoints have it.",
    ),
    "events": (
        "controlplane.cli.operating.events:command",
        "Show the audit log: what happened to GPUs, nodes, tiers and endpoints, what was done, and why.",
    ),
    "alerts": (
        "controlplane.cli.operating.alerts:command",
        "Show what is wrong with the plane, acknowledge it, or silence it for a while.",
    ),
    "cordon": (
        "controlplane.cli.operating.operate:cordon",
        "Let nothing new come to SUBJECT (a GPU, a node or a tier); what runs there goes on.",
    ),
    "uncordon": (
        "controlplane.cli.operating.operate:uncordon",
        "Use SUBJECT again: the end of a cordon, of a drain, or of a hold after crashes.",
    ),
    "drain": (
        "controlplane.cli.operating.operate:drain",
        "Cordon SUBJECT and have what runs there leave: elsewhere first, if there is room.",
    ),
    "restart": (
        "controlplane.cli.operating.operate:restart",
        "Replace the engine processes of SUBJECT, those of one tier one after the other.",
    ),
    "report": (
        "controlplane.cli.operating.report:command",
        "Show what the last minutes, hours or days were like, for every tier and endpoint.",
    ),
    "trace": (
        "controlplane.cli.operating.trace:command",
        "Write the plane's own traffic to a file that `tierplane simulate --trace` replays.",
    ),
    "scale": (
        "controlplane.cli.operating.scale:command",
        "Give TIER that number of REPLICAS whatever the scaling says; `auto` ends that.",
    ),
    "recommendations": (
        "controlplane.cli.operating.recommendations:command",
        "Show each tier's target with its reason, open recommendations, and how the past ones turned out.",
    ),
    "explain": (
        "controlplane.cli.operating.explain:command",
        "Show where a request would go now and why, and which endpoints were left out.",
    ),
    "validate": (
        "controlplane.cli.checking.validate:command",
        "Check a configuration file; every problem at once.",
    ),
    "doctor": (
        "controlplane.cli.checking.doctor:command",
        "Check this machine, against a configuration if one is given.",
    ),
    "command": (
        "controlplane.cli.planning.command:command",
        "Print the vLLM command that serves MODEL as a scenario says, for the installed vLLM.",
    ),
    "fit": (
        "controlplane.cli.planning.fit:command",
        "Does MODEL fit a GPU: each term, how many sequences, and the smallest change if not.",
    ),
    "size": (
        "controlplane.cli.planning.size:command",
        "Choose GPUs, parallelism, weight format and replicas for an expected load, at the lowest cost.",
    ),
    "plan": (
        "controlplane.cli.planning.plan:command",
        "Plan where the replicas of CONFIG run: on the cluster of a file, or on the one that runs.",
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
        "Measure; each benchmark prints a table, or JSON with --json.",
    ),
}
"""Name → (``module:attribute`` of the click command, its one-line help), in the order ``--help`` lists."""


class LazyGroup(click.Group):
    """A group whose commands are imported on use, and which prints tierplane's errors as text.

    Exit status: 0 done, 1 an error or a failed check, 2 wrong usage or a wrong configuration file.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of ``--help``, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error raised on purpose ends it with a message, not a traceback."""
        try:
            return super().invoke(ctx)
        except TierplaneError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"{click.style('Error:', fg='red', bold=True)} {error}", err=True)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tierplane")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Serve tiers of small language models on vLLM through Ray Serve."""
