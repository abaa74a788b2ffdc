"""What `tierplane status` says of the controller's own doings."""

from __future__ import annotations

import json

from controlplane.cli.lifecycle.activity import activity_json, activity_lines
from controlplane.core.reconcile.migrations import Activity, Migration, MigrationPhase, Restart, TierHold

REST = Activity((), (), (), (), settled=True, store_warning="", tick_s=0.001)


def test_without_actions_in_progress_nothing_is_shown() -> None:
    assert activity_lines(REST) == []


def test_actions_in_progress_are_shown_with_their_reasons() -> None:
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
        "the controller's store: disk full",
        "the controller has just started and waits for reports from replicas and gateways",
        "small-a moves (retiring): XID 79; enough other replicas serve",
        "small-c is being drained: looks odd",
        "small-b waits for its restart: asked to",
    ]
    output = json.loads(json.dumps(activity_json(busy)))
    assert output["moves"][0]["phase"] == "retiring"
    assert output["holds"]["big"]["by"] == "controller"
    assert output["store_warning"] == "disk full"
