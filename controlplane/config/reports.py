"""Settings of reports: how often the plane is sampled, and how many samples stay in memory."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from controlplane.config.strict import Strict


class ReportsConfig(Strict):
    """Samples of every tier and endpoint, and the report in the log."""

    interval_s: Annotated[float, Field(ge=1, le=600)] = 10.0
    """How often every tier and endpoint is sampled."""
    samples: Annotated[int, Field(ge=10, le=100_000)] = 1000
    """Samples per tier and endpoint that stay in memory; older ones are in the store for 30 days."""
    log_interval_s: Annotated[float, Field(ge=60, le=2_592_000)] = 3600.0
    """How often a report of every tier is written to the log; each covers the time since the last one."""
