"""The reference of the command line, ``docs/reference/cli.md``, from the commands themselves.

``python -m controlplane.cli.reference`` writes it in a checkout; `make docs` runs this, and a test compares
the file with the commands.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from controlplane.cli import main

PAGE: Final = Path("docs/reference/cli.md")
"""Where the page is, from the repository's root."""

_HEAD: Final = """\
<!-- Written by `make docs` from the commands in controlplane/cli: change those, not this page. -->

# Commands

`tierplane COMMAND --help` prints the same. Exit status: 0 done, 1 an error or a failed check, 2 wrong usage
or a wrong configuration file; where a command has others, its text says so.

`make` prepares an environment and runs some of them: `make help` lists its targets.
"""


def commands_page() -> str:
    """The whole page: a section for each command, and for each command of a group after it."""
    context = click.Context(main, info_name="tierplane")
    sections = [_section(each, level) for each, level in _walk(context, 2)]
    return "\n".join([_HEAD, *sections])


def _walk(context: click.Context, level: int) -> Iterator[tuple[click.Context, int]]:
    """The command of ``context`` and all below it, with the level of its heading."""
    yield context, level
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if command is not None:
                below = level if context.parent is None else level + 1
                yield from _walk(click.Context(command, parent=context, info_name=name), below)


def _section(context: click.Context, level: int) -> str:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"{'#' * level} {context.command_path}", "", f"`{usage}`", ""]
    lines += [*_paragraphs(command.help), *_paragraphs(command.epilog)]
    rows = [row for param in command.params if (row := _row(param, context)) is not None]
    if rows:
        lines += ["| argument or option | what |", "|---|---|"]
        lines += [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows]
        lines.append("")
    return "\n".join(lines)


def _row(param: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    """What the table says of an argument or an option; None: it is hidden."""
    if isinstance(param, click.Argument):
        needed = "Required" if param.required else "Optional"
        return param.metavar or (
            param.name or ""
        ).upper(), f"{needed}{', several' if param.nargs < 0 else ''}."
    return param.get_help_record(context)


def _paragraphs(text: str | None) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph.strip():
            yield " ".join(paragraph.split())
            yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(commands_page(), "utf-8")
