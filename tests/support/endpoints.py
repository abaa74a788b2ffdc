"""Endpoints as replicas report them."""

from __future__ import annotations

from typing import Any

from controlplane.core.domain.endpoint import Endpoint, EndpointState


def make_endpoint(
    endpoint_id: str = "balanced-1", state: EndpointState = EndpointState.READY, **fields: Any
) -> Endpoint:
    """One of the tier ``balanced`` that takes 10 requests at once, but for ``fields``."""
    usual: dict[str, Any] = {
        "tier": "balanced",
        "model": "m",
        "engine": "simulated",
        "base_url": "http://127.0.0.1:1",
        "concurrency_limit": 10,
    }
    return Endpoint(endpoint_id=endpoint_id, state=state, **{**usual, **fields})
