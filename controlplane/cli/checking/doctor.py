"""``tierplane doctor``: can this machine run the plane?"""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from controlplane.cli.checking.checks import Check, CheckStatus, run_checks
from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.console import stdout

_MARKS = {
    CheckStatus.OK: ("ok", "green"),
    CheckStatus.WARN: ("warn", "yellow"),
    CheckStatus.FAIL: ("FAIL", "bold red"),
}


@click.command()
@click.argument("config", type=click.Path(dir_okay=False), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, config: str | None, as_json: bool) -> None:
    """Check whether this machine can run a plane, or the plane of CONFIG.

    Exit status 1 if a check fails.
    """
    checks = run_checks(load_checked(config, here=True) if config else None)
    failed = any(check.verdict is CheckStatus.FAIL for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        stdout().print(_table(checks))
    if failed:
        ctx.exit(1)


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.verdict]
        text = Text(check.message)
        if check.remedy:
            text.append(f"\n→ {check.remedy}", style="cyan")
        table.add_row(Text(mark, style=style), check.name, text)
    return table
