"""Every alert rule, once: for the controller, and for Prometheus.

The controller judges a rule by its figure (:mod:`controlplane.core.alerts.signals`);
:mod:`controlplane.monitoring.rules` adds the same figure in PromQL and takes everything else from here. A
configuration may change some of it for the controller (``controller.alerts.rules``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from controlplane.core.alerts.book import AlertRule, EvaluatedBy, Precondition, Severity, SubjectType, Unit

_CRITICAL, _WARNING, _INFO = Severity.CRITICAL, Severity.WARNING, Severity.INFO

TIER_READY: Final = "tier/ready"
TIER_DUE: Final = "tier/due"
TIER_MISSING: Final = "tier/missing_replicas"
TIER_HELD: Final = "tier/held"
TIER_SATURATION: Final = "tier/saturation_ratio"
TIER_SLO_BURN: Final = "tier/slo_burn"
QUEUE_WAITING: Final = "queue/waiting"
GPU_BUSY: Final = "gpu/utilisation_ratio"
GPU_MEMORY: Final = "gpu/memory_ratio"
GPU_TEMPERATURE: Final = "gpu/temperature_c"
GPU_OUT_OF_USE: Final = "gpu/out_of_use"
NODE_LOST: Final = "node/lost"
NODE_SILENT: Final = "node/silent_s"
STORE_UNSAFE: Final = "plane/store_unsafe"
"""Figures that the controller works out here; those of a tier's traffic are named by
:func:`controlplane.core.traffic.counters.named`."""

RULES: Final = (
    AlertRule(
        "TierplaneTierDown", _CRITICAL, 1,
        "Tier {subject} has no ready endpoint.",
        below=True, for_s=120, fixed=True, figure=TIER_READY, given=Precondition(TIER_DUE, 0),
        action="tierplane status says why; its neighbour bridges it as far as bridge allows.",
    ),
    AlertRule(
        "TierplaneReplicasMissing", _WARNING, 0,
        "Tier {subject} has had fewer ready endpoints than it is to have for {lasts}.",
        for_s=900, fixed=True, figure=TIER_MISSING,
        action="tierplane status, and tierplane plan: is there room for them?",
    ),
    AlertRule(
        "TierplaneTierHeld", _WARNING, 0,
        "Replicas of tier {subject} gave up again and again; it is held.",
        for_s=0, fixed=True, figure=TIER_HELD, judge=EvaluatedBy.PROGRAM,
        action="Mend what the diagnosis names, then tierplane restart of the tier.",
    ),
    AlertRule(
        "TierplaneGatewayUnreachable", _CRITICAL, 1,
        "The gateway at {subject} does not answer Prometheus.",
        below=True, for_s=60, fixed=True, figure="gateway/up", kind=SubjectType.GATEWAY,
        judge=EvaluatedBy.PROMETHEUS,
        action="tierplane logs gateway; is its node there?",
    ),
    AlertRule(
        "TierplaneGatewayMissing", _CRITICAL, 0,
        "Prometheus knows no gateway.",
        for_s=300, fixed=True, figure="gateway/absent", kind=SubjectType.PLANE,
        judge=EvaluatedBy.PROMETHEUS,
        action="Is the plane up, and does the scrape configuration find it?",
    ),
    AlertRule(
        "TierplaneRequestsFail", _CRITICAL, 0.1,
        "More than {threshold} of tier {subject}'s requests fail.",
        clear=0.05, for_s=300, unit=Unit.RATIO, figure="tier/failed_ratio",
        action="The panel «Failures by reason», then tierplane logs of the tier.",
    ),
    AlertRule(
        "TierplaneSloMissed", _WARNING, 1,
        "Tier {subject} misses its SLO more than {threshold} as often as slo.attainment allows.",
        clear=0.6, for_s=600, unit=Unit.TIMES, figure=TIER_SLO_BURN,
        action="Do requests fail, wait or run slowly? tierplane alerts shows which; then more replicas.",
    ),
    AlertRule(
        "TierplaneFirstTokenSlow", _WARNING, 3,
        "One stream in twenty of tier {subject} waits more than {threshold} for its first token.",
        clear=2.5, for_s=600, unit=Unit.SECONDS, figure="tier/ttft_p95_s",
        action="Is the tier saturated? Then more replicas; if not, look at prefill (max-num-batched-tokens).",
    ),
    AlertRule(
        "TierplaneQueueLong", _WARNING, 50,
        "More than {threshold} requests wait for an engine.",
        clear=40, for_s=300, figure=QUEUE_WAITING, kind=SubjectType.PLANE,
        action="More replicas of the saturated tier, or a spill that is allowed to go further.",
    ),
    AlertRule(
        "TierplaneQueueWaitLong", _WARNING, 3,
        "One waiting request in twenty of {subject} priority waits more than {threshold}.",
        for_s=600, unit=Unit.SECONDS, figure="queue/wait_p95_s", kind=SubjectType.PRIORITY,
        judge=EvaluatedBy.PROMETHEUS,
        action="More replicas of the saturated tier.",
    ),
    AlertRule(
        "TierplaneSheds", _WARNING, 0.01,
        "More than {threshold} of the requests for tier {subject} are not admitted, or too late.",
        clear=0.005, for_s=300, unit=Unit.RATIO, figure="tier/shed_ratio",
        action="The panel «Shed by reason»: a full queue, or deadlines that can't be kept.",
    ),
    AlertRule(
        "TierplaneRetriesMany", _WARNING, 0.2,
        "More than {threshold} of tier {subject}'s requests need another attempt.",
        clear=0.15, for_s=600, unit=Unit.RATIO, figure="tier/retried_ratio",
        action="The panel «Failures at endpoints»: which tier, and what kind.",
    ),
    AlertRule(
        "TierplaneStreamsLost", _WARNING, 0,
        "A stream whose engine was lost could not go on.",
        for_s=0, fixed=True, figure="stream/refused_per_s", kind=SubjectType.PLANE,
        judge=EvaluatedBy.PROMETHEUS,
        action="Why was the engine lost? Sampling without a seed goes on only with resume: best_effort.",
    ),
    AlertRule(
        "TierplaneBreakerOpen", _WARNING, 0.5,
        "Endpoint {subject} has been kept from requests for {lasts}.",
        for_s=300, fixed=True, figure="endpoint/breaker", kind=SubjectType.ENDPOINT,
        judge=EvaluatedBy.PROMETHEUS,
        action="tierplane logs of the tier; its supervisor replaces an engine that hangs.",
    ),
    AlertRule(
        "TierplaneTierSaturated", _WARNING, 0.9,
        "Tier {subject} has had more than {threshold} of its places taken for {lasts}.",
        clear=0.8, for_s=600, unit=Unit.RATIO, figure=TIER_SATURATION,
        action="Scale out: more replicas, or a higher concurrency_limit if its GPUs have room.",
    ),
    AlertRule(
        "TierplaneTierIdle", _INFO, 0.2,
        "Tier {subject} has had next to nothing to do for {lasts}.",
        clear=0.3, below=True, for_s=900, unit=Unit.RATIO, figure=TIER_SATURATION,
        given=Precondition("tier/requests_per_s", 1, below=True),
        action="Scale in: fewer replicas, or let its neighbour serve it.",
    ),
    AlertRule(
        "TierplaneGpuBusy", _INFO, 0.95,
        "GPU {subject} has been busy for {lasts}.",
        clear=0.85, for_s=900, unit=Unit.RATIO, figure=GPU_BUSY, kind=SubjectType.GPU,
        action="With a queue or a saturated tier: scale out.",
    ),
    AlertRule(
        "TierplaneGpuMemoryFull", _WARNING, 0.98,
        "GPU {subject} has no memory left.",
        clear=0.97, for_s=300, unit=Unit.RATIO, figure=GPU_MEMORY, kind=SubjectType.GPU,
        action="Something besides the engine may use it; lower gpu-memory-utilization.",
    ),
    AlertRule(
        "TierplaneGpuHot", _WARNING, 87,
        "GPU {subject} is hot and will slow down.",
        clear=84, for_s=300, unit=Unit.CELSIUS, figure=GPU_TEMPERATURE, kind=SubjectType.GPU,
        action="Look at the node's cooling; a cordon keeps new engines away.",
    ),
    AlertRule(
        "TierplaneGpuOutOfUse", _WARNING, 0,
        "GPU {subject} was taken out of use.",
        for_s=0, fixed=True, figure=GPU_OUT_OF_USE, kind=SubjectType.GPU, judge=EvaluatedBy.PROGRAM,
        action="tierplane gpus says why, and whether it returns by itself.",
    ),
    AlertRule(
        "TierplaneNodeLost", _WARNING, 0,
        "Node {subject} is lost, with replicas that ran there.",
        for_s=0, fixed=True, figure=NODE_LOST, kind=SubjectType.NODE, judge=EvaluatedBy.PROGRAM,
        action="Is the machine there? What ran on it is started elsewhere if there is room.",
    ),
    AlertRule(
        "TierplaneNodeSilent", _WARNING, 30,
        "The agent of node {subject} has said nothing for more than {threshold}: its GPUs are not watched.",
        for_s=60, unit=Unit.SECONDS, figure=NODE_SILENT, kind=SubjectType.NODE, judge=EvaluatedBy.PROGRAM,
        action="tierplane logs controller; is the node overloaded, or its driver stuck?",
    ),
    AlertRule(
        "TierplaneStoreUnsafe", _WARNING, 0,
        "What the controller remembers would not survive it.",
        for_s=30, fixed=True, figure=STORE_UNSAFE, kind=SubjectType.PLANE, judge=EvaluatedBy.PROGRAM,
        action="Make room on the disk, or let controller.store_path be written; it is tried again by itself.",
    ),
)  # fmt: skip

BY_NAME: Final = {rule.name: rule for rule in RULES}
PREFIX: Final = "Tierplane"


@dataclass(frozen=True, slots=True)
class RuleChange:
    """What a configuration wants otherwise; None: as it is."""

    enabled: bool = True
    threshold: float | None = None
    for_s: float | None = None
    severity: Severity | None = None


def rule_named(name: str) -> AlertRule | None:
    """The rule of that name, which may be without ``Tierplane`` and in any case."""
    wanted = name.lower().removeprefix(PREFIX.lower())
    return next((rule for rule in RULES if rule.name.lower() == PREFIX.lower() + wanted), None)


def changed(rule: AlertRule, change: RuleChange) -> AlertRule:
    """The rule as a configuration has it; ``clear`` moves with the threshold."""
    made = rule
    if change.threshold is not None:
        made = replace(made, threshold=change.threshold, clear=_moved_clear(rule, change.threshold))
    if change.for_s is not None:
        made = replace(made, for_s=change.for_s)
    if change.severity is not None:
        made = replace(made, severity=change.severity)
    return made


def _moved_clear(rule: AlertRule, threshold: float) -> float | None:
    """In proportion to the threshold; of a share that must not be too small, to what is missing of 1."""
    if rule.clear is None or not rule.threshold:
        return None
    if rule.below and rule.unit is Unit.RATIO:
        return 1 - (1 - rule.clear) / (1 - rule.threshold) * (1 - threshold)
    return rule.clear / rule.threshold * threshold
