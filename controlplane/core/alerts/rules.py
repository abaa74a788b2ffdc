"""All alert rules; the only place where they are defined, for the controller and for Prometheus.

The controller evaluates a rule's figure (:mod:`controlplane.core.alerts.signals`);
:mod:`controlplane.monitoring.rules` adds the figure in PromQL and takes everything else from this module.
``controller.alerts.rules`` in the configuration changes thresholds for the controller only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from controlplane.core.alerts.alert import AlertRule, EvaluatedBy, Precondition, Severity, SubjectType, Unit

_CRITICAL, _WARNING, _INFO = Severity.CRITICAL, Severity.WARNING, Severity.INFO

TIER_READY: Final = "tier/ready"
TIER_DUE: Final = "tier/due"
TIER_MISSING: Final = "tier/missing_replicas"
TIER_SAMPLE: Final = "tier/sample_requests"
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
NODE_MEMORY: Final = "node/memory_used_ratio"
NODE_DISK: Final = "node/disk_used_ratio"
STORE_UNSAFE: Final = "plane/store_unsafe"
STORE_UNREADABLE: Final = "plane/store_unreadable"
"""Figures computed in :mod:`controlplane.core.alerts.signals`; those of a tier's traffic get their names in
:func:`controlplane.core.traffic.counters.named`."""

MIN_SAMPLE: Final = 10
"""Ratios and percentiles of fewer requests in five minutes fire no alert."""
ENOUGH_REQUESTS: Final = Precondition(TIER_SAMPLE, MIN_SAMPLE - 1)

RULES: Final = (
    AlertRule(
        "TierplaneTierDown", _CRITICAL, 1,
        "Tier {subject} has no ready endpoint.",
        below=True, for_s=120, fixed=True, figure=TIER_READY, given=Precondition(TIER_DUE, 0),
        action="`tierplane status` says why; other tiers serve its requests as far as `bridge` allows.",
    ),
    AlertRule(
        "TierplaneReplicasMissing", _WARNING, 0,
        "Tier {subject} has had fewer ready endpoints than desired for {lasts}.",
        for_s=900, fixed=True, figure=TIER_MISSING,
        action="See `tierplane status`; `tierplane plan` shows whether there are resources for them.",
    ),
    AlertRule(
        "TierplaneTierHeld", _WARNING, 0,
        "Replicas of tier {subject} failed repeatedly; no more are started.",
        for_s=0, fixed=True, figure=TIER_HELD, judge=EvaluatedBy.PROGRAM,
        action="Fix the cause named in the diagnosis, then run `tierplane restart` for the tier.",
    ),
    AlertRule(
        "TierplaneGatewayUnreachable", _CRITICAL, 1,
        "Prometheus can't scrape the gateway at {subject}.",
        below=True, for_s=60, fixed=True, figure="gateway/up", kind=SubjectType.GATEWAY,
        judge=EvaluatedBy.PROMETHEUS,
        action="See `tierplane logs gateway`, and check whether its node is up.",
    ),
    AlertRule(
        "TierplaneGatewayMissing", _CRITICAL, 0,
        "Prometheus has no gateway to scrape.",
        for_s=300, fixed=True, figure="gateway/absent", kind=SubjectType.PLANE,
        judge=EvaluatedBy.PROMETHEUS,
        action="Check that the plane is running and that the scrape configuration lists its gateways.",
    ),
    AlertRule(
        "TierplaneRequestsFail", _CRITICAL, 0.1,
        "More than {threshold} of tier {subject}'s requests fail.",
        clear=0.05, for_s=300, unit=Unit.RATIO, figure="tier/failed_ratio", given=ENOUGH_REQUESTS,
        action="See the panel \"Failures by reason\", then `tierplane logs` of the tier.",
    ),
    AlertRule(
        "TierplaneSloMissed", _WARNING, 1,
        "Tier {subject} misses its SLO more than {threshold} as often as slo.attainment allows.",
        clear=0.6, for_s=600, unit=Unit.TIMES, figure=TIER_SLO_BURN, given=ENOUGH_REQUESTS,
        action="`tierplane alerts` shows whether requests fail, wait or are slow; add replicas if they wait.",
    ),
    AlertRule(
        "TierplaneFirstTokenSlow", _WARNING, 3,
        "5 % of tier {subject}'s streams wait more than {threshold} for the first token.",
        clear=2.5, for_s=600, unit=Unit.SECONDS, figure="tier/ttft_p95_s", given=ENOUGH_REQUESTS,
        action="If the tier is saturated, add replicas; if not, tune prefill (max-num-batched-tokens).",
    ),
    AlertRule(
        "TierplaneQueueLong", _WARNING, 50,
        "More than {threshold} requests wait in the gateways' queues.",
        clear=40, for_s=300, figure=QUEUE_WAITING, kind=SubjectType.PLANE,
        action="Add replicas to the saturated tier, or let its requests spill to more tiers.",
    ),
    AlertRule(
        "TierplaneQueueWaitLong", _WARNING, 3,
        "5 % of the queued requests with priority {subject} wait more than {threshold}.",
        for_s=600, unit=Unit.SECONDS, figure="queue/wait_p95_s", kind=SubjectType.PRIORITY,
        judge=EvaluatedBy.PROMETHEUS,
        action="Add replicas to the saturated tier.",
    ),
    AlertRule(
        "TierplaneSheds", _WARNING, 0.01,
        "More than {threshold} of the requests for tier {subject} are rejected or expire in the queue.",
        clear=0.005, for_s=300, unit=Unit.RATIO, figure="tier/shed_ratio", given=ENOUGH_REQUESTS,
        action="The panel \"Shed by reason\" shows whether the queue is full or deadlines are too short.",
    ),
    AlertRule(
        "TierplaneRetriesMany", _WARNING, 0.2,
        "More than {threshold} of tier {subject}'s requests are retried.",
        clear=0.15, for_s=600, unit=Unit.RATIO, figure="tier/retried_ratio", given=ENOUGH_REQUESTS,
        action="The panel \"Failures at endpoints\" shows the tier and the kind of failure.",
    ),
    AlertRule(
        "TierplaneStreamsLost", _WARNING, 0,
        "A stream whose engine was lost could not be resumed.",
        for_s=0, fixed=True, figure="stream/refused_per_s", kind=SubjectType.PLANE,
        judge=EvaluatedBy.PROMETHEUS,
        action="Find out why the engine was lost. Unseeded sampling resumes only with `resume: best_effort`.",
    ),
    AlertRule(
        "TierplaneBreakerOpen", _WARNING, 0.5,
        "The circuit breaker of endpoint {subject} has been open for {lasts}.",
        for_s=300, fixed=True, figure="endpoint/breaker", kind=SubjectType.ENDPOINT,
        judge=EvaluatedBy.PROMETHEUS,
        action="See `tierplane logs` of the tier; the supervisor restarts an engine that hangs.",
    ),
    AlertRule(
        "TierplaneTierSaturated", _WARNING, 0.9,
        "More than {threshold} of tier {subject}'s request slots have been in use for {lasts}.",
        clear=0.8, for_s=600, unit=Unit.RATIO, figure=TIER_SATURATION,
        action="Add replicas, or raise concurrency_limit if its GPUs are not fully used.",
    ),
    AlertRule(
        "TierplaneTierIdle", _INFO, 0.2,
        "Tier {subject} has been nearly idle for {lasts}.",
        clear=0.3, below=True, for_s=900, unit=Unit.RATIO, figure=TIER_SATURATION,
        given=Precondition("tier/requests_per_s", 1, below=True),
        action="Remove replicas, or let another tier serve its requests.",
    ),
    AlertRule(
        "TierplaneGpuBusy", _INFO, 0.95,
        "GPU {subject} has been busy for {lasts}.",
        clear=0.85, for_s=900, unit=Unit.RATIO, figure=GPU_BUSY, kind=SubjectType.GPU,
        action="If requests wait or the tier is saturated, add replicas.",
    ),
    AlertRule(
        "TierplaneGpuMemoryFull", _WARNING, 0.98,
        "GPU {subject} has almost no free memory.",
        clear=0.97, for_s=300, unit=Unit.RATIO, figure=GPU_MEMORY, kind=SubjectType.GPU,
        action="Check for other processes on the GPU; lower gpu-memory-utilization.",
    ),
    AlertRule(
        "TierplaneGpuHot", _WARNING, 87,
        "GPU {subject} is hot and may throttle.",
        clear=84, for_s=300, unit=Unit.CELSIUS, figure=GPU_TEMPERATURE, kind=SubjectType.GPU,
        action="Check the node's cooling; cordon the GPU to keep new engines away.",
    ),
    AlertRule(
        "TierplaneGpuOutOfUse", _WARNING, 0,
        "GPU {subject} was taken out of use.",
        for_s=0, fixed=True, figure=GPU_OUT_OF_USE, kind=SubjectType.GPU, judge=EvaluatedBy.PROGRAM,
        action="`tierplane gpus` shows the reason and whether it recovers without help.",
    ),
    AlertRule(
        "TierplaneNodeLost", _WARNING, 0,
        "Node {subject} is lost, and so are the replicas that ran on it.",
        for_s=0, fixed=True, figure=NODE_LOST, kind=SubjectType.NODE, judge=EvaluatedBy.PROGRAM,
        action="Check the machine. Its replicas start on other nodes if there are resources.",
    ),
    AlertRule(
        "TierplaneNodeSilent", _WARNING, 30,
        "The agent of node {subject} has not reported for more than {threshold}: its GPUs are not monitored.",
        for_s=60, unit=Unit.SECONDS, figure=NODE_SILENT, kind=SubjectType.NODE, judge=EvaluatedBy.PROGRAM,
        action="See `tierplane logs controller`; check whether the node is overloaded or its driver hangs.",
    ),
    AlertRule(
        "TierplaneNodeMemoryLow", _WARNING, 0.95,
        "More than {threshold} of node {subject}'s memory is in use.",
        clear=0.92, for_s=300, unit=Unit.RATIO, figure=NODE_MEMORY, kind=SubjectType.NODE,
        judge=EvaluatedBy.PROGRAM,
        action="See `tierplane nodes`; the kernel may kill engines. Run fewer, or smaller models there.",
    ),
    AlertRule(
        "TierplaneNodeDiskFull", _WARNING, 0.93,
        "A file system of node {subject} is more than {threshold} full.",
        clear=0.9, for_s=120, unit=Unit.RATIO, figure=NODE_DISK, kind=SubjectType.NODE,
        judge=EvaluatedBy.PROGRAM,
        action="See `tierplane nodes`; remove models or files that are no longer needed.",
    ),
    AlertRule(
        "TierplaneStoreUnsafe", _WARNING, 0,
        "The controller's state is not saved and would be lost with it.",
        for_s=30, fixed=True, figure=STORE_UNSAFE, kind=SubjectType.PLANE, judge=EvaluatedBy.PROGRAM,
        action="Free disk space, or make controller.store_path writable; saving is retried automatically.",
    ),
    AlertRule(
        "TierplaneStoreUnreadable", _WARNING, 0,
        "Values of the controller's store can't be read and were put aside; all others are used.",
        for_s=0, fixed=True, figure=STORE_UNREADABLE, kind=SubjectType.PLANE, judge=EvaluatedBy.PROGRAM,
        action="Set again what the named keys contained, such as a drain or silence. Ends after a day.",
    ),
)  # fmt: skip

BY_NAME: Final = {rule.name: rule for rule in RULES}
PREFIX: Final = "Tierplane"


@dataclass(frozen=True, slots=True)
class RuleChange:
    """A configuration's change to one rule; None leaves a value as it is."""

    enabled: bool = True
    threshold: float | None = None
    for_s: float | None = None
    severity: Severity | None = None


def rule_named(name: str) -> AlertRule | None:
    """The rule with that name, or None; case and the prefix ``Tierplane`` don't matter."""
    short = name.lower().removeprefix(PREFIX.lower())
    return next((rule for rule in RULES if rule.name.lower() == PREFIX.lower() + short), None)


def changed(rule: AlertRule, change: RuleChange) -> AlertRule:
    """The rule with the change applied; ``clear`` moves with the threshold."""
    made = rule
    if change.threshold is not None:
        made = replace(made, threshold=change.threshold, clear=_moved_clear(rule, change.threshold))
    if change.for_s is not None:
        made = replace(made, for_s=change.for_s)
    if change.severity is not None:
        made = replace(made, severity=change.severity)
    return made


def _moved_clear(rule: AlertRule, threshold: float) -> float | None:
    """``clear`` scaled with the threshold; for a ratio with ``below``, its distance from 1 is scaled."""
    if rule.clear is None or not rule.threshold:
        return None
    if rule.below and rule.unit is Unit.RATIO:
        return 1 - (1 - rule.clear) / (1 - rule.threshold) * (1 - threshold)
    return rule.clear / rule.threshold * threshold
