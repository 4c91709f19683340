"""The chart rendered with several values, in a process of its own (Helm is a Go library), and the plain manifests."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "deltaworks"
KEYS = {"secretName": "keys", "apiKeys": "api-keys", "adminKeys": "admin-keys"}
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpu": yaml.safe_load((CHART / "values-gpu.yaml").read_text()),
    "plain": {"auth": KEYS},
    "everything": {
        "auth": KEYS,
        "settings": '[engine.vllm]\ngpu_memory_utilization = 0.8\n\n[tools]\nparser = "toolrl"\n',
        "image": {"repository": "registry.example/deltaworks", "tag": "gpu@sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "pull"}],
        "model": {"path": "/models/base", "existingClaim": "models"},
        "extraEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "store": {"shared": True},
        "autoscaling": {"enabled": True},
        "runtimeClassName": "nvidia",
        "shutdownTimeoutSeconds": 120,
        "networkPolicy": {
            "inferenceFrom": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
            "adminFrom": [{"podSelector": {"matchLabels": {"role": "operator"}}}],
            "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podAnnotations": {"note": "x"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
        ],
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"replicas": 2}, "replicas"),
    "unknown value of a section": ({"image": {"tagg": "x"}}, "tagg"),
    "keys as values": ({"auth": {"adminKeys": ["canary"]}}, "adminKeys"),
    "keys in the settings": ({"settings": '[auth]\nadmin_keys = ["canary"]\n'}, "auth.secretName"),
    "keys in the environment": ({"extraEnv": [{"name": "DELTAWORKS__AUTH__API_KEYS", "value": "canary"}]}, "extraEnv"),
    "keys without a secret": ({"auth": {"adminKeys": "admin-keys"}}, "auth.secretName"),
    "two servers on one claim": ({"replicaCount": 2}, "store.shared"),
    "autoscaling on one claim": ({"autoscaling": {"enabled": True}}, "store.shared"),
    "negative time": ({"shutdownTimeoutSeconds": -1}, "shutdownTimeoutSeconds"),
}
PROGRAM = """
import json, sys
import helm_python
chart = helm_python.Chart.load(sys.argv[1])
rendered, errors = {}, {}
for name, values in json.load(sys.stdin).items():
    try:
        rendered[name] = chart.render(values, name="deltaworks", namespace="serving")
    except helm_python.HelmError as error:
        errors[name] = str(error)
lint = helm_python.lint(sys.argv[1], strict=True, kube_version="v1.30.0")
json.dump({"rendered": rendered, "errors": errors, "lint": lint}, sys.stdout)
"""
Objects = list[dict[str, Any]]


@pytest.fixture(scope="session")
def helm() -> dict[str, Any]:
    """What Helm says: `rendered` template -> text for each of VALUES, `errors` for each of REFUSED, `lint`."""
    values = VALUES | {name: refused for name, (refused, _) in REFUSED.items()}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(CHART)],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, Any] = json.loads(run.stdout)
    assert set(said["rendered"]) == set(VALUES), said["errors"]
    return said


def read(text: str) -> Objects:
    return [thing for thing in yaml.safe_load_all(text) if thing]


def plain(folder: str) -> Objects:
    """The manifests that a kustomization lists, as they are in the files."""
    resources = yaml.safe_load((DEPLOY / "k8s" / folder / "kustomization.yaml").read_text())["resources"]
    return [thing for name in resources for thing in read((DEPLOY / "k8s" / folder / name).read_text())]


@pytest.fixture(scope="session")
def objects(helm: dict[str, Any]) -> Callable[[str], Objects]:
    """The objects of a source: one of VALUES, or "manifests", those of deploy/k8s."""

    def of(source: str) -> Objects:
        if source == "manifests":
            return plain("base") + plain("components/monitoring")
        rendered = helm["rendered"][source]
        return [thing for name in sorted(rendered) if name.endswith(".yaml") for thing in read(rendered[name])]

    return of


SOURCES = (*VALUES, "manifests")
