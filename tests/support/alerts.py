"""An alert to show or to deliver."""

from __future__ import annotations

from controlplane.core.alerts.alert import AlertState, Severity, SubjectType
from controlplane.core.alerts.views import AlertView

TIER_DOWN = AlertView(
    rule="TierplaneTierDown",
    state=AlertState.FIRING,
    severity=Severity.CRITICAL,
    kind=SubjectType.TIER,
    subject="small",
    summary="Tier small has no ready endpoint.",
    action="tierplane status says why.",
    detail="small-1 is failed",
    value=0.0,
    threshold=1.0,
    since_unix_s=1000.0,
)
