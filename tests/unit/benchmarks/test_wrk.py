from __future__ import annotations

import asyncio
import shutil

import pytest

from controlplane.errors import SetupError
from tests.benchmarks import wrk
from tests.benchmarks.wrk import Target
from tests.support.gateway import plane, running


def test_without_wrk_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="apt-get install wrk"):
        wrk.require_wrk()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")
@pytest.mark.parametrize("error_rate", [0.0, 0.05])
async def test_a_run_with_answers_that_are_no_2xx_gives_no_figure(error_rate: float) -> None:
    async with running(plane(retry={"max_attempts": 1})) as rig:
        await rig.engine("a", error_rate=error_rate)
        target = Target("gateway", rig.base, "balanced")
        running_wrk = asyncio.to_thread(wrk.run, target, "post", 2, 1.0)
        if error_rate:
            with pytest.raises(SetupError, match=r"[1-9]\d* answers were no 2xx"):
                await running_wrk
        else:
            figures = await running_wrk
            assert figures.per_s > 0
            assert 0 < figures.p50_ms <= figures.p99_ms
