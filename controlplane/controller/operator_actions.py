"""What operators ask for: take a GPU, a node or a tier out of use, empty it, let it return, restart engines.

Every wish may be repeated: what is so already is answered as such and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.controller.controller import Controller
from controlplane.core.domain.endpoint import ENDED, Endpoint
from controlplane.core.domain.resource_name import ResourceKind, ResourceName, find_resource
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.reconcile.migrations import OPERATOR


class OperatorActions:
    """Operators' wishes, carried out on the controller's state; the reconciler does the rest."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def cordon(self, name: str, reason: str) -> ActionResponse:
        """Nothing new comes to the GPU, the node or the tier; what runs goes on."""
        return self._out_of_use(name, reason, must_leave=False)

    def drain(self, name: str, reason: str) -> ActionResponse:
        """Nothing new comes, and what runs leaves: elsewhere first if there is room. A tier that is drained
        has no replicas until it is uncordoned; an endpoint that is drained is replaced by another one."""
        return self._out_of_use(name, reason, must_leave=True)

    def uncordon(self, name: str, reason: str = "") -> ActionResponse:
        """The GPU, the node or the tier is in use again."""
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        controller, reason = self._controller, reason or "an operator says so"
        match subject.kind:
            case ResourceKind.GPU:
                gone = controller.fleet.unusable_reason(subject.id, controller.now_s())
                if gone:
                    return _refused(subject, f"{gone}: it would be taken out of use again at once")
                changed = controller.fleet.uncordon_gpu(subject.id, reason, now_s=controller.now_s())
                node_id = controller.fleet.records[subject.id].node_id
                if not changed and node_id in controller.fleet.holds:
                    return _refused(subject, f"its node is out of use: uncordon {node_id}")
            case ResourceKind.NODE:
                changed = controller.fleet.uncordon_node(subject.id)
            case ResourceKind.TIER:
                changed = controller.work.release(subject.id)
            case ResourceKind.ENDPOINT:
                if controller.work.drains.pop(subject.id, None) is None:
                    return ActionResponse(ActionOutcome.UNCHANGED, f"{subject} is not drained", (subject.id,))
                changed = True
        return self._answer(subject, "uncordon", reason, changed, "it was in use")

    def restart(self, name: str, reason: str) -> ActionResponse:
        """Replace the engine processes of an endpoint, a tier, a GPU or a node: those of a tier one after the
        other. A tier that is held for its crashes is tried again."""
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        controller, reason = self._controller, reason or "an operator says so"
        released = False
        if subject.kind is ResourceKind.TIER:
            hold = controller.work.holds.get(subject.id)
            if hold is not None and hold.by == OPERATOR:
                return _refused(subject, f"it is out of use ({hold.reason}): uncordon it first")
            released = controller.work.release(subject.id)
        concerned = [item for item in self._endpoints_of(subject) if item.engine != "endpoint"]
        asked = [
            endpoint.endpoint_id
            for endpoint in concerned
            if endpoint.state not in ENDED or subject.kind is ResourceKind.ENDPOINT
            if endpoint.endpoint_id not in controller.work.migrations
            if controller.work.request_restart(endpoint, reason, controller.now_s())
        ]
        for endpoint_id in asked:
            tier = controller.registry.endpoints[endpoint_id].tier
            controller.registry.note("restart asked", endpoint_id, reason, tier, actor=OPERATOR)
        if released:
            controller.registry.note("released", subject.id, reason, subject.id, actor=OPERATOR)
        if asked or released:
            text = f"{len(asked)} engine{'s' * (len(asked) != 1)} will restart"
            return ActionResponse(ActionOutcome.DONE, text, tuple(asked) or (subject.id,))
        if not concerned:
            return _refused(subject, "no engine runs there")
        return ActionResponse(ActionOutcome.UNCHANGED, "asked for already, or leaving", (subject.id,))

    def _out_of_use(self, name: str, reason: str, *, must_leave: bool) -> ActionResponse:
        subject = self._find(name)
        if isinstance(subject, str):
            return ActionResponse(ActionOutcome.UNKNOWN, subject)
        controller, reason = self._controller, reason or "an operator says so"
        now_s = controller.now_s()
        match subject.kind:
            case ResourceKind.GPU:
                changed = controller.fleet.cordon_gpu(subject.id, reason, must_leave=must_leave, now_s=now_s)
            case ResourceKind.NODE:
                changed = controller.fleet.cordon_node(subject.id, reason, must_leave=must_leave)
            case ResourceKind.TIER:
                changed = controller.work.hold(subject.id, reason, now_s, must_leave=must_leave)
            case ResourceKind.ENDPOINT:
                if not must_leave:
                    return _refused(subject, "an endpoint can't be cordoned: drain or restart it")
                endpoint = controller.registry.endpoints[subject.id]
                if endpoint.state in ENDED:
                    return ActionResponse(ActionOutcome.UNCHANGED, f"it is {endpoint.state}", (subject.id,))
                changed = controller.work.request_drain(subject.id, reason)
        return self._answer(
            subject, "drain" if must_leave else "cordon", reason, changed, "it was so already"
        )

    def _answer(
        self, subject: ResourceName, word: str, reason: str, changed: bool, already: str
    ) -> ActionResponse:
        if not changed:
            return ActionResponse(ActionOutcome.UNCHANGED, already, (subject.id,))
        tier = subject.id if subject.kind is ResourceKind.TIER else ""
        if subject.kind is ResourceKind.ENDPOINT:
            tier = self._controller.registry.endpoints[subject.id].tier
        self._controller.registry.note(word, subject.id, reason, tier, actor=OPERATOR)
        left = [item.endpoint_id for item in self._endpoints_of(subject)]
        goes = {"drain": "to leave", "cordon": "goes on"}.get(word)
        runs = f"; {', '.join(left)} {goes}" if left and goes else ""
        return ActionResponse(ActionOutcome.DONE, f"{subject}: {word}ed{runs}", (subject.id,))

    def _find(self, name: str) -> ResourceName | str:
        controller = self._controller
        endpoints = controller.registry.endpoints
        nodes = {*controller.fleet.nodes, *controller.fleet.holds} | {
            item.node_id for item in endpoints.values()
        }
        return find_resource(
            name,
            gpus=controller.fleet.records.keys(),
            nodes=nodes - {""},
            tiers={spec.name for spec in controller.registry.tiers}
            | {item.tier for item in endpoints.values()},
            endpoints=endpoints.keys(),
        )

    def _endpoints_of(self, subject: ResourceName) -> Iterable[Endpoint]:
        controller = self._controller
        for endpoint in controller.registry.endpoints.values():
            lease = controller.desk.table.leases.get(endpoint.endpoint_id)
            match subject.kind:
                case ResourceKind.GPU:
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
