"""``tierplane fit``: whether a model fits a GPU, what takes how much memory, and what change would help."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table

from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.core.sizing.architecture import plain_model
from controlplane.core.sizing.engine_args import EngineArgs, parse_settings
from controlplane.core.sizing.feasibility import Fit, FitLimits, Unfit, Verdict, judge
from controlplane.core.sizing.gpu_memory import MemoryPlan, StageMemory, gib, plan_memory, token_bytes
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.core.sizing.quantization import PRESETS, preset
from controlplane.models.catalog import gpu_named, gpu_table, known_models
from controlplane.models.model_config import LoadedModel, load_model

_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_SUGGESTED = "fp8,int8,awq,gptq"


class Amount(click.ParamType[float]):
    """A number with an optional k, M, B or T: ``7B``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``7B`` → 7e9."""
        text = str(value).strip().lower()
        try:
            return float(text.rstrip("kmbt")) * _SCALE.get(text[-1:], 1.0)
        except ValueError:
            self.fail(f"'{value}' is not a number such as 7B or 350M", param, ctx)


@click.command()
@click.argument("model", required=False)
@click.option("--gpu", "gpu_name", metavar="NAME", help="GPU model, such as H100-80G; --gpus lists them.")
@click.option("--count", type=click.IntRange(1), help="GPUs available for one engine.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor parallel size.")
@click.option("--pp", type=click.IntRange(1), default=1, show_default=True, help="Pipeline parallel size.")
@click.option("--max-model-len", metavar="N", help="Longest sequence; 'auto' for the longest that fits.")
@click.option(
    "--length", type=click.IntRange(1), help="Tokens per sequence to plan for; default: the longest allowed."
)
@click.option("--concurrency", type=click.IntRange(1), default=1, help="Sequences that must fit at once.")
@click.option("--quantization", metavar="FORMAT", help=f"Weight format: {', '.join(PRESETS)}, gguf:TYPE.")
@click.option(
    "--allow", metavar="FORMATS", default=_SUGGESTED, show_default=True,
    help="Weight formats that may be suggested as a change.",
)  # fmt: skip
@click.option(
    "--engine-arg", "engine_args", multiple=True, metavar="K=V", help="Any engine flag; repeatable."
)
@click.option("--params", type=Amount(), help="Instead of MODEL: number of parameters, such as 7B.")
@click.option("--layers", type=click.IntRange(1), help="Instead of MODEL: number of layers.")
@click.option("--hidden", type=click.IntRange(1), help="Instead of MODEL: hidden size.")
@click.option("--heads", type=click.IntRange(1), help="Instead of MODEL: attention heads.")
@click.option("--kv-heads", type=click.IntRange(1), help="KV heads; default: as many as attention heads.")
@click.option("--head-dim", type=click.IntRange(1), help="Size of a head; default: hidden size / heads.")
@click.option("--intermediate", type=click.IntRange(1), help="Size of the feed-forward layers.")
@click.option(
    "--vocab", type=click.IntRange(1), default=32000, show_default=True, help="Size of the vocabulary."
)
@click.option("--gpus", "list_gpus", is_flag=True, help="List the GPU models and the formats they support.")
@click.option("--models", "list_models", is_flag=True, help="List the models that need no download.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None,
    gpu_name: str | None,
    count: int | None,
    tp: int,
    pp: int,
    max_model_len: str | None,
    length: int | None,
    concurrency: int,
    quantization: str | None,
    allow: str,
    engine_args: tuple[str, ...],
    list_gpus: bool,
    list_models: bool,
    as_json: bool,
    **plain: Any,
) -> None:
    """Check whether MODEL fits a GPU: memory by part, sequences at once, or the smallest change needed.

    MODEL is a folder, a GGUF file, a hub id or bundled:smollm2-135m. Instead of MODEL, plain numbers may be
    given: --params 7B --layers 32 --hidden 4096 --heads 32 --kv-heads 8. Exit status 1 if it doesn't fit.
    """
    if list_gpus:
        _print_gpus(as_json)
        return
    if list_models:
        _print_models(as_json)
        return
    if not gpu_name:
        raise click.UsageError("--gpu is missing: set a GPU model, --gpus lists them")
    gpu = gpu_named(gpu_name)
    loaded = _model(model, plain)
    settings = _settings(engine_args, tp, pp, max_model_len, quantization)
    limits = FitLimits(
        count=count or 0,
        length=length or 0,
        sequences=concurrency,
        quantizations=_formats(allow),
        alternatives=gpu_table(),
    )
    plan = plan_memory(loaded.spec, settings, gpu, loaded.extra)
    verdict = judge(plan, limits)
    if as_json:
        click.echo(json.dumps(_json(loaded, verdict), indent=2))
    else:
        _print(loaded, verdict)
    if isinstance(verdict, Unfit):
        click.get_current_context().exit(1)


def _model(model: str | None, plain: dict[str, Any]) -> LoadedModel:
    if model:
        return load_model(model)
    missing = [f"--{name.replace('_', '-')}" for name in ("layers", "hidden", "heads") if not plain[name]]
    if missing:
        raise click.UsageError(f"name a MODEL, or set its numbers; missing: {', '.join(missing)}")
    try:
        spec = plain_model(
            layers=plain["layers"],
            hidden=plain["hidden"],
            heads=plain["heads"],
            kv_heads=plain["kv_heads"] or plain["heads"],
            intermediate=plain["intermediate"] or 0,
            vocab=plain["vocab"],
            params=plain["params"] or 0,
            head_dim=plain["head_dim"] or 0,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return LoadedModel(spec, "plain numbers")


def _settings(
    pairs: tuple[str, ...], tp: int, pp: int, max_model_len: str | None, quantization: str | None
) -> EngineArgs:
    args: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        args[name.strip().lstrip("-")] = value if equals else True
    if max_model_len is not None:
        args["max-model-len"] = max_model_len
    if quantization is not None:
        args["quantization"] = quantization
    try:
        return parse_settings(args, tp=tp, pp=pp)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        try:
            preset(name)
        except KeyError:
            known = ", ".join(PRESETS)
            raise click.UsageError(f"--allow: unknown format '{name}'; known: {known}, gguf:TYPE") from None
    return names


def _summary(loaded: LoadedModel, plan: MemoryPlan) -> list[str]:
    spec = loaded.spec
    active = f", {spec.active_params / 1e9:.2f} B active per token" if spec.moe else ""
    lines = [
        f"{spec.name}: {spec.params / 1e9:.3f} B parameters{active}, {len(spec.layers)} layers, "
        f"from {loaded.where}",
        f"{plan.gpu.name} x {plan.settings.world_size} (tensor parallel {plan.settings.tp}, pipeline "
        f"parallel {plan.settings.pp}), {plan.dtype}, "
        f"weights {plan.settings.weights_format(spec).label}, "
        f"KV cache {plan.settings.cached_dtype(spec) or plan.dtype}",
    ]
    lines += [f"note: {text}" for text in (*spec.notes, *loaded.checks)]
    lines += [f"note: the effect of --{flag} on memory is not counted" for flag in plan.settings.unmodelled]
    return lines


def _print(loaded: LoadedModel, verdict: Verdict) -> None:
    console = stdout()

    def write(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    plan = verdict.plan
    for line in _summary(loaded, plan):
        write(line)
    for stage in plan.stages:
        if len(plan.stages) > 1:
            layers = stage.stage.layers
            write(f"pipeline stage {stage.stage.index}, layers {layers.start} to {layers.stop - 1}")
        console.print(_terms(plan, stage))
    write(
        f"KV cache: {gib(token_bytes(plan))} per token on each rank, {plan.blocks:,} blocks of "
        f"{plan.settings.block_tokens(plan.model)} tokens, {plan.kv_tokens:,} tokens in all"
    )
    if isinstance(verdict, Fit):
        console.print("[bold green]fits[/]", end="")
        write(
            f": {_count(verdict.sequences)} of {verdict.length:,} tokens at once; a single sequence may have "
            f"up to {plan.longest:,} tokens"
        )
        return
    console.print("[bold red]does not fit[/]")
    for reason in verdict.reasons:
        write(f"  {reason}")
    write(f"smallest change: {verdict.remedy}")
    if verdict.changed:
        length = verdict.changed.length
        sequences = verdict.changed.sequences(length)
        verb = "fits" if sequences == 1 else "fit"
        write(f"  then {_count(sequences)} of {length:,} tokens {verb} at once")


def _terms(plan: MemoryPlan, stage: StageMemory) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("per GPU")
    table.add_column("", justify="right")
    table.add_column("source", overflow="fold")
    for term in stage.terms:
        table.add_row(term.name, gib(term.size_bytes), term.source)
    rest = f"the rest of {gib(stage.budget_bytes)} ({plan.settings.memory_ratio:g} of the GPU)"
    source = "kv-cache-memory-bytes" if plan.settings.kv_cache_bytes else rest
    table.add_row("KV cache", gib(max(0, stage.kv_budget_bytes)), source)
    return table


def _count(sequences: int) -> str:
    return f"{sequences:,} sequence{'' if sequences == 1 else 's'}"


def _json(loaded: LoadedModel, verdict: Verdict) -> dict[str, Any]:
    plan = verdict.plan
    spec = loaded.spec
    result: dict[str, Any] = {
        "model": spec.name,
        "where": loaded.where,
        "params": spec.params,
        "active_params": spec.active_params,
        "gpu": plan.gpu.name,
        "tensor_parallel_size": plan.settings.tp,
        "pipeline_parallel_size": plan.settings.pp,
        "dtype": plan.dtype,
        "quantization": plan.settings.weights_format(spec).label,
        "fits": isinstance(verdict, Fit),
        "stages": [
            {
                "stage": stage.stage.index,
                "layers": len(stage.stage.layers),
                "terms": [
                    {"name": t.name, "size_bytes": t.size_bytes, "source": t.source} for t in stage.terms
                ],
                "budget_bytes": stage.budget_bytes,
                "kv_cache_bytes": max(0, stage.kv_budget_bytes),
                "block_bytes": stage.layout.block_bytes,
            }
            for stage in plan.stages
        ],
        "kv_bytes_per_token": token_bytes(plan),
        "kv_blocks": plan.blocks,
        "kv_tokens": plan.kv_tokens,
        "longest_tokens": plan.longest,
        "notes": [*spec.notes, *loaded.checks],
        "not_counted": list(plan.settings.unmodelled),
    }
    if isinstance(verdict, Fit):
        result |= {"length": verdict.length, "max_sequences": verdict.sequences}
    else:
        result |= {
            "reasons": list(verdict.reasons),
            "needed_bytes": verdict.needed_bytes,
            "available_bytes": verdict.available_bytes,
            "smallest_change": [
                {"setting": c.setting, "before": c.before, "after": c.after} for c in verdict.changes
            ],
        }
    return result


def _print_gpus(as_json: bool) -> None:
    rows = gpu_table()
    if as_json:
        click.echo(json.dumps({"gpus": [_gpu_json(gpu) for gpu in rows]}, indent=2))
        return
    numbers = ("memory", "usable", "capability", "GB/s", "NVLink GB/s", "16 bit TFLOPS")
    table = FittingTable("GPU", *numbers, "formats", right=numbers)
    for gpu in rows:
        table.add_row(
            gpu.name,
            f"{gpu.memory_mib} MiB",
            f"{gpu.usable_mib} MiB",
            f"{gpu.capability / 10}",
            f"{gpu.bandwidth_bytes_per_s / 1e9:.0f}",
            f"{gpu.nvlink_bytes_per_s / 1e9:.0f}" if gpu.nvlink_bytes_per_s else "none",
            f"{gpu.flops['float16'] / 1e12:g}",
            ("bf16 " if gpu.bfloat16 else "") + " ".join(gpu.quantizations()),
        )
    stdout().print(table)


def _gpu_json(gpu: GpuModel) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "aliases": list(gpu.aliases),
        "memory_mib": gpu.memory_mib,
        "usable_mib": gpu.usable_mib,
        "compute_capability": gpu.capability / 10,
        "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "nvlink_bytes_per_s": gpu.nvlink_bytes_per_s,
        "flops": dict(gpu.flops),
        "bfloat16": gpu.bfloat16,
        "fp8_kv_cache": gpu.fp8_kv_cache,
        "quantizations": gpu.quantizations(),
        "source": gpu.source,
    }


def _print_models(as_json: bool) -> None:
    rows = [{"name": entry["name"], "params": entry["total_params"]} for entry in known_models()]
    if as_json:
        click.echo(json.dumps({"models": rows}, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']}: {row['params'] / 1e9:.3f} B parameters")
