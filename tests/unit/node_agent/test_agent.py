"""The node agent as a whole, in a child process against the scripted driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.core.telemetry.samples import Absence, GpuCondition, GpuEvent, GpuEventKind, Missing
from controlplane.node_agent.agent import NodeAgent
from controlplane.node_agent.local import disk_paths
from controlplane.node_agent.nvml.events import EventWatcher
from controlplane.node_agent.nvml.reader import GpuReader
from tests.support.nvml_driver.children import Child
from tests.support.nvml_driver.driver import DOUBLE_BIT_ECC_EVENT, NOT_SUPPORTED, FakeDriver

AGENT = """
import functools
from controlplane.node_agent.agent import NodeAgent
from controlplane.node_agent.nvml.events import EventWatcher
from controlplane.node_agent.nvml.reader import GpuReader
agent = NodeAgent(
    "node-a",
    GpuReader(slow_interval_s=0.02, retry_interval_s=0.05),
    functools.partial(EventWatcher, retry_interval_s=0.05),
    interval_s=0.02,
    max_events=5,
)
agent.start()
"""


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return FakeDriver(tmp_path, devices=8)


@pytest.fixture
def child(driver: FakeDriver) -> Iterator[Child]:
    with Child(AGENT, driver.env()) as running:
        running.until("agent.latest() and agent.latest().xid_watched_gpus", lambda watched: watched == 8)
        yield running
        running.ask("agent.stop()")


def kinds(events: list[GpuEvent]) -> list[tuple[GpuEventKind, str]]:
    return [(event.kind, event.gpu_uuid) for event in events]


def test_a_node_without_gpus() -> None:
    agent = NodeAgent("node-a", GpuReader(), EventWatcher, disk_paths=["/no/such/folder"])
    first, second = agent.sample(), agent.sample()
    assert (first.node_id, first.epoch, first.gpus) == ("node-a", agent.epoch, ())
    assert isinstance(first.cpu_ratio, Missing)
    assert isinstance(second.cpu_ratio, float)
    assert isinstance(second.memory_total_bytes, int)
    assert isinstance(second.memory_available_bytes, int)
    assert 0 < second.memory_available_bytes < second.memory_total_bytes
    assert isinstance(second.disk_free_bytes, Missing)
    assert isinstance(second.driver_version, Missing)
    assert second.driver_version.absence is Absence.NO_DRIVER
    assert (first.seq, second.seq) == (1, 2)
    assert first.boot_id == second.boot_id != ""
    assert isinstance(second.load_1m, float)
    assert second.hostname


def test_each_file_system_is_measured_once(tmp_path: Path) -> None:
    """The first folder's file system comes first; one that does not exist is left out."""
    paths = [str(tmp_path), "/no/such/folder", str(tmp_path), "/proc"]
    sample = NodeAgent("node-a", GpuReader(), EventWatcher, disk_paths=paths).sample()
    assert [disk.path for disk in sample.disks] == [str(tmp_path), "/proc"]
    assert sample.disk_free_bytes == sample.disks[0].free_bytes
    assert 0 < sample.disks[0].free_bytes <= sample.disks[0].total_bytes


def test_the_folders_that_may_fill_up_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "models"))
    run, temporary, models = disk_paths()
    assert all(Path(path).exists() for path in (run, temporary, models))
    assert run in (str(tmp_path), str(tmp_path / "not" / "yet"))
    assert models == str(tmp_path)


def test_xid_events_arrive_at_once_and_in_order(child: Child, driver: FakeDriver) -> None:
    driver.xid(3, 79)
    driver.event(5, DOUBLE_BIT_ECC_EVENT)
    driver.xid(3, 31)
    events = child.until("agent.events()", lambda found: len(found) == 3)
    assert [(event.kind, event.gpu_uuid, event.code) for event in events] == [
        (GpuEventKind.XID, driver.uuid(3), 79),
        (GpuEventKind.UNCORRECTED_ECC, driver.uuid(5), 0),
        (GpuEventKind.XID, driver.uuid(3), 31),
    ]
    assert child.ask(f"agent.events({events[1].seq})") == events[2:]
    assert child.ask(f"agent.events({events[1].seq}, agent.epoch)") == events[2:]
    assert child.ask(f"agent.events({events[1].seq}, 'the epoch of an earlier agent')") == events
    assert child.ask("agent.events(10**9)") == []
    for code in range(10):
        driver.xid(0, code)
    bounded = child.until("agent.events()", lambda found: found[-1].code == 9)
    assert [event.code for event in bounded] == [5, 6, 7, 8, 9]


def test_a_lost_gpu_is_an_event_and_the_others_go_on(child: Child, driver: FakeDriver) -> None:
    driver.lose(3)
    child.until("agent.events()", lambda found: kinds(found) == [(GpuEventKind.LOST, driver.uuid(3))])
    child.until("agent.latest().xid_watched_gpus", lambda watched: watched == 7)
    driver.xid(4, 48)
    child.until("agent.events()", lambda found: found[-1].code == 48)
    driver.find(3)
    child.until("agent.latest().gpus[3].condition", lambda condition: condition is GpuCondition.OK)
    child.until("agent.latest().xid_watched_gpus", lambda watched: watched == 8)
    driver.xid(3, 94)
    child.until("agent.events()", lambda found: (found[-1].gpu_uuid, found[-1].code) == (driver.uuid(3), 94))


def test_the_driver_goes_and_comes_back(child: Child, driver: FakeDriver) -> None:
    driver.driver_gone()
    child.until("agent.events()", lambda found: kinds(found) == [(GpuEventKind.DRIVER_GONE, "")])
    sample = child.ask("agent.latest()")
    assert {gpu.condition for gpu in sample.gpus} == {GpuCondition.UNREADABLE}
    assert len(sample.gpus) == 8
    child.until("agent.latest().xid_watched_gpus", lambda watched: isinstance(watched, Missing))
    driver.write()
    child.until("agent.events()", lambda found: kinds(found)[1:] == [(GpuEventKind.DRIVER_BACK, "")])
    child.until("agent.latest().xid_watched_gpus", lambda watched: watched == 8)
    driver.xid(1, 62)
    child.until("agent.events()", lambda found: found[-1].code == 62)


def test_a_driver_that_hangs_delays_no_reader(child: Child, driver: FakeDriver) -> None:
    """The last sample grows old (which is what a reader has to see) and is there at once."""
    driver.set(2, hang_ms=2000)
    child.until("__import__('time').time() - agent.latest().unix_s", lambda age_s: age_s > 0.5)
    elapsed = child.ask(
        "(lambda time: (lambda began: (agent.latest(), agent.update('', 0, ('', 0)), agent.events(),"
        " time.monotonic() - began)[-1])(time.monotonic()))(__import__('time'))"
    )
    assert elapsed < 0.3
    driver.set(2, hang_ms=0)
    child.until("__import__('time').time() - agent.latest().unix_s", lambda age_s: age_s < 0.5)


def test_events_that_the_driver_does_not_offer(tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path, devices=2)
    driver.fail(0, "events", NOT_SUPPORTED)
    with Child(AGENT, driver.env()) as child:
        child.until("agent.latest() and agent.latest().xid_watched_gpus", lambda watched: watched == 1)
        driver.fail(1, "events", NOT_SUPPORTED)
        driver.driver_gone()
        child.until("agent.latest().xid_watched_gpus", lambda watched: isinstance(watched, Missing))
        driver.write()
        missing = child.until(
            "agent.latest().xid_watched_gpus",
            lambda watched: isinstance(watched, Missing) and watched.absence is Absence.NOT_SUPPORTED,
        )
        assert missing.reason == "GPU events: Not Supported"
        child.ask("agent.stop()")


def test_events_without_the_functions(tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path, devices=2, without=("nvmlEventSetCreate", "nvmlEventSetWait_v2"))
    with Child(AGENT, driver.env()) as child:
        missing = child.until(
            "agent.latest() and agent.latest().xid_watched_gpus",
            lambda watched: isinstance(watched, Missing) and watched.absence is Absence.NO_FUNCTION,
        )
        assert missing.reason.startswith("GPU events")
        assert child.ask("agent.latest().gpus[0].condition") is GpuCondition.OK
        child.ask("agent.stop()")


def test_stopping_is_prompt_and_final(driver: FakeDriver) -> None:
    with Child(AGENT, driver.env()) as child:
        child.until("agent.latest()", lambda latest: latest is not None)
        child.ask("agent.stop()")
        last = child.ask("agent.latest().seq")
        assert child.ask("agent.latest().seq") == last
        assert child.ask("[thread.name for thread in __import__('threading').enumerate()]") == ["MainThread"]
