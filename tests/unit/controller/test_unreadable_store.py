"""Values of the store that can't be read: the controller starts, uses every other value, and says what it put
aside. The values are written into the file behind the controller's back, as a flipped bit or another program
would."""

from __future__ import annotations

import copy
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from controlplane.config.alerts import AlertsConfig
from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.controller.keys import KeyRegistry
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.recorder import Recorder
from controlplane.controller.saved_state import SavedState, stored_last_events
from controlplane.controller.scaling import PlaneScaler
from controlplane.controller.store import MAX_ASIDE, MAX_ASIDE_BYTES, MAX_VALUE_BYTES, Store
from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import ScalingPlan, TierSpec
from controlplane.core.domain.request import RequestShape
from tests.support.controller import World
from tests.support.waiting import until

STORED: dict[str, Any] = json.loads(Path(__file__).with_name("stored_state.json").read_text("utf-8"))
CLUSTER = {"node-a": ["GPU-a1", "GPU-b2", "GPU-d4"], "node-b": ["GPU-c3", "GPU-e5"]}
NODES = list(CLUSTER)
NO_JSON: tuple[Any, ...] = (
    '{"reason": ',
    "",
    "nul",
    "\x00",
    "[" * 5000 + "]" * 5000,
    "9" * 5000,
    b"\xff\xfe\x80",
    sqlite3.Binary(b'{"reason": "\xff"}'),
)
OTHER_SHAPES: tuple[Any, ...] = (
    None,
    True,
    7,
    -7,
    10**400,
    1e300,
    float("nan"),
    float("inf"),
    "text",
    "",
    [],
    [[]],
    [None],
    [1, 2, 3],
    {},
    {"reason": 3},
    {"a": {"b": []}},
)


class Plane:
    """The parts of a controller that restore something, after a restart on the same cluster."""

    def __init__(self, path: Path) -> None:
        self.recorder = Recorder(path)
        self.world = World(CLUSTER, {"small": 1, "large": 1}, shift_s=1_764_499_500.0)
        controller = self.world.controller
        self.scaler = PlaneScaler(controller, ControllerScalingConfig())
        self.alerting = Alerting(
            controller,
            AlertsConfig(),
            AlertDelivery((), {}, "plane"),
            store_warning=lambda: self.recorder.warning,
            unreadable=lambda: self.recorder.unreadable,
        )
        self.nodes = NodeWatch("plane", 1.0, lambda *_: None, stored_last_events(self.recorder))
        self.saved = SavedState(
            self.recorder,
            registry=self.world.registry,
            controller=controller,
            scaler=self.scaler,
            alerting=self.alerting,
            nodes=self.nodes,
            keys=KeyRegistry(time.time, lambda *_: None),
        )
        self.saved.restore_gpus()
        self.saved.observe_nodes(NODES)

    def values(self) -> dict[str, Any]:
        """What it would store."""
        values = self.world.controller.checkpoint() | self.scaler.checkpoint() | self.alerting.checkpoint()
        again: dict[str, Any] = json.loads(json.dumps(values))
        return again

    def work(self) -> None:
        """One round of every loop, with the restored state."""
        for _ in range(9):
            self.world.controller.gateway_report(GatewayInfo("gateway", "node-a", ""))
            self.world.step()
        assert self.world.controller.may_decide
        self.scaler.tick()
        self.scaler.report()
        self.alerting.evaluate()
        self.alerting.response()
        self.saved.save()
        self.world.controller.activity()


@contextmanager
def restarted(path: Path) -> Iterator[Plane]:
    plane = Plane(path)
    try:
        yield plane
    finally:
        plane.recorder.close()


def write(path: Path, values: dict[str, Any]) -> None:
    with closing(Store(path)) as store:
        store.put(values)


def poke(path: Path, key: Any, text: Any) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, text))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "store.sqlite", STORED)
    return tmp_path / "store.sqlite"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is restored, and would be stored again, from an undamaged store."""
    path = tmp_path_factory.mktemp("whole") / "store.sqlite"
    write(path, STORED)
    with restarted(path) as plane:
        return plane.values()


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
@pytest.mark.parametrize("key", ["hold/zz", "a", "cluster", "heard", "silence/4"])
def test_a_value_that_is_no_json_is_put_aside(path: Path, whole: dict[str, Any], key: str, text: Any) -> None:
    poke(path, key, text)
    with capture_logs() as logs, restarted(path) as plane:
        expected = {name: value for name, value in whole.items() if name != key}
        assert plane.values() == expected
        assert [line["key"] for line in logs if "put aside" in line["event"]] == [key]
        [event] = [item for item in plane.world.registry.events if item.kind == "store value unreadable"]
        assert event.subject == key
        assert plane.recorder.warning == ""
        plane.work()
        alerts = {alert.rule: alert for alert in plane.alerting.response().alerts}
        assert key in alerts["TierplaneStoreUnreadable"].detail
        [(aside, _, reason, _)] = plane.recorder.store.aside()
        assert (aside, reason[:7]) == (key, "no JSON")
    with restarted(path) as plane:
        assert not [item for item in plane.world.registry.events if item.kind == "store value unreadable"]


@pytest.mark.parametrize("key", sorted(STORED))
def test_a_value_of_another_shape_loses_only_itself(path: Path, whole: dict[str, Any], key: str) -> None:
    """Every stored value in turn becomes each of the bad values; nothing fails, all others are restored."""
    for bad in OTHER_SHAPES:
        write(path, STORED | {"alert/x": None, key: None})
        poke(path, key, json.dumps(bad))
        with restarted(path) as plane:
            found = plane.values()
            others = {name: value for name, value in whole.items() if name != key}
            assert {name: found.get(name) for name in others} == others, (key, bad)
            plane.work()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from leaves(item, (*path, name))


def changed(value: Any, path: tuple[Any, ...], bad: Any) -> Any:
    copied = copy.deepcopy(value)
    inner = copied
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = bad
    return copied


@pytest.mark.parametrize(
    "key", sorted(key for key, value in STORED.items() if isinstance(value, (dict, list)))
)
def test_a_wrong_member_at_any_level_stops_nothing(path: Path, whole: dict[str, Any], key: str) -> None:
    """Every member at every level in turn becomes another type, or a number that nothing counts."""
    bads: Iterator[Any] = itertools.cycle((float("nan"), -1, None, "text", 10**400, [], {}))
    for inside, bad in zip(leaves(STORED[key]), bads, strict=False):
        write(path, STORED | {key: changed(STORED[key], inside, bad)})
        with restarted(path) as plane:
            found = plane.values()
            others = {name: value for name, value in whole.items() if name != key}
            assert {name: found.get(name) for name in others} == others, (inside, bad)
            plane.work()


def test_the_operators_silence_after_a_bad_value_still_silences(path: Path) -> None:
    poke(path, "alert/aaa", "{")
    poke(path, "heard", "[1]")
    with restarted(path) as plane:
        assert [item.number for item in plane.alerting.response().silences] == [4, 7]
        assert plane.nodes.last_events == {}


def test_the_list_of_nodes_is_unreadable_but_the_agents_name_them(path: Path, whole: dict[str, Any]) -> None:
    poke(path, "cluster", "{")
    with restarted(path) as plane:
        assert plane.values() == whole


def test_stored_targets_never_exceed_what_may_be_set(path: Path) -> None:
    write(path, {"target/small": 2**52, "override/small": {"replicas": 2**52, "reason": "a flipped bit"}})
    with restarted(path) as plane:
        rule = ScalingRule("small", EngineSpeed(1e-2, 1e-3, 1e-4), RequestShape(10, 10))
        plan = ScalingPlan(rule, autoscaled=True, ceiling=4)
        spec = TierSpec("small", "m", "simulated", 1, 10, scaling=plan)
        plane.world.controller.declare([spec], 2.0)
        assert plane.world.controller.base_targets() == {"small": 4}


def test_a_part_that_fails_keeps_no_other_from_being_restored(
    path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault in restoring")

    monkeypatch.setattr(PlaneScaler, "restore", fail)
    with restarted(path) as plane:
        silences = {key for key in whole if key.startswith("silence/")}
        assert silences <= plane.values().keys()
        assert "not restored" in plane.world.kinds("controller")


def test_values_aside_are_bounded_in_number_and_length(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Store(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        rows = [(f"key/{number:05}", "{" + "x" * 2 * MAX_ASIDE_BYTES) for number in range(MAX_ASIDE + 50)]
        database.executemany("INSERT INTO state VALUES (?, ?)", rows)
        database.execute("INSERT INTO state VALUES ('key/long', ?)", ("1" * (MAX_VALUE_BYTES + 1),))
        database.execute("INSERT INTO state VALUES ('good', '1')")
    with closing(Store(path)) as store:
        assert store.values() == {"good": 1}
        aside = store.aside()
        assert len(aside) == MAX_ASIDE
        assert max(len(value) for *_, value in aside) == MAX_ASIDE_BYTES
        assert "more than" in aside[-1][2]


def test_keys_that_are_no_text_are_put_aside(path: Path) -> None:
    poke(path, b"\xff\xfe", "1")
    poke(path, b"blob", "1")
    with closing(Store(path)) as store:
        assert list(store.take_unreadable()) == ["\ufffd\ufffd"]
        assert store.values()["blob"] == 1
        store.put({"blob": None})
    with closing(Store(path)) as store:
        assert store.take_unreadable() == {}


def test_audit_rows_of_other_types_are_shown_and_hide_no_other(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        rows = [
            (1, "never", b"\xff", 7, "a", "b", "c"),
            (2, 2.0, "operator", "drain", "small", b"\xff\x00", ""),
            (2**60, 3.0, "x", "x", "x", "x", "x"),
        ]
        database.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    with closing(Store(path)) as store:
        first, second = store.audit_since(0)
        assert (first.number, first.unix_s, first.kind) == (1, 0.0, "7")
        assert second.kind == "drain"
        assert store.last_number == 2
        assert store.warning == ""


def test_a_lock_at_the_start_is_tried_again_and_an_operators_orders_come_back(path: Path) -> None:
    """Another process has the file at the start; orders that it holds are restored once it can be read."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        plane = Plane(path)
        try:
            assert "locked" in plane.recorder.warning
            plane.work()
            assert "TierplaneStoreUnsafe" in {alert.rule for alert in plane.alerting.response().alerts}
            other.execute("ROLLBACK")
            until(lambda: not plane.recorder.warning, 15)
            plane.saved.save()
            assert plane.world.controller.tier_holds["large"].must_leave
            assert [item.number for item in plane.alerting.response().silences] == [4, 7]
        finally:
            plane.recorder.close()
    with closing(Store(path)) as store:
        found = store.values()
    assert found["cluster"] == NODES
    assert {"hold/large", "silence/4"} <= found.keys()
    assert "lease/small-a" not in found, "what was decided anew is not restored"


def test_another_controllers_lock_is_waited_for(path: Path) -> None:
    first = Recorder(path)
    second = Recorder(path)
    try:
        assert "another controller writes this store" in second.warning
        second.save({"mine": 1})
        first.close()
        until(lambda: not second.warning, 15)
        until(lambda: second.store.values().get("mine") == 1, 5)
    finally:
        second.close()
    with closing(Store(path)) as store:
        assert store.values()["mine"] == 1
