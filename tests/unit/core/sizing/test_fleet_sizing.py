"""The cheapest options that meet the SLO and fit the fleet, with reasons."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.core.domain.request import RequestShape
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.fleet_sizing import (
    FleetGpu,
    FleetSizing,
    NoFleetSizing,
    TierNeed,
    options,
    size_tiers,
)
from controlplane.core.sizing.gpu_models import unlisted_gpu
from controlplane.core.sizing.roofline import LatencyTargets, roofline
from controlplane.models.catalog import gpu_named, known_model

SETTINGS = EngineArgs(max_length=8192)


RELAXED = LatencyTargets(1000, 50)
REQUEST = RequestShape(1000, 250)


def need(
    model: str, rate: float, *, slo: LatencyTargets = RELAXED, formats: tuple[str, ...] = ("none",)
) -> TierNeed:
    spec = known_model(model)
    assert spec is not None
    return TierNeed(model, spec, REQUEST, rate, slo, formats, SETTINGS)


def fleet(**counts: Any) -> list[FleetGpu]:
    prices = {"L4": 0.7, "A100": 2.5, "H100": 4.0}
    return [FleetGpu(gpu_named(name), count, prices[name]) for name, count in counts.items()]


def test_the_cheapest_option_that_meets_the_slo() -> None:
    found = size_tiers([need("qwen2.5-1.5b-instruct", 5)], fleet(L4=8, H100=8))
    assert isinstance(found, FleetSizing)
    (choice,) = found.choices
    assert choice.option.gpu == "L4"
    assert choice.option.expected.itl_ms <= 50
    assert choice.option.expected.ttft_ms <= 1000
    assert choice.next_best is not None
    assert choice.next_best.cost_per_hour >= choice.option.cost_per_hour
    assert "requests/s" in choice.why
    assert found.cost_per_hour == choice.option.cost_per_hour


def test_a_strict_slo_takes_a_faster_gpu() -> None:
    slow = size_tiers([need("llama-3.1-8b-instruct", 1, slo=LatencyTargets(2000, 100))], fleet(L4=8, H100=8))
    fast = size_tiers([need("llama-3.1-8b-instruct", 1, slo=LatencyTargets(500, 15))], fleet(L4=8, H100=8))
    assert isinstance(slow, FleetSizing)
    assert isinstance(fast, FleetSizing)
    assert (slow.choices[0].option.gpu, fast.choices[0].option.gpu) == ("L4", "H100-80G")


def test_only_allowed_formats_are_chosen() -> None:
    plain = size_tiers([need("llama-3.1-70b-instruct", 1, slo=LatencyTargets(3000, 80))], fleet(H100=4))
    assert isinstance(plain, FleetSizing)
    assert plain.choices[0].option.quantization == "none"
    allowed = need("llama-3.1-70b-instruct", 1, slo=LatencyTargets(3000, 80), formats=("none", "fp8"))
    smaller = size_tiers([allowed], fleet(H100=4))
    assert isinstance(smaller, FleetSizing)
    assert smaller.choices[0].option.quantization == "fp8"
    assert smaller.cost_per_hour < plain.cost_per_hour


def test_tiers_share_the_fleet() -> None:
    needs = [
        need("qwen2.5-1.5b-instruct", 5),
        need("llama-3.1-8b-instruct", 0.2, slo=LatencyTargets(2000, 100)),
    ]
    alone = [size_tiers([one], fleet(L4=1, H100=2)) for one in needs]
    together = size_tiers(needs, fleet(L4=1, H100=2))
    assert all(isinstance(one, FleetSizing) for one in alone)
    assert isinstance(together, FleetSizing)
    assert dict(together.gpus_used).get("L4", 0) <= 1
    assert dict(together.gpus_used)["H100-80G"] >= 1
    assert any("other tiers take those GPUs" in choice.why for choice in together.choices)


def test_more_load_never_takes_fewer_gpus() -> None:
    counts = []
    for rate in (1, 5, 20, 60):
        found = size_tiers([need("llama-3.1-8b-instruct", rate)], fleet(H100=64))
        assert isinstance(found, FleetSizing)
        counts.append(found.choices[0].option.gpus)
    assert counts == sorted(counts)


def test_every_option_that_was_ruled_out_has_a_reason() -> None:
    good, bad = options(need("llama-3.1-70b-instruct", 1), fleet(L4=8, A100=8))
    assert bad
    assert all(entry.reason for entry in bad)
    assert len(good) + len(bad) == 8


def test_a_load_that_nothing_serves_is_a_value_with_reasons() -> None:
    found = size_tiers([need("llama-3.1-70b-instruct", 1)], fleet(L4=2))
    assert isinstance(found, NoFleetSizing)
    assert "llama-3.1-70b-instruct" in found.reasons[0]
    crowded = size_tiers([need("llama-3.1-8b-instruct", 1), need("qwen3-8b", 1)], fleet(H100=1))
    assert isinstance(crowded, NoFleetSizing)
    assert "more GPUs than there are" in crowded.reasons[0]


def test_a_gpu_of_unknown_speed_is_ruled_out() -> None:
    unknown = FleetGpu(unlisted_gpu("New GPU", 81920, 90), 4, 1.0)
    good, bad = options(need("qwen3-8b", 1), [unknown])
    assert not good
    assert "is unknown" in bad[0].reason


def test_decode_is_bound_by_reading_the_weights() -> None:
    spec = known_model("llama-3.1-8b-instruct")
    assert spec is not None
    line = roofline(spec, SETTINGS, gpu_named("H100"))
    least = (spec.params - spec.embedding().params) * 2 / gpu_named("H100").bandwidth_bytes_per_s
    assert least < line.step_s(1, 100) < 2.5 * least
    assert line.step_s(64, 1000) < 4 * line.step_s(1, 1000)


def test_an_overload_is_infinite() -> None:
    spec = known_model("llama-3.1-8b-instruct")
    assert spec is not None
    line = roofline(spec, SETTINGS, gpu_named("L4"))
    assert line.speed(REQUEST, 1e3).ttft_ms == float("inf")
    idle = line.capacity(REQUEST, LatencyTargets(1, 1), 10)
    assert idle.requests_per_s == 0
    assert idle.ttft_ms == pytest.approx(line.speed(REQUEST, 0).ttft_ms)
