"""Access to a plane when there is none."""

from __future__ import annotations

import time

import pytest

from controlplane.errors import SetupError
from controlplane.ray_cluster import plane
from controlplane.ray_cluster.liveness import ANSWER_TIMEOUT_S
from controlplane.ray_cluster.ports import free_port


def test_a_ray_that_is_gone_is_not_waited_for() -> None:
    address, began_s = f"127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(SetupError, match=f"no Ray answers at {address}"):
        plane.connect(address)
    assert time.monotonic() - began_s < ANSWER_TIMEOUT_S
