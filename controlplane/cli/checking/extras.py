"""``python -m controlplane.cli.checking.extras CONFIG``: the packages that a configuration's engines need.

Prints the names of lock files for `make up`: cpu or gpu (vLLM), llamacpp.
"""

from __future__ import annotations

import sys

from controlplane.config import PlaneConfig, load_plane
from controlplane.errors import ConfigError


def extras(plane: PlaneConfig) -> list[str]:
    """The extras of tierplane's distribution that the engines of ``plane`` need.

    The CPU and GPU builds of vLLM exclude each other; the GPU build also runs tiers on the CPU.
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
