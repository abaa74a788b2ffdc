"""What the controller is at, below the tables of ``tierplane status``."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from controlplane.core.reconcile.migrations import Activity


def activity_lines(activity: Activity) -> list[Text]:
    """One line for each thing that is under way or held; none if all is at rest."""
    lines = []
    if activity.store_warning:
        lines.append(Text(f"the controller's memory: {activity.store_warning}", style="bold red"))
    if not activity.settled:
        lines.append(
            Text("the controller has just started and waits for everybody to report", style="yellow")
        )
    lines += [
        Text(f"tier {tier} is {'drained' if hold.must_leave else 'held'}: {hold.reason}", style="red")
        for tier, hold in activity.holds
    ]
    lines += [
        Text(f"{move.endpoint_id} moves ({move.phase}): {move.reason}; {move.note}", style="yellow")
        for move in activity.migrations
    ]
    moving = {move.endpoint_id for move in activity.migrations}
    lines += [
        Text(f"{endpoint_id} is to leave: {reason}", style="yellow")
        for endpoint_id, reason in activity.drains
        if endpoint_id not in moving
    ]
    for restart in activity.restarts:
        word = "restarts" if restart.issued else "waits for its restart"
        lines.append(Text(f"{restart.endpoint_id} {word}: {restart.reason}", style="yellow"))
    return lines


def activity_json(activity: Activity) -> dict[str, Any]:
    """The same for programs."""
    return {
        "settled": activity.settled,
        "store_warning": activity.store_warning,
        "tick_s": activity.tick_s,
        "moves": [
            {
                "endpoint_id": move.endpoint_id,
                "tier": move.tier,
                "phase": move.phase.value,
                "reason": move.reason,
                "note": move.note,
            }
            for move in activity.migrations
        ],
        "restarts": [
            {"endpoint_id": item.endpoint_id, "tier": item.tier, "issued": item.issued, "reason": item.reason}
            for item in activity.restarts
        ],
        "drains": dict(activity.drains),
        "holds": {
            tier: {"reason": hold.reason, "by": hold.by, "must_leave": hold.must_leave}
            for tier, hold in activity.holds
        },
    }
