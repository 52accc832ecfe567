"""Writes kuberay.json, the schema of what cluster/*.yaml holds for Kubernetes.

    pip install kubernetes-validate==1.37.0 && python -m tests.cluster.kuberay_schema

The CRDs of KubeRay have 1.4 MB, nearly all of it Kubernetes' pod template, several times. So the fields that KubeRay
itself defines stand here, as its reference has them, and the pod template is taken from Kubernetes' own schema. Of both
only the objects that the manifests use are kept, with all their fields: those that the manifests use with their types,
the others by name, so that a misspelt field is an error and another one is not.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TARGET = Path(__file__).with_name("kuberay.json")
KUBERAY = "1.7.1"
KUBERNETES = "1.37.0"
SOURCE = (
    f"KubeRay {KUBERAY}: https://docs.ray.io/en/master/kuberay/references/api.html; "
    f"Kubernetes {KUBERNETES}: the package kubernetes-validate. Written by tests/cluster/kuberay_schema.py."
)
TEXT, WHOLE, NUMBER, SWITCH = ({"type": name} for name in ("string", "integer", "number", "boolean"))
TEXTS = {"type": "object", "additionalProperties": TEXT}
CLUSTER_SPEC = {"$ref": "#/RayClusterSpec"}


def kubernetes(name: str) -> dict[str, Any]:
    """What refers to a definition of Kubernetes."""
    return {"$ref": f"/api/_definitions.json#/$defs/io.k8s.{name}"}


POD = kubernetes("api.core.v1.PodTemplateSpec")
META = kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta")


def fields(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """An object that has these fields and no others."""
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


GROUP = {"resources": TEXTS, "labels": TEXTS, "rayStartParams": TEXTS, "template": POD}
CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy=fields(type={"enum": ["Recreate", "None"]}),
    authOptions=fields(enableK8sTokenAuth=SWITCH, secretName=TEXT, mode={"enum": ["disabled", "token"]}),
    suspend=SWITCH,
    managedBy=TEXT,
    autoscalerOptions=True,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=SWITCH,
    gcsFaultToleranceOptions=True,
    historyServerOptions=True,
    networkPolicy=True,
    tlsOptions=fields(enabled=SWITCH),
    headGroupSpec=fields(
        "template", headService=True, enableIngress=SWITCH, ingressOptions=True, serviceType=TEXT, **GROUP
    ),
    rayVersion=TEXT,
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName template",
            suspend=SWITCH,
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            idleTimeoutSeconds=WHOLE,
            priority=WHOLE,
            scaleStrategy=True,
            numOfHosts=WHOLE,
            **GROUP,
        ),
    },
)
JOB = fields(
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=WHOLE),
    managedBy=TEXT,
    deletionStrategy=True,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=SWITCH,
    suspend=SWITCH,
)


def resource(version: str, kind: str, spec: Any) -> dict[str, Any]:
    """A resource of Kubernetes: its version, its kind, and its spec."""
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=META,
        spec=spec,
        status=True,
    )


QUANTITY = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))?$"
OWN = {
    "RayClusterSpec": CLUSTER,
    # Kubernetes' schema leaves it open; this is what the CRDs say.
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {
        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": QUANTITY}]
    },
}
KINDS = {
    "RayCluster": resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": resource("ray.io/v1", "RayJob", JOB),
    "PersistentVolumeClaim": resource(
        "v1", "PersistentVolumeClaim", kubernetes("api.core.v1.PersistentVolumeClaimSpec")
    ),
}


def manifests() -> list[dict[str, Any]]:
    """The resources in cluster/."""
    paths = (ROOT / "cluster" / name for name in ("raycluster.yaml", "rayjob.yaml"))
    return [document for path in paths for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


class Extract:
    """Of a schema, what says something of some values. Objects that stand in several places are kept once."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self.definitions = definitions
        self.values: dict[str, list[Any]] = {}

    def collect(self, schema: Any, values: list[Any]) -> None:
        """Note which values each definition has to describe."""
        if schema is True or not values:
            return
        if "$ref" in schema:
            name = schema["$ref"].rsplit("/", 1)[1]
            self.values.setdefault(name, []).extend(values)
            self.collect(self.definitions[name], values)
        for name, inner in schema.get("properties", {}).items():
            self.collect(inner, [value[name] for value in values if name in value])
        if isinstance(schema.get("additionalProperties"), dict):
            self.collect(schema["additionalProperties"], [inner for value in values for inner in value.values()])
        if "items" in schema:
            self.collect(schema["items"], [inner for value in values for inner in value])

    def kept(self, schema: Any, values: list[Any]) -> Any:
        """The part of a schema that these values use; True where they use nothing of it."""
        if schema is True or not values:
            return True
        if "$ref" in schema:
            return {"$ref": "#/$defs/" + short(schema["$ref"].rsplit("/", 1)[1])}
        part = {key: schema[key] for key in ("const", "enum", "anyOf", "minimum", "required") if schema.get(key)}
        kinds = schema.get("type")
        if kinds:  # to Kubernetes a null is as good as nothing; a manifest should not say it
            names = [kinds] if isinstance(kinds, str) else [kind for kind in kinds if kind != "null"]
            part["type"] = names[0] if len(names) == 1 else names
        if "properties" in schema:
            part["additionalProperties"] = False
            part["properties"] = {
                name: self.kept(inner, [value[name] for value in values if name in value])
                for name, inner in sorted(schema["properties"].items())
            }
        elif isinstance(schema.get("additionalProperties"), dict):
            inside = [inner for value in values for inner in value.values()]
            part["additionalProperties"] = self.kept(schema["additionalProperties"], inside or [""])
        elif "items" in schema:
            part["items"] = self.kept(schema["items"], [inner for value in values for inner in value])
        return part


def short(name: str) -> str:
    """The last part of a definition's name: PodSpec."""
    return name.rsplit(".", 1)[-1]


def build(definitions: dict[str, Any], resources: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of the resources: one of `KINDS`, by what `kind` says."""
    extract = Extract(definitions | OWN)
    by_kind = {kind: [found for found in resources if found["kind"] == kind] for kind in KINDS}
    for kind, found in by_kind.items():
        extract.collect(KINDS[kind], found)
    chosen = [
        {"if": {"properties": {"kind": {"const": kind}}}, "then": extract.kept(KINDS[kind], found)}
        for kind, found in by_kind.items()
    ]
    parts = {short(name): extract.kept(extract.definitions[name], extract.values[name]) for name in extract.values}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": SOURCE,
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": list(KINDS)}},
        "allOf": chosen,
        "$defs": dict(sorted(parts.items())),
    }


def main() -> None:
    """Write the schema of the manifests as they are now."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    text = json.dumps(build(definitions, manifests()), indent=1)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
