"""The controller's actions in progress, as ``tierplane status`` shows them below its tables."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from controlplane.core.reconcile.migrations import Activity


def activity_lines(activity: Activity) -> list[Text]:
    """One line for each action in progress; empty if there are none."""
    lines = []
    if activity.store_warning:
        lines.append(Text(f"the controller's store: {activity.store_warning}", style="bold red"))
    if not activity.settled:
        text = "the controller has just started and waits for reports from replicas and gateways"
        lines.append(Text(text, style="yellow"))
    lines += [
        Text(f"{move.endpoint_id} moves ({move.phase}): {move.reason}; {move.note}", style="yellow")
        for move in activity.migrations
    ]
    moving = {move.endpoint_id for move in activity.migrations}
    lines += [
        Text(f"{endpoint_id} is being drained: {reason}", style="yellow")
        for endpoint_id, reason in activity.drains
        if endpoint_id not in moving
    ]
    for restart in activity.restarts:
        state = "restarts" if restart.issued else "waits for its restart"
        lines.append(Text(f"{restart.endpoint_id} {state}: {restart.reason}", style="yellow"))
    return lines


def activity_json(activity: Activity) -> dict[str, Any]:
    """The same as JSON."""
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
