"""Scenario templates: what they add, what overrides them, and whether the installed vLLM accepts them."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from controlplane.cli.planning.command import command
from controlplane.config import TierConfig, load_plane, parse_plane
from controlplane.config.outdated_flags import OUTDATED, map_outdated
from controlplane.config.profiles import PROFILES, Scenario
from controlplane.config.vllm_flags import drift, known_vllm_flags, vllm_flag_values
from controlplane.core.sizing.engine_args import parse_settings
from controlplane.core.sizing.feasibility import Fit, judge
from controlplane.core.sizing.gpu_memory import plan_memory
from controlplane.engines.base import Launch
from controlplane.engines.vllm import VllmEngine
from controlplane.engines.vllm_parser import check_command_lines
from controlplane.errors import ConfigError
from controlplane.models.catalog import gpu_named, known_model
from tests.support.repository import ROOT

DOC = (ROOT / "controlplane" / "config" / "profiles.md").read_text("utf-8")
GPUS = {"production-low": "L4", "production-high": "L4", "production-enterprise": "H100-80G"}


def tier(**values: Any) -> TierConfig:
    return parse_plane({"tiers": [{"name": "a", "model": "org/m", **values}]}).tiers[0]


def problems(values: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_plane(values)
    return {each.path: f"{each.message} ({each.remedy})" for each in caught.value.problems}


SPECIFIED = {
    "development": (0.6, 2048, 1, 1, 32, 2048, None, False, False, False, False),
    "staging": (0.8, 4096, 1, 1, 64, 4096, "awq", True, False, False, False),
    "production_low": (0.85, 4096, 1, 1, 128, 8192, "awq", True, True, False, False),
    "production_high": (0.9, 8192, 2, 1, 256, 16384, "awq", True, True, True, False),
    "enterprise": (0.95, 16384, 4, 2, 512, 32768, "awq", True, True, True, True),
}


@pytest.mark.parametrize("name", get_args(Scenario))
def test_a_scenario_adds_what_the_tier_does_not_set(name: str) -> None:
    filled = tier(profile=name)
    args = filled.engine_args
    assert SPECIFIED[name] == (
        args["gpu-memory-utilization"],
        args["max-model-len"],
        filled.tensor_parallel_size,
        filled.pipeline_parallel_size,
        args["max-num-seqs"],
        args["max-num-batched-tokens"],
        args.get("quantization"),
        args["enable-prefix-caching"],
        args["enable-chunked-prefill"],
        "speculative-config" in args,
        "structured-outputs-config" in args,
    )


def test_a_tiers_own_settings_win_flag_by_flag() -> None:
    filled = tier(
        profile="production_high",
        tensor_parallel_size=1,
        engine_args={"max_model_len": 512, "quantization": None, "no-enable-prefix-caching": True},
    )
    assert filled.tensor_parallel_size == 1
    assert filled.engine_args["max-model-len"] == 512
    assert filled.engine_args["quantization"] is None
    assert "enable-prefix-caching" not in filled.engine_args
    assert filled.engine_args["max-num-seqs"] == 256
    assert TierConfig.model_validate(filled.model_dump()) == filled


def test_a_draft_model_replaces_the_lookup_in_the_prompt() -> None:
    looked_up = json.loads(str(tier(profile="production_high").engine_args["speculative-config"]))
    assert looked_up["method"] == "ngram"
    drafted = tier(profile="production_high", draft_model="org/draft").engine_args["speculative-config"]
    assert json.loads(str(drafted))["model"] == "org/draft"


def test_on_a_cpu_gpu_settings_are_left_out() -> None:
    args = tier(profile="production_low", device="cpu").engine_args
    assert "quantization" not in args
    assert "gpu-memory-utilization" not in args
    assert args["max-num-seqs"] == 128


def test_a_planes_profile_applies_to_every_vllm_tier_without_its_own() -> None:
    plane = parse_plane(
        {
            "profile": "staging",
            "tiers": [
                {"name": "a", "model": "m"},
                {"name": "b", "model": "m", "profile": "development"},
                {"name": "c", "model": "m", "profile": None},
                {"name": "d", "engine": "simulated"},
            ],
        }
    )
    assert [each.profile for each in plane.tiers] == ["staging", "development", None, None]
    assert [each.engine_args.get("max-model-len") for each in plane.tiers] == [4096, 2048, None, None]


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({"profile": "prod", "tiers": [{"name": "a", "model": "m"}]}, "profile", "production_low"),
        ({"tiers": [{"name": "a", "model": "m", "profile": "stagin"}]}, "tiers[0].profile", "'staging'?"),
        (
            {"tiers": [{"name": "a", "engine": "simulated", "profile": "staging"}]},
            "tiers[0].profile",
            "only engine 'vllm'",
        ),
        (
            {"profile": "staging", "tiers": [{"name": "a", "model": "m", "draft_model": "d"}]},
            "tiers[0].draft_model",
            "has no speculative decoding (use profile production_high or enterprise",
        ),
        (
            {"profile": "enterprise", "tiers": [{"name": "a", "model": "m", "gpu_share": 0.5}]},
            "tiers[0].gpu_share",
            "with parallelism can't run on a share of a GPU",
        ),
        (
            {
                "profile": "staging",
                "tiers": [{"name": "a", "model": "m", "engine_args": {"max-model-length": 1}}],
            },
            "tiers[0].engine_args.max-model-length",
            "vLLM",
        ),
    ],
)
def test_errors_have_their_path(values: dict[str, Any], path: str, message: str) -> None:
    found = problems(values)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize("name", GPUS)
def test_the_production_files_fit_their_gpus(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    for each in load_plane(path).plane.tiers:
        model = known_model(each.model.removesuffix("-AWQ"))
        assert model is not None, each.model
        settings = parse_settings(
            each.engine_args, tp=each.tensor_parallel_size, pp=each.pipeline_parallel_size
        )
        assert isinstance(judge(plan_memory(model, settings, gpu_named(GPUS[name]))), Fit), each.name


def test_every_shipped_production_file_is_checked() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("production-*.yaml")} == set(GPUS)


def test_outdated_flags_are_mapped_or_refused() -> None:
    mapped = map_outdated(
        {
            "speculative-model": "[ngram]",
            "num_speculative_tokens": 4,
            "ngram-prompt-lookup-max": 3,
            "guided-decoding-backend": "xgrammar",
            "disable-log-requests": True,
            "cuda-graph-sizes": 8,
            "max-model-len": 1024,
            "swap-space": 4,
        }
    )
    assert mapped.args == {
        "cudagraph-capture-sizes": 8,
        "max-model-len": 1024,
        "speculative-config": '{"num_speculative_tokens":4,"prompt_lookup_max":3,"method":"ngram"}',
        "structured-outputs-config": '{"backend":"xgrammar"}',
    }
    assert len(mapped.notes) == 6
    assert [(each.path, each.remedy) for each in mapped.refused] == [
        (("swap-space",), OUTDATED["swap-space"].remedy)
    ]


def test_the_table_of_outdated_flags_matches_vllms_flags() -> None:
    _, known = known_vllm_flags()
    assert set(OUTDATED) & known == set()
    assert {each.to for each in OUTDATED.values() if each.to} <= known
    assert all(each.to for each in OUTDATED.values() if each.kind in {"renamed", "merged"})
    for flag in ("speculative-model", "disable-log-requests", "guided-decoding-backend", "swap-space"):
        assert f"--{flag}" in DOC


def test_the_command_refuses_an_outdated_flag_or_maps_it_on_request() -> None:
    arguments = ["org/m", "--scenario", "staging", "--no-check", "--engine-arg"]
    refused = CliRunner().invoke(command, [*arguments, "guided-decoding-backend=outlines"])
    assert isinstance(refused.exception, ConfigError)
    assert "--engine-arg guided-decoding-backend" in str(refused.exception)
    assert "structured-outputs-config" in str(refused.exception)
    done = CliRunner().invoke(
        command, [*arguments, "guided-decoding-backend=outlines", "--map-outdated", "--json"]
    )
    output = json.loads(done.stdout)
    assert '--structured-outputs-config={"backend":"outlines"}' in output["argv"]
    assert output["notes"] == [
        "--guided-decoding-backend is the key backend of --structured-outputs-config now"
    ]
    assert "VLLM_API_KEY" not in output["env"]


def test_the_printed_command_is_the_one_in_the_json() -> None:
    arguments = ["org/m", "--scenario", "enterprise", "--no-check"]
    printed = CliRunner().invoke(command, arguments).stdout
    output = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).stdout)
    joined = printed.replace(" \\\n ", "")
    assert all(word in joined for word in output["argv"])
    assert "--tensor-parallel-size 4" in printed


@pytest.mark.vllm
def test_the_installed_vllm_accepts_every_scenario_and_has_the_listed_flags() -> None:
    """Fails when a vLLM with other flags is installed: the message says what changed."""
    tiers = [
        tier(profile=name, device=device, **draft)
        for name in PROFILES
        for device in ("gpu", "cpu")
        for draft in ({}, {"draft_model": "org/draft"})
        if not draft or PROFILES[name].speculative
    ]
    launch = Launch("127.0.0.1", 4000, "s3cret", "org/m")
    lines = [VllmEngine().command(each, launch).argv[3:] for each in tiers]
    outdated = [
        ["--model", "m", "--speculative-model", "d"],
        ["--model", "m", "--disable-log-requests"],
        ["--model", "m", "--guided-decoding-backend", "xgrammar"],
    ]
    report = check_command_lines([*lines, *outdated])
    assert report.errors[: len(lines)] == ("",) * len(lines)
    assert all("unrecognized arguments" in error for error in report.errors[len(lines) :])
    changed = drift(report.version, report.flags)
    assert not changed, f"{changed}. Then: make vllm-flags"
    assert report.values == vllm_flag_values(), "flags take other values. Then: make vllm-flags"


def test_drift_shows_what_a_new_vllm_changes() -> None:
    _, known = known_vllm_flags()
    assert not drift("0.33", known)
    changed = drift("0.33", (known - {"max-num-seqs"}) | {"swap-space", "new-flag"})
    assert (changed.added, changed.removed, changed.reintroduced) == (
        ("new-flag", "swap-space"),
        ("max-num-seqs",),
        ("swap-space",),
    )
    assert len(changed.profiles) == len(PROFILES)
    assert "no longer work" in str(changed)


@pytest.mark.parametrize(
    "argument",
    ["revision=0755123", "tokenizer-revision=1:30", "revision=1e5", "revision=no", "revision=2026-11-30"],
)
def test_values_of_the_command_line_stay_what_they_are(argument: str) -> None:
    done = CliRunner().invoke(
        command, ["a/b", "--scenario", "development", "--no-check", "--engine-arg", argument]
    )
    assert done.exit_code == 0, done.output
    assert f"--{argument}" in done.stdout


def test_a_template_on_the_command_line_is_text() -> None:
    template = "chat-template={% for m in messages %}{{ m }}{% endfor %}"
    done = CliRunner().invoke(
        command, ["a/b", "--scenario", "development", "--no-check", "--json", "--engine-arg", template]
    )
    assert f"--{template}" in json.loads(done.stdout)["argv"]


def test_a_flag_given_twice_on_the_command_line_is_refused() -> None:
    arguments = ["--engine-arg", "max-num-seqs=4", "--engine-arg", "max_num_seqs=5"]
    done = CliRunner().invoke(command, ["a/b", "--scenario", "development", "--no-check", *arguments])
    assert "is given twice" in str(done.exception)
