"""What operators can do: take a GPU, a node or a tier out of use, empty it, return it, restart engines.

Every action may be repeated; if it has no effect, the response is UNCHANGED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from controlplane.controller.registry import Registry
from controlplane.core.domain.endpoint import ENDED, Endpoint
from controlplane.core.domain.resource_name import ResourceKind, ResourceName, find_resource
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.migrations import OPERATOR

NO_REASON = "no reason given"


class OperatorActions:
    """Part of the controller, which owns the state that these actions change; the reconciler does the
    rest."""

    def __init__(
        self,
        registry: Registry,
        inventory: GpuInventory,
        leases: LeaseTable,
        in_progress: InProgress,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._inventory = inventory
        self._leases = leases
        self._in_progress = in_progress
        self._now_s = now_s

    def cordon(self, name: str, reason: str) -> ActionResponse:
        """Start nothing new on a GPU, on a node or in a tier; what runs there goes on."""
        return self._out_of_use(name, reason, must_leave=False)

    def drain(self, name: str, reason: str) -> ActionResponse:
        """Start nothing new, and make what runs leave: it starts elsewhere first if there is room. A drained
        tier has no replicas until it is uncordoned; a drained endpoint is replaced by another one."""
        return self._out_of_use(name, reason, must_leave=True)

    def uncordon(self, name: str, reason: str = "") -> ActionResponse:
        """Use a GPU, a node or a tier again, or let a draining endpoint stay."""
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        inventory, reason = self._inventory, reason or NO_REASON
        match subject.kind:
            case ResourceKind.GPU:
                unusable = inventory.unusable_reason(subject.id, self._now_s())
                if unusable:
                    return _refused(subject, f"{unusable}: it would be taken out of use again at once")
                changed = inventory.uncordon_gpu(subject.id, reason, now_s=self._now_s())
                node_id = inventory.records[subject.id].node_id
                if not changed and node_id in inventory.holds:
                    return _refused(subject, f"its node is out of use: uncordon {node_id}")
            case ResourceKind.NODE:
                changed = inventory.uncordon_node(subject.id)
            case ResourceKind.TIER:
                changed = self._in_progress.release(subject.id)
            case ResourceKind.ENDPOINT:
                if self._in_progress.drains.pop(subject.id, None) is None:
                    return ActionResponse(ActionOutcome.UNCHANGED, f"{subject} is not drained", (subject.id,))
                changed = True
        return self._response(subject, "uncordon", reason, changed, "it was in use")

    def restart(self, name: str, reason: str) -> ActionResponse:
        """Replace the engine processes of an endpoint, a tier, a GPU or a node; those of a tier one after the
        other. A tier that is held because its replicas crashed is started again."""
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        registry, in_progress, reason = self._registry, self._in_progress, reason or NO_REASON
        released = False
        if subject.kind is ResourceKind.TIER:
            hold = in_progress.holds.get(subject.id)
            if hold is not None and hold.by == OPERATOR:
                return _refused(subject, f"it is out of use ({hold.reason}): uncordon it first")
            released = in_progress.release(subject.id)
        concerned = [item for item in self._endpoints_of(subject) if item.engine != "endpoint"]
        restarting = [
            endpoint
            for endpoint in concerned
            if endpoint.state not in ENDED or subject.kind is ResourceKind.ENDPOINT
            if endpoint.endpoint_id not in in_progress.migrations
            if in_progress.request_restart(endpoint, reason, self._now_s())
        ]
        for endpoint in restarting:
            registry.note("restart asked", endpoint.endpoint_id, reason, endpoint.tier, actor=OPERATOR)
        if released:
            registry.note("released", subject.id, reason, subject.id, actor=OPERATOR)
        if restarting or released:
            text = f"{len(restarting)} engine{'s' * (len(restarting) != 1)} will restart"
            ids = tuple(endpoint.endpoint_id for endpoint in restarting)
            return ActionResponse(ActionOutcome.DONE, text, ids or (subject.id,))
        if not concerned:
            return _refused(subject, "no engine runs there")
        return ActionResponse(ActionOutcome.UNCHANGED, "requested before, or leaving", (subject.id,))

    def _out_of_use(self, name: str, reason: str, *, must_leave: bool) -> ActionResponse:
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        reason, now_s = reason or NO_REASON, self._now_s()
        match subject.kind:
            case ResourceKind.GPU:
                changed = self._inventory.cordon_gpu(subject.id, reason, must_leave=must_leave, now_s=now_s)
            case ResourceKind.NODE:
                changed = self._inventory.cordon_node(subject.id, reason, must_leave=must_leave)
            case ResourceKind.TIER:
                changed = self._in_progress.hold(subject.id, reason, now_s, must_leave=must_leave)
            case ResourceKind.ENDPOINT:
                if not must_leave:
                    return _refused(subject, "an endpoint can't be cordoned: drain or restart it")
                endpoint = self._registry.endpoints[subject.id]
                if endpoint.state in ENDED:
                    return ActionResponse(ActionOutcome.UNCHANGED, f"it is {endpoint.state}", (subject.id,))
                changed = self._in_progress.request_drain(subject.id, reason)
        return self._response(
            subject, "drain" if must_leave else "cordon", reason, changed, "it was so already"
        )

    def _response(
        self, subject: ResourceName, word: str, reason: str, changed: bool, already: str
    ) -> ActionResponse:
        if not changed:
            return ActionResponse(ActionOutcome.UNCHANGED, already, (subject.id,))
        tier = subject.id if subject.kind is ResourceKind.TIER else ""
        if subject.kind is ResourceKind.ENDPOINT:
            tier = self._registry.endpoints[subject.id].tier
        self._registry.note(word, subject.id, reason, tier, actor=OPERATOR)
        left = [item.endpoint_id for item in self._endpoints_of(subject)]
        effect = {"drain": "to leave", "cordon": "goes on"}.get(word)
        runs = f"; {', '.join(left)} {effect}" if left and effect else ""
        return ActionResponse(ActionOutcome.DONE, f"{subject}: {word}ed{runs}", (subject.id,))

    def _find(self, name: str) -> ResourceName | str:
        endpoints = self._registry.endpoints
        nodes = {*self._inventory.nodes, *self._inventory.holds}
        nodes |= {endpoint.node_id for endpoint in endpoints.values()}
        tiers = {spec.name for spec in self._registry.tiers} | {item.tier for item in endpoints.values()}
        return find_resource(
            name,
            gpus=self._inventory.records.keys(),
            nodes=nodes - {""},
            tiers=tiers,
            endpoints=endpoints.keys(),
        )

    def _endpoints_of(self, subject: ResourceName) -> Iterable[Endpoint]:
        for endpoint in self._registry.endpoints.values():
            match subject.kind:
                case ResourceKind.GPU:
                    lease = self._leases.leases.get(endpoint.endpoint_id)
                    concerned = lease is not None and subject.id in lease.gpu_uuids
                case ResourceKind.NODE:
                    concerned = endpoint.node_id == subject.id
                case ResourceKind.TIER:
                    concerned = endpoint.tier == subject.id
                case ResourceKind.ENDPOINT:
                    concerned = endpoint.endpoint_id == subject.id
            if concerned:
                yield endpoint


def _refused(subject: ResourceName, why: str) -> ActionResponse:
    return ActionResponse(ActionOutcome.REFUSED, f"{subject}: {why}", (subject.id,))
