"""Strict schemas of the custom resources, for the fields that we use: anything else is a mistake.

Field names and types are those of the Go types that their projects publish: ``ray-operator/apis/ray/v1`` of
KubeRay 1.6 and the ``monitoring.coreos.com/v1`` API of the Prometheus operator. Pod templates are checked
against Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
ANY: Schema = {"type": "object"}


def strict(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def each(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = strict("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    return strict(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


_SECRET = strict(
    "valueFrom", valueFrom=strict("secretKeyRef", secretKeyRef=strict("name key", name=TEXT, key=TEXT))
)
_GROUP = {"rayStartParams": TEXTS, "template": ANY}

RAY_SERVICE = resource(
    "ray.io/v1",
    "RayService",
    strict(
        "rayClusterConfig",
        serveConfigV2=TEXT,
        rayClusterDeletionDelaySeconds=COUNT,
        excludeHeadPodFromServeSvc=SWITCH,
        upgradeStrategy=strict(
            type={"enum": ["None", "NewCluster", "NewClusterWithIncrementalUpgrade"]},
        ),
        rayClusterConfig=strict(
            "headGroupSpec",
            rayVersion=TEXT,
            authOptions=strict(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=SWITCH,
            autoscalerOptions=strict(
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                idleTimeoutSeconds=COUNT,
                resources=strict(requests=TEXTS, limits=TEXTS),
                securityContext=ANY,
            ),
            gcsFaultToleranceOptions=strict(redisAddress=TEXT, redisPassword=_SECRET),
            headGroupSpec=strict(
                "rayStartParams template",
                serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                **_GROUP,
            ),
            workerGroupSpecs=each(
                strict(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    **_GROUP,
                )
            ),
        ),
    ),
)

_SELECTOR = strict("matchLabels", matchLabels=TEXTS)
_RELABELING = strict(
    "action",
    action={"enum": ["drop", "keep", "replace", "labeldrop", "labelkeep"]},
    regex=TEXT,
    sourceLabels=each(TEXT),
    targetLabel=TEXT,
    replacement=TEXT,
)
POD_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    strict(
        "selector podMetricsEndpoints",
        selector=_SELECTOR,
        podMetricsEndpoints=each(
            strict(
                "port",
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": r"^\d+s$"},
                scrapeTimeout={"type": "string", "pattern": r"^\d+s$"},
                honorLabels=SWITCH,
                metricRelabelings=each(_RELABELING),
                relabelings=each(_RELABELING),
            )
        ),
    ),
)

PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    strict(
        "groups",
        groups=each(
            strict(
                "name rules",
                name=TEXT,
                interval=TEXT,
                rules=each(
                    strict(
                        "expr",
                        record=TEXT,
                        alert=TEXT,
                        expr=TEXT,
                        **{"for": TEXT},
                        labels=TEXTS,
                        annotations=TEXTS,
                    )
                ),
            )
        ),
    ),
)

CUSTOM = {"RayService": RAY_SERVICE, "PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}
