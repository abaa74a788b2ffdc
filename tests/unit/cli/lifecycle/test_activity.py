"""What `tierplane status` says of the controller's own doings."""

from __future__ import annotations

import json

from controlplane.cli.lifecycle.activity import activity_json, activity_lines
from controlplane.core.reconcile.migrations import Activity, Migration, MigrationPhase, Restart, TierHold

REST = Activity((), (), (), (), settled=True, store_warning="", tick_s=0.001)


def test_at_rest_there_is_nothing_to_say() -> None:
    assert activity_lines(REST) == []


def test_everything_under_way_is_said_with_its_reason() -> None:
    move = Migration(
        "small-a", "small", MigrationPhase.RETIRING, "XID 79", 1.0, 0.0, note="enough other replicas serve"
    )
    busy = Activity(
        (move,),
        (Restart("small-b", "small", 2, "asked to", 0.0),),
        (("big", TierHold("3 replicas failed", 0.0, "controller", 60.0)),),
        (("small-a", "looks odd"), ("small-c", "looks odd")),
        settled=False,
        store_warning="disk full",
        tick_s=0.001,
    )
    text = "\n".join(line.plain for line in activity_lines(busy))
    assert text.splitlines() == [
        "the controller's memory: disk full",
        "the controller has just started and waits for everybody to report",
        "tier big is held: 3 replicas failed",
        "small-a moves (retiring): XID 79; enough other replicas serve",
        "small-c is to leave: looks odd",
        "small-b waits for its restart: asked to",
    ]
    said = json.loads(json.dumps(activity_json(busy)))
    assert said["moves"][0]["phase"] == "retiring"
    assert said["holds"]["big"]["by"] == "controller"
    assert said["store_warning"] == "disk full"
