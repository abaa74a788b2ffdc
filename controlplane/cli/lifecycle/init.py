"""``tierplane init``: write an example configuration to start from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from controlplane.cli.checking.extras import extras
from controlplane.config import load_plane
from controlplane.config.examples import example_names, example_text
from controlplane.errors import SetupError
from controlplane.paths import install_command


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=Path("tierplane.yaml"))
@click.option("--example", default="laptop", show_default=True, help="Which example; --list names them.")
@click.option("--list", "list_examples", is_flag=True, help="List the examples and write nothing.")
def command(file: Path, *, example: str, list_examples: bool) -> None:
    """Write an example configuration to FILE.

    FILE is tierplane.yaml by default; a file that exists is not changed. `tierplane up --example NAME` starts
    an example without a file of your own.
    """
    if list_examples:
        click.echo("\n".join(example_names()))
        return
    text = example_text(example, file)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise SetupError(f"{file} exists: name another file, or remove it") from None
    except OSError as error:
        raise SetupError(f"can't write {file}: {error.strerror}; name another file") from error
    click.echo(f"{file} is example '{example}'. Next:\n")
    for extra in extras(load_plane(file).plane):
        click.echo(f"  {install_command(extra)}")
    name = shlex.quote(str(file))
    click.echo(f"  tierplane doctor {name}\n  tierplane up {name}")
