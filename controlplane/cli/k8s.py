"""``tierplane k8s``: Kubernetes manifests from the same configuration file that ``tierplane up`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from controlplane.cli.checking.configuration import load_checked
from controlplane.kubernetes.overlays import OVERLAYS
from controlplane.kubernetes.rayservice import render

HEADER = "# Written by: tierplane k8s render {config} --overlay {overlay}\n"


@click.group(name="k8s")
def command() -> None:
    """Generate Kubernetes manifests from a configuration file."""


@command.command(name="render")
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--overlay", type=click.Choice(list(OVERLAYS)), required=True, help="The kind of cluster.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def render_command(config: str, overlay: str, output: Path | None, as_json: bool) -> None:
    """Print the RayService that runs CONFIG on a kind of cluster.

    Pods request the memory that the memory model computes for their engines. Exit status 2 if a tier can't
    run on the overlay's nodes; the message names the smallest change that helps.
    """
    manifest = render(load_checked(config), OVERLAYS[overlay])
    if as_json:
        text = json.dumps(manifest, indent=2) + "\n"
    else:
        text = HEADER.format(config=config, overlay=overlay) + to_yaml(manifest)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")


class _Dumper(yaml.SafeDumper):
    """Readable YAML: block style for the text of ``serveConfigV2``, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(manifest: object) -> str:
    """A manifest as readable YAML."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=110)
