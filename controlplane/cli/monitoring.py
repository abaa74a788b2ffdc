"""``tierplane monitoring``: files for Prometheus, Alertmanager and Grafana."""

from __future__ import annotations

from pathlib import Path

import click

from controlplane.monitoring.files import HEADER, RAY_TARGETS, kubernetes_files, local_files


@click.group(name="monitoring")
def command() -> None:
    """Write rules, alerts and dashboards for Prometheus and Grafana."""


@command.command(name="local")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target", "targets", multiple=True, metavar="HOST:PORT", default=("127.0.0.1:8080",), show_default=True,
    help="A gateway; repeatable, though one answers for all.",
)  # fmt: skip
@click.option("--webhook", default="", metavar="URL", help="Where Alertmanager sends alerts.")
@click.option("--alertmanager", default="127.0.0.1:9093", metavar="HOST:PORT", show_default=True)
@click.option("--ray-targets", default=RAY_TARGETS, metavar="FILE", show_default=True)
def local_command(
    folder: Path, targets: tuple[str, ...], webhook: str, alertmanager: str, ray_targets: str
) -> None:
    """Write FOLDER for a Prometheus, an Alertmanager and a Grafana of your own.

    Then: prometheus --config.file FOLDER/prometheus.yml. Grafana imports FOLDER/dashboards/*.json.
    """
    files = local_files(targets, webhook=webhook, alertmanager=alertmanager, ray_targets=ray_targets)
    write(folder, files, "local FOLDER")


@command.command(name="k8s")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def k8s_command(folder: Path) -> None:
    """Write FOLDER as a kustomize component: PodMonitors, PrometheusRule, dashboards."""
    write(folder, kubernetes_files(), f"k8s {folder}")


def write(folder: Path, files: dict[str, str], kind: str) -> None:
    """Write each file below ``folder`` and name it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(with_header(name, text, kind), "utf-8")
        click.echo(str(path))


def with_header(name: str, text: str, kind: str) -> str:
    """A YAML file says where it comes from; JSON can't."""
    return text if name.endswith(".json") else HEADER.format(kind=kind) + text
