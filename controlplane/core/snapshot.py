"""How a gateway takes a snapshot in: what replaces what it knew, and what only adds to it.

A controller that has just started knows nothing until replicas and gateways register again. Its snapshots
say ``warming`` for that time, and a gateway keeps what it knew beside them, so that a controller's restart
is not felt on any request's path.
"""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.domain import ClusterSnapshot


def is_newer(old: ClusterSnapshot, new: ClusterSnapshot) -> bool:
    """Whether ``new`` says something that ``old`` does not: another epoch, or a later version of the same."""
    return new.epoch != old.epoch or new.version > old.version


def merge(old: ClusterSnapshot | None, new: ClusterSnapshot) -> ClusterSnapshot:
    """What to go by after ``new`` arrived.

    * a snapshot that is not newer changes nothing;
    * while ``new`` is warming, endpoints that it does not name are kept from ``old``, except those that it
      knows to be gone, and so are alerts and the replicas due until it names some;
    * otherwise ``new`` is the truth.
    """
    if old is None:
        return new
    if not is_newer(old, new):
        return old
    if not new.warming:
        return new
    settled = {endpoint.endpoint_id for endpoint in new.endpoints} | set(new.gone)
    kept = tuple(endpoint for endpoint in old.endpoints if endpoint.endpoint_id not in settled)
    return replace(
        new,
        endpoints=new.endpoints + kept,
        alerts=new.alerts or old.alerts,
        due=new.due or old.due,
    )
