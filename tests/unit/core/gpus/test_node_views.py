"""Nodes as operators see them: what is known, of when it is, and when memory or disks run out."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.alerts import rules as names
from controlplane.core.alerts.signals import node_signals
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.node_views import DiskView, node_views
from controlplane.core.telemetry.samples import DiskSample, NodeSample
from controlplane.core.telemetry.series import Freshness
from tests.support.samples import GIB, node_sample

DISKS = (DiskSample("/run/tierplane", 100 * GIB, 4 * GIB), DiskSample("/tmp", 10 * GIB, 9 * GIB))


def sample(seq: int = 1) -> NodeSample:
    return replace(node_sample("node-a", seq, 5.0), load_1m=1.5, disks=DISKS, hostname="host-a")


def test_a_node_shows_cpus_memory_disks_and_their_age() -> None:
    inventory = GpuInventory()
    inventory.observe("node-a", sample(), [], now_s=100.0)
    [view] = node_views(inventory, now_s=101.5)
    assert (view.node_id, view.hostname) == ("node-a", "host-a")
    assert (view.freshness, view.age_s) == (Freshness.FRESH, 1.5)
    assert (view.cpu_count, view.cpu_ratio, view.load_1m) == (8, 0.5, 1.5)
    assert (view.memory_total_bytes, view.memory_available_bytes) == (64 * GIB, 32 * GIB)
    assert view.memory_used_ratio == 0.5
    assert view.disks[0] == DiskView("/run/tierplane", 100 * GIB, 4 * GIB)
    assert round(view.disks[0].used_ratio, 6) == 0.96


def test_figures_that_are_too_old_are_not_shown_as_if_they_were_of_now() -> None:
    inventory = GpuInventory()
    inventory.observe("node-a", sample(), [], now_s=100.0)
    [view] = node_views(inventory, now_s=100.0 + 3600.0)
    assert (view.freshness, view.age_s) == (Freshness.MISSING, 3600.0)
    assert (view.cpu_ratio, view.load_1m, view.memory_available_bytes, view.disks) == (None, None, None, ())


def test_a_disk_without_space_counts_as_full() -> None:
    assert DiskView("/proc", 0, 0).used_ratio == 1.0


def test_the_fullest_disk_and_the_memory_are_judged_while_the_figures_are_fresh() -> None:
    inventory = GpuInventory()
    inventory.observe("node-a", sample(), [], now_s=100.0)
    found = node_signals(inventory, {}, {}, 101.0)
    assert round(found.figures[names.NODE_DISK]["node-a"].value or 0.0, 6) == 0.96
    assert found.figures[names.NODE_MEMORY]["node-a"].value == 0.5
    assert found.details[names.NODE_DISK, "node-a"] == "/run/tierplane has 4.0 GiB left"
    late = node_signals(inventory, {}, {}, 3700.0)
    assert (late.figures[names.NODE_DISK], late.figures[names.NODE_MEMORY]) == ({}, {})
