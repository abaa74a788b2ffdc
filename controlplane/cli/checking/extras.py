"""``python -m controlplane.cli.checking.extras CONFIG``: which parts of the environment a configuration
needs.

Prints the names of lock files for `make up`: cpu or gpu (vLLM), llamacpp.
"""

from __future__ import annotations

import sys

from controlplane.config import PlaneConfig, load_plane
from controlplane.errors import ConfigError


def extras(plane: PlaneConfig) -> list[str]:
    """The extras of the distribution that the engines of ``plane`` need.

    Tiers on GPU and on CPU need two builds of vLLM that exclude each other; the GPU's can do both.
    """
    devices = {tier.device for tier in plane.tiers if tier.engine == "vllm"}
    found = ["gpu" if "gpu" in devices else "cpu"] if devices else []
    if any(tier.engine == "llamacpp" for tier in plane.tiers):
        found.append("llamacpp")
    return found


if __name__ == "__main__":
    try:
        print(*extras(load_plane(sys.argv[1]).plane))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
