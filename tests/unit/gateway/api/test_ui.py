"""The operators' page in a browser: what it shows, and that none of its data becomes a script."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.gpus.node_views import DiskView, NodeView
from controlplane.core.gpus.views import GpuView
from controlplane.core.recommendations.log import TrackRecord
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reports.report import Instance, InstanceKind, ReportSample, plane_report
from controlplane.core.telemetry.series import Freshness
from controlplane.errors import TierplaneError
from deployments.node_figures import watch_nodes
from tests.support.debian_tools import tool
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.reports import added_up
from tests.support.waiting import until_async

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
BROWSER_S = 60.0


async def seen(rig: Rig, folder: Path, *more: str) -> str:
    """The page's elements after its script has loaded everything once."""
    command = [
        *(tool("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder}", "--virtual-time-budget=2500", *more, "--dump-dom", f"{rig.base}/ui"),
    ]
    browser = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        output, _ = await asyncio.wait_for(browser.communicate(), BROWSER_S)
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()
    text = output.decode()
    assert re.search(r'data-refreshes="[1-9]', text), "the script has not run to its end"
    assert "<title>tierplane</title>" in text, "a script has run that is not the page's own"
    return text[text.index("<body") :].partition("<script>")[0]


def section(text: str, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    assert found is not None
    return found[0]


def gpu(**fields: Any) -> GpuView:
    values: dict[str, Any] = dict.fromkeys(GpuView.__slots__)
    values |= {"uuid": "GPU-5c72063a", "node_id": "n1", "index": 0, "name": EVIL, "state": "suspect"}
    values |= {"holders": (), "freshness": Freshness.FRESH, "gpu_ratio": 0.57, "reason": EVIL, "peers": ()}
    return GpuView(**{**values, **fields})


def report() -> Any:
    sample = ReportSample(
        watched_s=60, up_s=45, counted_s=60, requests=1234, answered=1200, judged=100, missed=1
    )
    found = added_up([sample])
    tier = Instance(InstanceKind.TIER, "balanced", "balanced")
    span: dict[str, Any] = {"from_unix_s": 0.0, "until_unix_s": 3600.0, "step_s": 30}
    tracks = {"balanced": {0: found, 1: found, 9: found}}
    return plane_report({tier: found}, tracks, tiers={"balanced": 0.995}, present=[], **span)


NODE = NodeView(
    node_id="node-a",
    hostname="host-a",
    freshness=Freshness.FRESH,
    age_s=1.0,
    cordoned="",
    cpu_count=8,
    cpu_ratio=0.25,
    load_1m=2.5,
    memory_total_bytes=64 * 2**30,
    memory_available_bytes=16 * 2**30,
    disks=(DiskView("/run/tierplane", 100 * 2**30, 4 * 2**30),),
    gpus=2,
)


class Played:
    """A controller with fixed data."""

    async def gpus(self) -> Any:
        return (gpu(),)

    async def nodes(self) -> Any:
        return (NODE,)

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return await getattr(self, name)(**arguments)

    async def plane_report(self, window_minutes: float) -> Any:
        return report()

    async def scaling(self) -> Any:
        return ScalingReport("advise", (), (), TrackRecord(0, 0, 0, None))


class Away:
    """A controller that can't be reached."""

    async def gpus(self) -> Any:
        raise TierplaneError("the controller is gone")

    async def nodes(self) -> Any:
        raise TierplaneError("the controller is gone")

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return await getattr(self, name)(**arguments)

    async def plane_report(self, window_minutes: float) -> Any:
        raise TierplaneError("the controller is gone")

    async def scaling(self) -> Any:
        raise TierplaneError("the controller is gone")


async def test_the_page_shows_the_plane_and_runs_no_script_from_its_data(tmp_path: Path) -> None:
    async with running(plane({"name": "balanced"}, {"name": "capable"})) as rig:
        rig.gateway.controller = Played()
        await rig.engine("balanced-1")
        await rig.engine("capable-1", "capable")
        rig.change("capable-1", state=EndpointState.FAILED, diagnosis=EVIL)
        await rig.post(CHAT, chat_body(max_tokens=2))
        text = await seen(rig, tmp_path)
        for name in ("tiers", "endpoints", "nodes", "gpus", "recommendations", "report", "alerts"):
            assert "hidden" not in section(text, name).partition(">")[0], name
    assert "degraded" in text.partition("</header>")[0]
    assert ">failed</span>" in section(text, "endpoints")
    assert "&lt;img src=x" in section(text, "endpoints")
    assert "57 %" in section(text, "gpus")
    assert "/run/tierplane: 4 of 100" in section(text, "nodes")
    assert "1,234" in section(text, "report")
    assert section(text, "report").count("<path") == 2, "a line where two points follow each other …"
    assert section(text, "report").count("<circle") == 2, "… and a dot beyond the gap"
    assert "75 %" in section(text, "report")
    assert "99.5 %, missed" in section(text, "report")
    assert "No recommendations" in section(text, "recommendations")
    assert "<img" not in text


async def test_without_the_controller_the_page_says_what_is_unavailable(tmp_path: Path) -> None:
    async with running() as rig:
        rig.gateway.controller = Away()
        await rig.engine("balanced-1")
        text = await seen(rig, tmp_path)
    assert ">healthy</span>" in section(text, "tiers")
    for name in ("nodes", "gpus", "recommendations", "report"):
        assert "Unavailable: the controller is gone" in section(text, name)


async def test_nothing_is_loaded_from_elsewhere_and_only_the_pages_own_script_may_run() -> None:
    async with running() as rig:
        async with rig.client.get(f"{rig.base}/ui") as response:
            text, policy = await response.text(), response.headers["content-security-policy"]
        assert response.status == 200
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert policy.count("'sha256-") == 2
        assert links(text) == ["data:,"]


def links(text: str) -> Sequence[str]:
    return re.findall(r"(?:src|href)=[\"']?([^\"'> ]+)", text)


async def test_gpus_are_returned_as_json() -> None:
    async with running() as rig:
        assert (await rig.get("/gpus"))[0] == 503
        rig.gateway.controller = Played()
        status, value = await rig.get("/gpus")
        assert (status, value["gpus"][0]["uuid"]) == (200, "GPU-5c72063a")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_the_page_is_only_read(method: str) -> None:
    async with running() as rig:
        async with rig.client.request(method, f"{rig.base}/ui") as response:
            assert response.status == 405


async def test_nodes_are_returned_as_json_and_exported_as_metrics() -> None:
    async with running() as rig:
        assert (await rig.get("/nodes"))[0] == 503
        rig.gateway.controller = Played()
        status, value = await rig.get("/nodes")
        assert (status, value["nodes"][0]["disks"][0]["free_bytes"]) == (200, 4 * 2**30)
        assert value["unix_s"] > 0
        watching = asyncio.create_task(watch_nodes(rig.gateway))
        await until_async(lambda: "tierplane_node_cpu_ratio{" in rig.gateway.metrics.text())
        watching.cancel()
        async with rig.client.get(f"{rig.base}/metrics") as response:
            text = await response.text()
    assert 'node="node-a",path="/run/tierplane"} 4.294967296e+09' in text
    assert re.search(r'tierplane_node_memory_available_bytes{.*node="node-a"} 1.7179869184e\+10', text)
    rig.gateway.metrics.observe_nodes(())
    assert "tierplane_node_cpu_ratio{" not in rig.gateway.metrics.text(), "what is not known has no series"
