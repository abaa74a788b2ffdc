"""The store's format: state that an earlier version wrote is restored, and is written again unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.config.alerts import AlertsConfig
from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.controller.scaling import PlaneScaler
from controlplane.controller.state import checkpoint
from controlplane.core.alerts import checkpoint as alerts_checkpoint
from controlplane.core.alerts.alert import AlertState
from controlplane.core.alerts.table import AlertTable
from controlplane.core.gpus.health import GpuState
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.json_values import StoredState
from controlplane.core.recommendations.rules import Breach, Figure, RecommendationKind
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.migrations import MigrationPhase
from tests.support.controller import World

STORED: dict[str, Any] = json.loads(Path(__file__).with_name("stored_state.json").read_text("utf-8"))
"""Written by version 0.1, before msgspec read the store."""
SHIFT_S = 1_764_500_000.0
OTHER_KEYS = {"cluster", "heard"}
"""Keys that the actor reads itself."""


class Restored:
    """The parts of a controller after a restart."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.stored = StoredState(values)
        self.inventory, self.leases, self.in_progress = GpuInventory(), LeaseTable(), InProgress()
        self.controller = World({}, {}, shift_s=SHIFT_S).controller
        self.scaler = PlaneScaler(self.controller, ControllerScalingConfig())
        self.alerting = Alerting(self.controller, AlertsConfig(), AlertDelivery((), {}, "plane"))
        checkpoint.restore_gpus(self.stored, self.inventory, SHIFT_S)
        checkpoint.restore_plane(
            *(self.stored, self.inventory, self.leases, self.in_progress), now_s=1000.0, shift_s=SHIFT_S
        )
        self.scaler.restore(self.stored)
        self.alerting.restore(self.stored)

    def values(self) -> dict[str, Any]:
        writer = checkpoint.CheckpointWriter(SHIFT_S)
        values = writer.values(self.inventory, self.leases, self.in_progress)
        values |= self.scaler.checkpoint() | self.alerting.checkpoint()
        again: dict[str, Any] = json.loads(json.dumps(values))
        for key, value in again.items():
            if key.startswith("advice/"):
                assert value.pop("ended") == "", "a later version's field, with its default"
        return again


def test_what_an_earlier_version_stored_is_restored_and_written_the_same() -> None:
    restored = Restored(STORED)
    assert restored.stored.damaged == {}
    assert restored.values() == {key: value for key, value in STORED.items() if key not in OTHER_KEYS}


def test_restored_values_have_their_types_and_the_process_clock() -> None:
    restored = Restored(STORED)
    work, leases = restored.in_progress, restored.leases.leases
    migration = work.migrations["small-a"]
    assert migration.phase is MigrationPhase.STARTING_ELSEWHERE
    assert (migration.since_s, migration.began_s) == (200.5, 190.25)
    assert work.hold_history == {"small": (2, 220.0)}
    assert [failure.at_s for failure in work.failures["small"]] == [215.0, 218.5]
    assert work.stall_restarts == {"small-d": (205.0, 209.5)}
    assert work.holds["small"].until_s == 520.0
    assert work.holds["large"].until_s is None
    assert [part.milli for part in leases["small-a"].parts] == [500, 1000]
    assert leases["small-a"].renewed_s == 1000.0
    gpus, _ = restored.inventory.state_to_store()
    health, must_leave = gpus["GPU-a1"]
    assert (health.state, must_leave) == (GpuState.CORDONED, True)
    assert (health.since_s, health.cordons_s) == (120.5, (60.25, 120.5))
    log = restored.scaler.recommendations
    assert [item.number for item in log.open] == [3]
    [recommendation] = [item.recommendation for item in log.open]
    assert recommendation.kind is RecommendationKind.SCALE_OUT
    assert recommendation.named == (Breach(Figure.LOAD, 0.95), Breach(Figure.QUEUE, 50.0))
    assert restored.controller.published["small"].replicas == 3
    table = AlertTable()
    alerts_checkpoint.restore(restored.stored, table, SHIFT_S, 1000.0, 86_400.0)
    down, missed = table.alerts
    assert (down.state, down.since_s, down.notified_s) == (AlertState.FIRING, 230.0, 230.0)
    assert (missed.since_s, missed.notified_s) == (231.0, None)
    assert [silence.until_s for silence in table.silences] == [900.0, 800.0]


@pytest.mark.parametrize("key", sorted(STORED.keys() - OTHER_KEYS - {"gpus counted"}))
def test_a_damaged_entry_loses_only_itself(key: str) -> None:
    restored = Restored(STORED | {key: {"damaged": True}})
    assert list(restored.stored.damaged) == [key]
    expected = {name: value for name, value in STORED.items() if name not in {*OTHER_KEYS, key}}
    assert restored.values() == expected
