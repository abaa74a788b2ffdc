"""``tierplane monitoring``: files for Prometheus, Alertmanager and Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from controlplane.monitoring.files import HEADER, RAY_TARGETS, kubernetes_files, local_files
from controlplane.ray_cluster import session

DEFAULT_TARGET: Final = "127.0.0.1:8080"


@click.group(name="monitoring")
def command() -> None:
    """Write rules, alerts and dashboards for Prometheus and Grafana."""


@command.command(name="local")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target", "targets", multiple=True, metavar="HOST:PORT",
    help="A gateway; by default that of the running plane, or 127.0.0.1:8080. May be repeated, but one is "
    "enough: each gateway reports for all of them.",
)  # fmt: skip
@click.option("--webhook", default="", metavar="URL", help="Where Alertmanager sends alerts.")
@click.option(
    "--alertmanager", default="127.0.0.1:9093", metavar="HOST:PORT", show_default=True,
    help="The Alertmanager that Prometheus sends alerts to.",
)  # fmt: skip
@click.option(
    "--ray-targets", metavar="FILE",
    help=f"The file in which Ray lists its metrics addresses; by default that of the running plane's Ray, or "
    f"{RAY_TARGETS}.",
)  # fmt: skip
def local_command(
    folder: Path, targets: tuple[str, ...], webhook: str, alertmanager: str, ray_targets: str | None
) -> None:
    """Write files for your own Prometheus, Alertmanager and Grafana to FOLDER.

    Then run: docker compose --project-directory FOLDER up, and open http://127.0.0.1:3000; Ray's dashboard
    (tierplane up --dashboard) shows its metrics from there. Without containers:
    prometheus --config.file FOLDER/prometheus.yml, and import FOLDER/dashboards/*.json in Grafana.
    """
    record = session.load_record()
    if not targets:
        found = urlsplit(record.gateway_url or record.ingress_url).netloc if record else ""
        targets = (found or DEFAULT_TARGET,)
        click.echo(
            f"gateway: {targets[0]} ({'the running plane' if found else 'no plane runs here'})", err=True
        )
    if ray_targets is None:
        ray_targets = (
            f"{record.temp_dir}/ray/{Path(RAY_TARGETS).name}" if record and record.temp_dir else RAY_TARGETS
        )
    files = local_files(targets, webhook=webhook, alertmanager=alertmanager, ray_targets=ray_targets)
    write(folder, files, "local FOLDER")


@command.command(name="k8s")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def k8s_command(folder: Path) -> None:
    """Write a kustomize component to FOLDER: PodMonitors, PrometheusRule, dashboards."""
    write(folder, kubernetes_files(), f"k8s {folder}")


def write(folder: Path, files: dict[str, str], kind: str) -> None:
    """Write each file below ``folder`` and print its path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(with_header(name, text, kind), "utf-8")
        click.echo(str(path))


def with_header(name: str, text: str, kind: str) -> str:
    """``text`` with a comment that names the command that wrote it; JSON has no comments."""
    return text if name.endswith(".json") else HEADER.format(kind=kind) + text
