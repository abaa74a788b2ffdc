"""A configuration file, as `tierplane up` and `serve run` take it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_config(folder: Path, args: Mapping[str, Any], *, name: str = "tierplane", **serve: Any) -> Path:
    """``plane.yaml`` in ``folder``: one application, whose ``args`` are tiers, gateway and controller.

    ``serve`` is the part for Serve itself, such as ``http_options``.
    """
    application = {
        "name": name,
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": dict(args),
    }
    path = folder / "plane.yaml"
    path.write_text(yaml.safe_dump({**serve, "applications": [application]}, sort_keys=False))
    return path
