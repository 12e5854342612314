"""The files of infra/ fit their schemas, and hold what docs and security rules say of them. None of them is run here."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import ROOT

INFRA = ROOT / "infra"
KUBERNETES = sorted((INFRA / "kubernetes").glob("*.yaml"))
CLUSTER_FIELDS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs", "suspend",
    "gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy",
}  # fmt: skip
GROUP_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "rayStartParams", "template",
    "scaleStrategy", "suspend",
}  # fmt: skip
HEAD_FIELDS = {"serviceType", "rayStartParams", "template", "enableIngress", "headService"}
JOB_FIELDS = {
    "entrypoint", "runtimeEnvYAML", "clusterSelector", "submissionMode", "submitterPodTemplate", "rayClusterSpec",
    "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "metadata",
}  # fmt: skip
"""Of KubeRay's API reference, ray.io/v1."""
SECRET = re.compile(r"password|secret|token|key_id", re.IGNORECASE)


def documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from (document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document)


def pod_templates(content: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("template", "submitterPodTemplate"):
                yield value
            yield from pod_templates(value)
    elif isinstance(content, list):
        for value in content:
            yield from pod_templates(value)


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for path in KUBERNETES:
        for document in documents(path):
            for template in pod_templates(document):
                for container in template["spec"]["containers"]:
                    yield f"{path.name}: {container['name']}", template["spec"], container


def test_rays_objects_have_fields_of_its_api_alone() -> None:
    kinds = {
        d["kind"]: d["spec"] for path in KUBERNETES for d in documents(path) if d["apiVersion"] == "ray.io/v1"
    }
    assert set(kinds) == {"RayCluster", "RayJob"}
    cluster = kinds["RayCluster"]
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
    assert all(set(group) <= GROUP_FIELDS for group in cluster["workerGroupSpecs"])
    assert set(kinds["RayJob"]) <= JOB_FIELDS
    started = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(v, str) for group in started for v in group["rayStartParams"].values())


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_objects_fit_its_schemas(path: Path) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents(path):
        if document["apiVersion"] != "ray.io/v1":
            kubernetes.validate(document, kubernetes.latest_version(), strict=True)
        for number, template in enumerate(pod_templates(document)):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"pod-{number}"},
                "spec": template["spec"],
            }
            kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("spec", "container"), [c[1:] for c in containers()], ids=[c[0] for c in containers()]
)
def test_a_container_is_limited_unprivileged_and_takes_secrets_by_reference(
    spec: dict[str, Any], container: dict[str, Any]
) -> None:
    assert set(container["resources"]) == {"requests", "limits"}
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for variable in container["env"]:
        if SECRET.search(variable["name"]):
            assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    if "gpu" in str(container["resources"]) or container["name"].startswith("ray-head"):
        memory = [
            volume for volume in spec["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert [mounted[volume["name"]] for volume in memory] == ["/dev/shm"]
    if container["name"] != "ray-job-submitter":
        assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_ray_asks_for_a_token_wherever_it_is_reached_from_elsewhere() -> None:
    for name, _, container in containers():
        if "ray" in name.split(": ")[1]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"], name
    for name in ("slurm/sweep.sbatch", "ray/cluster.yaml", "docker/Dockerfile"):
        text = (INFRA / name).read_text(encoding="utf-8")
        assert "RAY_AUTH_MODE=token" in text, name
        assert "RAY_AUTH_MODE=disabled" not in text, name


def test_the_launchers_file_fits_rays_schema() -> None:
    import jsonschema

    # Importing Ray takes seconds, its file does not.
    (folder,) = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr, misc]
    schema = json.loads((Path(folder) / "autoscaler" / "ray-schema.json").read_text())
    (config,) = documents(INFRA / "ray" / "cluster.yaml")
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(each.get("max_workers", 0) for each in types.values()) >= config["max_workers"]


def test_the_compose_file_publishes_one_port_on_loopback_and_holds_no_secret() -> None:
    (compose,) = documents(INFRA / "mlflow" / "compose.yaml")
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:5000:5000"]
    for service in compose["services"].values():
        assert "image" not in service or re.search(r":\d+\.\d+", service["image"]), (
            "an image without a version"
        )
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]*)?\}", value), name
        for other in service.get("depends_on", {}):
            assert other in compose["services"]
    options = " ".join(compose["services"]["mlflow"]["command"])
    assert "--app-name=basic-auth" in options
    assert "--allowed-hosts=" in options
    example = (INFRA / "mlflow" / "env.example").read_text(encoding="utf-8")
    variables = set(re.findall(r"\$\{(\w+)", (INFRA / "mlflow" / "compose.yaml").read_text(encoding="utf-8")))
    assert variables == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_images_are_pinned_and_run_as_a_user() -> None:
    for path in (INFRA / "docker" / "Dockerfile", INFRA / "mlflow" / "Dockerfile"):
        text = path.read_text(encoding="utf-8")
        bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base) for base in bases)
        assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] not in ("0", "root")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert (
        re.search(r'"mlflow\[auth\]==(\S+)"', (INFRA / "mlflow" / "Dockerfile").read_text()).group(1)
        in pinned
    )  # type: ignore[union-attr]


def test_a_cluster_that_begins_without_machines_is_given_a_sweep_that_waits_for_them() -> None:
    kinds = {d["kind"]: d for path in KUBERNETES for d in documents(path)}
    (group,) = kinds["RayCluster"]["spec"]["workerGroupSpecs"]
    (config,) = documents(INFRA / "ray" / "cluster.yaml")
    assert group["minReplicas"] == config["available_node_types"]["spot"]["min_workers"] == 0
    scripts = [
        d["data"]["run.sh"] for d in documents(INFRA / "kubernetes" / "xl2.yaml") if d["kind"] == "ConfigMap"
    ]
    for text in (*scripts, (INFRA / "README.md").read_text(encoding="utf-8")):
        assert "--set resources.autoscale=true" in text
        assert f"--set resources.concurrent_trials={group['maxReplicas']}" in text
