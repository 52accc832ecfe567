"""The manifests for Kubernetes, against an extract of the schemas of KubeRay and Kubernetes; see kuberay_schema.py."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from tests.cluster.files import CLUSTER, constrained, documents, own_version, read
from tests.cluster.kuberay_schema import KUBERNETES, TARGET, build, manifests

SCHEMA = json.loads(TARGET.read_text(encoding="utf-8"))
MANIFESTS = manifests()
BY_KIND = {manifest["kind"]: manifest for manifest in MANIFESTS}
FREE = ("annotations", "limits", "requests", "rayStartParams")
"""Maps whose keys are the user's."""

Path = tuple[str | int, ...]


def errors(manifest: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]


def fields(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all fields whose names a schema defines."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not path or path[-1] not in FREE:
                yield (*path, name)
            yield from fields(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


def inside(manifest: Any, path: Path) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def clusters() -> list[dict[str, Any]]:
    return [BY_KIND["RayCluster"]["spec"], BY_KIND["RayJob"]["spec"]["rayClusterSpec"]]


def groups() -> list[dict[str, Any]]:
    return [group for spec in clusters() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_there_is_one_of_each() -> None:
    assert [manifest["kind"] for manifest in MANIFESTS] == ["PersistentVolumeClaim", "RayCluster", "RayJob"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_it_fits_the_schema(manifest: dict[str, Any]) -> None:
    assert errors(manifest) == []


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_every_field_is_an_error_when_misspelt(manifest: dict[str, Any]) -> None:
    paths = list(fields(manifest))
    assert len(paths) > 8
    for *outer, name in paths:
        wrong = copy.deepcopy(manifest)
        target = inside(wrong, tuple(outer))
        target[f"{name}s"] = target.pop(name)
        assert errors(wrong), (*outer, name)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "ray.io/v1alpha1"),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "rayVersion"), 2.6),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "replicas"), "2"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"), "16GB"),
        (("spec", "headGroupSpec", "template", "metadata", "annotations", "prometheus.io/port"), 8080),
    ],
)
def test_a_wrong_value_is_an_error(path: Path, value: Any) -> None:
    wrong = copy.deepcopy(BY_KIND["RayCluster"])
    inside(wrong, path[:-1])[path[-1]] = value
    assert errors(wrong)


def test_fields_that_the_manifests_do_not_use_are_known() -> None:
    job = copy.deepcopy(BY_KIND["RayJob"])
    job["spec"]["submissionMode"] = "HTTPMode"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["nodeSelector"] = {"pool": "cpu"}
    assert errors(job) == []


def test_the_extract_is_up_to_date() -> None:
    pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: see kuberay_schema.py")
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    assert build(definitions, MANIFESTS) == SCHEMA


def test_versions_are_those_that_are_tested() -> None:
    assert {spec["rayVersion"] for spec in clusters()} == {constrained("ray")}
    images = {container["image"] for group in groups() for container in group["template"]["spec"]["containers"]}
    assert images == {f"change-me/delve_ray:{own_version()}"}
    dockerfile = read("Dockerfile")
    for name, version in (("RAY", constrained("ray")), ("TORCH", constrained("torch")), ("DELVE_RAY", own_version())):
        assert re.findall(rf"^ARG {name}_VERSION=(.+)$", dockerfile, re.MULTILINE) == [version]
    assert f"scikit-learn=={constrained('scikit-learn')}" in dockerfile


def test_every_pod_is_scraped_where_it_exports_and_writes_where_all_write() -> None:
    claim = BY_KIND["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups():
        pod = group["template"]
        (container,) = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        annotations = pod["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert int(annotations["prometheus.io/port"]) == ports["metrics"]
        (volume,) = pod["spec"]["volumes"]
        (mount,) = container["volumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mount["name"] == volume["name"]
        assert container["env"] == [{"name": "STORAGE_PATH", "value": mount["mountPath"]}]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


def test_the_head_does_not_train_and_workers_have_a_gpu() -> None:
    for spec in clusters():
        assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for group in spec["workerGroupSpecs"]:
            assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_the_demo_of_the_image_on_all_its_workers() -> None:
    job = BY_KIND["RayJob"]["spec"]
    program, script, *arguments = job["entrypoint"].split()
    (source, target) = re.findall(r"^COPY .*?(cluster/\S+) (\S+)$", read("Dockerfile"), re.MULTILINE)[0]
    assert (program, script) == ("python", target)
    demo = (CLUSTER.parent / source).read_text(encoding="utf-8")
    options = [argument for argument in arguments if argument.startswith("--")]
    assert options == ["--workers", "--gpu"]
    assert all(f'add_argument("{option}"' in demo for option in options)
    replicas = sum(group["replicas"] for group in job["rayClusterSpec"]["workerGroupSpecs"])
    assert int(arguments[arguments.index("--workers") + 1]) == replicas


def test_one_document_per_job() -> None:
    assert len(documents("rayjob.yaml")) == 1
