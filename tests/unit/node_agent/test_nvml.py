"""The GPU reader through the real nvidia-ml-py, in a child process that finds the scripted driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.core.telemetry.samples import (
    Absence,
    GpuCondition,
    GpuSample,
    Missing,
    RecoveryAction,
    RowRemaps,
)
from tests.support.nvml_driver.children import Child
from tests.support.nvml_driver.driver import (
    DRIVER_NOT_LOADED,
    GIB,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeDriver,
)

READER = """
from controlplane.node_agent.nvml.reader import GpuReader
reader = GpuReader(slow_interval_s=0.0, retry_interval_s=0.0)
"""
READINGS = (
    *("memory_total_bytes", "memory_used_bytes", "memory_free_bytes", "gpu_ratio", "temperature_c"),
    *("power_w", "sm_clock_mhz", "throttle", "ecc_corrected", "ecc_uncorrected"),
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[FakeDriver, Child]]]:
    children: list[Child] = []

    def begin(**settings: Any) -> tuple[FakeDriver, Child]:
        driver = FakeDriver(tmp_path, **settings)
        child = Child(READER, driver.env())
        children.append(child)
        return driver, child

    yield begin
    for child in children:
        child.__exit__()


def read(child: Child) -> tuple[GpuSample, ...]:
    gpus: tuple[GpuSample, ...] = child.ask("reader.read()")
    return gpus


def absence(reading: object) -> Absence:
    assert isinstance(reading, Missing), reading
    return reading.absence


def test_every_reading_of_a_healthy_gpu(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=2)
    driver.set(1, utilisation=83, temperature=71, power_mw=512_500, sm_mhz=1755)
    driver.set(1, memory_used=40 * GIB, throttle=0x24, ecc=(7, 1), numa_node=1)
    gpu = read(child)[1]
    assert gpu.condition is GpuCondition.OK
    assert (gpu.info.uuid, gpu.info.index, gpu.info.name) == (driver.uuid(1), 1, "NVIDIA H100 80GB HBM3")
    assert (gpu.gpu_ratio, gpu.temperature_c, gpu.power_w) == (0.83, 71, 512.5)
    assert gpu.sm_clock_mhz == 1755
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (80 * GIB, 40 * GIB + GIB // 2)
    assert gpu.memory_free_bytes == 80 * GIB - 40 * GIB - GIB // 2
    assert gpu.throttle == ("sw_power_cap", "sw_thermal")
    assert (gpu.ecc_corrected, gpu.ecc_uncorrected) == (7, 1)
    assert (gpu.info.slowdown_c, gpu.info.shutdown_c) == (87, 92)
    assert (gpu.info.compute_capability, gpu.info.numa_node) == ((9, 0), 1)
    assert child.ask("reader.driver_version") == "580.95.05"


def test_readings_follow_the_driver_while_it_runs(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=1)
    for temperature in (50, 60, 70):
        driver.set(0, temperature=temperature, utilisation=temperature)
        assert (read(child)[0].temperature_c, read(child)[0].gpu_ratio) == (temperature, temperature / 100)


def test_memory_that_wore_out(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=1)
    driver.set(0, remapped=(2, 1, 1, 0), retired_pending=1, recovery_action=4)
    info = read(child)[0].info
    assert info.row_remaps == RowRemaps(2, 1, pending=True, failed=False)
    assert info.page_retirement_pending is True
    assert info.recovery_action is RecoveryAction.DRAIN_AND_RESET
    driver.set(0, recovery_action=77, retired_pending=0)
    info = read(child)[0].info
    assert absence(info.recovery_action) is Absence.ERROR
    assert info.page_retirement_pending is False


def test_nvlinks(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=2)
    driver.links(0, [1, None, 1], inactive=[2])
    gpus = read(child)
    links = gpus[0].info.nvlinks
    assert isinstance(links, tuple)
    assert [(link.active, link.remote_uuid, link.to_switch) for link in links] == [
        (True, driver.uuid(1), False),
        (True, "", True),
        (False, driver.uuid(1), False),
    ]
    assert absence(gpus[1].info.nvlinks) is Absence.NOT_SUPPORTED


def test_mig_mode(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=2)
    driver.set(0, mig_mode=1)
    sliced, whole = read(child)
    assert sliced.info.mig_enabled is True
    assert absence(sliced.gpu_ratio) is Absence.NOT_SUPPORTED
    assert whole.info.mig_enabled is False


def test_without_any_driver_library() -> None:
    with Child(READER, {}) as child:
        assert read(child) == ()
        version = child.ask("reader.driver_version")
        assert absence(version) is Absence.NO_DRIVER
        assert "no NVIDIA driver is installed" in version.reason


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (DRIVER_NOT_LOADED, Absence.NO_DRIVER),
        (NO_PERMISSION, Absence.NO_PERMISSION),
        (UNKNOWN, Absence.ERROR),
    ],
)
def test_a_driver_that_can_not_be_initialised(
    start: Callable[..., tuple[FakeDriver, Child]], code: int, why: Absence
) -> None:
    driver, child = start(devices=2)
    driver.driver_fails(code)
    assert read(child) == ()
    assert absence(child.ask("reader.driver_version")) is why
    driver.driver_fails(0)
    assert len(read(child)) == 2


@pytest.mark.parametrize(
    ("field", "readings"),
    [
        ("memory", ("memory_total_bytes", "memory_used_bytes", "memory_free_bytes")),
        ("utilisation", ("gpu_ratio",)),
        ("temperature", ("temperature_c",)),
        ("power", ("power_w",)),
        ("clocks", ("sm_clock_mhz",)),
        ("throttle", ("throttle",)),
        ("ecc", ("ecc_corrected", "ecc_uncorrected")),
    ],
)
@pytest.mark.parametrize(
    ("code", "why"),
    [
        (NO_PERMISSION, Absence.NO_PERMISSION),
        (NOT_SUPPORTED, Absence.NOT_SUPPORTED),
        (UNKNOWN, Absence.ERROR),
    ],
)
def test_a_reading_that_is_refused_leaves_the_others(
    start: Callable[..., tuple[FakeDriver, Child]],
    field: str,
    readings: tuple[str, ...],
    code: int,
    why: Absence,
) -> None:
    driver, child = start(devices=1)
    driver.fail(0, field, code)
    gpu = read(child)[0]
    assert gpu.condition is GpuCondition.OK
    refused = {name for name in READINGS if isinstance(getattr(gpu, name), Missing)}
    assert refused == set(readings)
    assert {absence(getattr(gpu, name)) for name in readings} == {why}
    driver.fail(0, field, 0)
    assert not any(isinstance(getattr(read(child)[0], name), Missing) for name in readings)


@pytest.mark.parametrize("field", ["threshold", "remapped", "retired", "nvlink", "mig"])
def test_slow_readings_that_are_refused(start: Callable[..., tuple[FakeDriver, Child]], field: str) -> None:
    driver, child = start(devices=2)
    driver.links(0, [1])
    driver.fail(0, field, NO_PERMISSION)
    info = read(child)[0].info
    readings = {
        "threshold": info.slowdown_c,
        "remapped": info.row_remaps,
        "retired": info.page_retirement_pending,
        "nvlink": info.nvlinks,
        "mig": info.mig_enabled,
    }
    for name, reading in readings.items():
        assert isinstance(reading, Missing) is (name == field), name


@pytest.mark.parametrize(
    ("symbols", "reading"),
    [
        (("nvmlDeviceGetPowerUsage",), "power_w"),
        (("nvmlDeviceGetTotalEccErrors",), "ecc_corrected"),
        (
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
            "throttle",
        ),
    ],
)
def test_functions_that_the_driver_does_not_have(
    start: Callable[..., tuple[FakeDriver, Child]], symbols: tuple[str, ...], reading: str
) -> None:
    _, child = start(devices=1, without=symbols)
    for _ in range(2):  # the second time from memory
        gpu = read(child)[0]
        assert gpu.condition is GpuCondition.OK
        assert absence(getattr(gpu, reading)) is Absence.NO_FUNCTION
        assert gpu.temperature_c == 45


@pytest.mark.parametrize(
    ("symbol", "reading", "value"),
    [
        ("nvmlDeviceGetMemoryInfo_v2", "memory_free_bytes", 80 * GIB - GIB - GIB // 2),
        ("nvmlDeviceGetTemperature", "temperature_c", 45),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttle", ()),
    ],
)
def test_older_and_newer_names_of_a_function(
    start: Callable[..., tuple[FakeDriver, Child]], symbol: str, reading: str, value: object
) -> None:
    _, child = start(devices=1, without=(symbol,))
    assert getattr(read(child)[0], reading) == value


def test_a_gpu_falls_off_the_bus_and_returns(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=8)
    assert {gpu.condition for gpu in read(child)} == {GpuCondition.OK}
    driver.lose(3)
    gpus = read(child)
    assert [gpu.info.uuid for gpu in gpus] == [driver.uuid(index) for index in range(8)]
    assert [gpu.info.index for gpu in gpus if gpu.condition is GpuCondition.LOST] == [3]
    assert {absence(getattr(gpus[3], name)) for name in READINGS} == {Absence.GPU_LOST}
    assert gpus[3].info.name == "NVIDIA H100 80GB HBM3"
    assert not any(isinstance(gpu.info.slowdown_c, Missing) for gpu in gpus)
    driver.find(3)
    assert {gpu.condition for gpu in read(child)} == {GpuCondition.OK}


def test_a_gpu_is_lost_between_two_enumerations(tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path, devices=2)
    setup = """
from controlplane.node_agent.nvml.reader import GpuReader
clock = iter([0, 1, 2, 60])
reader = GpuReader(slow_interval_s=60, clock=clock.__next__)
"""
    with Child(setup, driver.env()) as child:
        read(child)
        driver.lose(1)
        assert [gpu.condition for gpu in read(child)] == [GpuCondition.OK, GpuCondition.LOST]
        assert [gpu.condition for gpu in read(child)] == [GpuCondition.OK, GpuCondition.LOST]
        driver.find(1)
        assert [gpu.condition for gpu in read(child)] == [GpuCondition.OK, GpuCondition.OK]


def test_a_gpu_lost_before_it_was_ever_seen(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=2)
    driver.lose(0)
    first, second = read(child)
    assert (first.info.uuid, first.info.index, first.condition) == ("", 0, GpuCondition.LOST)
    assert (second.info.uuid, second.condition) == (driver.uuid(1), GpuCondition.OK)
    driver.find(0)
    assert [gpu.info.uuid for gpu in read(child)] == [driver.uuid(0), driver.uuid(1)]


def test_a_gpu_that_the_driver_stops_listing(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=3)
    read(child)
    driver.hide(1)
    by_uuid = {gpu.info.uuid: gpu for gpu in read(child)}
    assert by_uuid[driver.uuid(1)].condition is GpuCondition.LOST
    assert by_uuid[driver.uuid(1)].detail == "the driver no longer lists it"
    assert by_uuid[driver.uuid(2)].condition is GpuCondition.OK
    assert by_uuid[driver.uuid(2)].info.index == 1


def test_a_gpu_that_needs_a_reset(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=1)
    driver.fail(0, "memory", 16)
    assert read(child)[0].condition is GpuCondition.RESET_REQUIRED


def test_a_gpu_without_identity_is_unreadable_not_lost(
    start: Callable[..., tuple[FakeDriver, Child]],
) -> None:
    driver, child = start(devices=2)
    driver.fail(0, "identity", NO_PERMISSION)
    first, second = read(child)
    assert (first.condition, absence(first.power_w)) == (GpuCondition.UNREADABLE, Absence.NO_PERMISSION)
    assert second.condition is GpuCondition.OK


def test_the_driver_goes_and_comes_back(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=2)
    read(child)
    for vanish, restore in (
        (driver.driver_gone, driver.write),
        (driver.driver_fails, lambda: driver.driver_fails(0)),
    ):
        vanish()
        gpus = read(child)
        assert [gpu.info.uuid for gpu in gpus] == [driver.uuid(0), driver.uuid(1)]
        assert {gpu.condition for gpu in gpus} == {GpuCondition.UNREADABLE}
        assert {absence(getattr(gpus[0], name)) for name in READINGS} == {Absence.NO_DRIVER}
        assert child.ask("reader.connected") is False
        restore()
        assert {gpu.condition for gpu in read(child)} == {GpuCondition.OK}


def test_an_unchanged_gpu_keeps_one_info(start: Callable[..., tuple[FakeDriver, Child]]) -> None:
    driver, child = start(devices=1)
    same = "(lambda first, second: first.info is second.info)(reader.read()[0], reader.read()[0])"
    assert child.ask(same)
    assert child.ask("reader.close()") is None
    driver.set(0, slowdown=80)
    assert read(child)[0].info.slowdown_c == 80
