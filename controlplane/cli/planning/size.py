"""``tierplane size``: the cheapest fleet for the load that the tiers are expected to carry."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import yaml

from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.core.placement.gangs import PlacementPlan
from controlplane.core.sizing.fleet_sizing import (
    BASIS,
    FleetSizing,
    NoFleetSizing,
    RuledOutOption,
    ServingOption,
    size_tiers,
)
from controlplane.errors import SetupError
from controlplane.planning.cluster_file import load_cluster
from controlplane.planning.tier_sizing import (
    GpuFleet,
    checkpoint_note,
    fleet_of,
    needs_of,
    placed,
    settings_of,
)

_SHOWN_REASONS = 3


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option(
    "--cluster", type=click.Path(dir_okay=False, path_type=Path), required=True, help="A cluster file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(config: str, cluster: Path, as_json: bool) -> None:
    """Choose GPUs, parallelism, weight format and replicas for an expected load, at the lowest cost.

    For each tier of CONFIG that has 'expected': the cheapest option that meets the latency targets and fits
    the cluster, the reason, the next best option and those that were ruled out. Speeds are estimated from the
    GPUs' published specifications. Exit status 3 if the cluster can't carry the load.
    """
    plane = load_checked(config).plane
    described = load_cluster(cluster)
    needs = needs_of(plane)
    if not needs:
        raise SetupError(
            "no vllm tier has 'expected': set its requests_per_s, input_tokens and output_tokens"
        )
    fleet = fleet_of(described)
    found = size_tiers(needs, fleet.gpus)
    where = placed(plane, found.choices, described) if isinstance(found, FleetSizing) else None
    if as_json:
        click.echo(json.dumps(_json(found, where, fleet), indent=2))
    else:
        _show(found, where, fleet)
    if where is None or not where.complete:
        raise SystemExit(3)


def _show(found: FleetSizing | NoFleetSizing, where: PlacementPlan | None, fleet: GpuFleet) -> None:
    console = stdout()
    if fleet.unknown:
        console.print(f"left out, because not in the table of GPU models: {', '.join(fleet.unknown)}")
    if isinstance(found, NoFleetSizing) or where is None:
        reasons = found.reasons if isinstance(found, NoFleetSizing) else ()
        console.print("[red]the cluster can't carry the load[/red]: " + "; ".join(reasons), soft_wrap=True)
        for tier, ruled_out in found.ruled_out if isinstance(found, NoFleetSizing) else ():
            for text in _main_reasons(ruled_out):
                console.print(f"  {tier}: {text}", soft_wrap=True)
        return
    table = FittingTable(
        *("tier", "replicas", "GPU", "TP x PP", "format", "GPUs", "cost/h", "TTFT", "per token"),
        right=("replicas", "GPUs", "cost/h", "TTFT", "per token"),
    )
    for choice in found.choices:
        option = choice.option
        table.add_row(
            choice.tier,
            str(option.replicas),
            option.gpu,
            f"{option.tp} x {option.pp}",
            option.quantization,
            str(option.gpus),
            f"{option.cost_per_hour:.2f}",
            f"{option.expected.ttft_ms:.0f} ms",
            f"{option.expected.itl_ms:.1f} ms",
        )
    console.print(table)
    price = "" if fleet.priced else " (without cost_per_hour in the cluster file each GPU costs 1)"
    console.print(f"{found.cost_per_hour:.2f} per hour in all{price}; {BASIS}")
    for choice in found.choices:
        console.print(f"{choice.tier}: {choice.why}", soft_wrap=True)
        if note := checkpoint_note(choice):
            console.print(f"  {note}", soft_wrap=True)
        if choice.next_best:
            console.print(f"  next best: {choice.next_best}", soft_wrap=True)
        for text in _main_reasons(choice.ruled_out):
            console.print(f"  ruled out: {text}", soft_wrap=True)
    settings = {choice.tier: settings_of(choice) for choice in found.choices}
    console.print("Settings of the tiers")
    console.print(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None).rstrip(), soft_wrap=True)
    for infeasible in where.infeasible:
        console.print(f"[red]{infeasible.gang.gang_id} can't be placed[/red]: {infeasible.why}")


def _main_reasons(ruled_out: tuple[RuledOutOption, ...]) -> list[str]:
    """For each GPU model how many options were ruled out, with an example and its reason."""
    examples: dict[str, RuledOutOption] = {}
    for each in ruled_out:
        examples.setdefault(each.gpu, each)
    counts = Counter(each.gpu for each in ruled_out)
    return [
        f"{counts[gpu]} option{'s' * (counts[gpu] > 1)} on {gpu}, such as tensor parallel {each.tp}"
        f"{f' x pipeline parallel {each.pp}' if each.pp > 1 else ''}, {each.quantization}: {each.reason}"
        for gpu, each in list(examples.items())[:_SHOWN_REASONS]
    ]


def _json(found: FleetSizing | NoFleetSizing, where: PlacementPlan | None, fleet: GpuFleet) -> dict[str, Any]:
    if isinstance(found, NoFleetSizing):
        ruled_out = {tier: [_ruled_out(each) for each in out] for tier, out in found.ruled_out}
        return {"fits": False, "reasons": list(found.reasons), "ruled_out": ruled_out}
    return {
        "fits": where is not None and where.complete,
        "cost_per_hour": found.cost_per_hour,
        "priced": fleet.priced,
        "basis": BASIS,
        "gpus_used": dict(found.gpus_used),
        "tiers": [
            {
                "tier": choice.tier,
                "chosen": _option(choice.option),
                "why": choice.why,
                "note": checkpoint_note(choice),
                "next_best": _option(choice.next_best) if choice.next_best else None,
                "ruled_out": [_ruled_out(each) for each in choice.ruled_out],
                "settings": settings_of(choice),
            }
            for choice in found.choices
        ],
        "without_a_place": [
            {"replica": infeasible.gang.gang_id, "why": infeasible.why}
            for infeasible in (where.infeasible if where else ())
        ],
    }


def _option(option: ServingOption) -> dict[str, Any]:
    return {
        "gpu": option.gpu,
        "tensor_parallel_size": option.tp,
        "pipeline_parallel_size": option.pp,
        "quantization": option.quantization,
        "replicas": option.replicas,
        "gpus": option.gpus,
        "cost_per_hour": option.cost_per_hour,
        "ttft_ms": round(option.expected.ttft_ms, 1),
        "itl_ms": round(option.expected.itl_ms, 2),
        "requests_per_s_per_replica": round(option.capacity.requests_per_s, 3),
        "sequences": option.sequences,
    }


def _ruled_out(each: RuledOutOption) -> dict[str, Any]:
    return {
        "gpu": each.gpu,
        "tensor_parallel_size": each.tp,
        "pipeline_parallel_size": each.pp,
        "quantization": each.quantization,
        "reason": each.reason,
    }
