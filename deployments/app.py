"""The application builder that Serve imports: ``args`` of a Serve config file → one Serve application.

applications:
  - name: tierplane
    route_prefix: /
    import_path: deployments.app:build
    args: {tiers: […], gateway: {…}, controller: {…}}
"""

from __future__ import annotations

from typing import Any

from ray import serve

from controlplane.config import parse_plane
from deployments.gateway import gateway_application
from deployments.tier import tier_application


def build(args: dict[str, Any]) -> serve.Application:
    """The gateway, and a deployment for each tier. Raises ConfigError with every problem of ``args``."""
    config = parse_plane(args)
    tiers = [tier_application(config, tier) for tier in config.tiers]
    return gateway_application(config, *tiers)
