"""The chart and the plain manifests, offline: valid, alike, and what the server expects of its cluster."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from prometheus_client import CollectorRegistry

from server.app import PUBLIC, ROUTES
from server.config import ENV_PREFIX, load_settings
from server.telemetry import Telemetry
from tests.deploy.conftest import CHART, DEPLOY, REFUSED, SOURCES, Objects, plain, read

OTHERS = {"ServiceMonitor"}  # of the Prometheus operator
Of = Callable[[str], Objects]


def only(objects: Objects, kind: str, name: str = "deltaworks") -> dict[str, Any]:
    found = [thing for thing in objects if thing["kind"] == kind and thing["metadata"]["name"] == name]
    assert len(found) == 1, (kind, name, len(found))
    return found[0]


def pods(objects: Objects) -> list[dict[str, Any]]:
    """Specs of all pods that the objects make."""
    found = [thing["spec"]["template"]["spec"] if thing["kind"] == "Deployment" else thing["spec"]
             for thing in objects if thing["kind"] in ("Deployment", "Pod")]  # fmt: skip
    assert found
    return found


def gateway(objects: Objects) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gateway's pod and its one container."""
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def test_chart_lints(helm: dict[str, Any]) -> None:
    assert helm["lint"]["errors"] == []
    assert [found for found in helm["lint"]["messages"] if found["severity"] > 1] == []


@pytest.mark.parametrize(("version", "sources"), [("1.30", SOURCES), ("1.37", ("everything", "manifests"))])
def test_every_object_is_valid(objects: Of, version: str, sources: tuple[str, ...]) -> None:
    checked = {}
    for source in sources:
        for thing in objects(source):
            if thing["kind"] not in OTHERS:
                checked[json.dumps(thing, sort_keys=True)] = thing
    assert len(checked) > 15
    for thing in checked.values():
        kubernetes_validate.validate(thing, version, strict=True)


def test_a_misspelt_field_is_found(objects: Of) -> None:
    broken = copy.deepcopy(only(objects("default"), "Deployment"))
    broken["spec"]["template"]["spec"]["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="securityContexts"):
        kubernetes_validate.validate(broken, "1.30", strict=True)


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_are_refused(helm: dict[str, Any], name: str) -> None:
    assert REFUSED[name][1] in helm["errors"][name]
    assert "canary" not in helm["errors"][name]


def test_plain_manifests_are_the_chart_with_keys(objects: Of) -> None:
    def bare(things: Objects) -> dict[str, dict[str, Any]]:
        """Without what only Helm has a use for."""
        found = {}
        for thing in copy.deepcopy(things):
            template = thing["spec"]["template"]["metadata"] if thing["kind"] == "Deployment" else {}
            for metadata in (thing["metadata"], template):
                metadata.pop("annotations", None)
                for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
                    metadata.get("labels", {}).pop(label, None)
            found[f"{thing['kind']}/{thing['metadata']['name']}"] = thing
        return found

    assert bare(plain("base")) == bare([thing for thing in objects("plain") if thing["kind"] != "Pod"])
    everything = bare(objects("everything"))["ServiceMonitor/deltaworks"]
    del everything["metadata"]["labels"]["release"]
    assert bare(plain("components/monitoring"))["ServiceMonitor/deltaworks"] == everything


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_base_and_overlay() -> None:
    def build(folder: str) -> Objects:
        run = subprocess.run(["kubectl", "kustomize", DEPLOY / "k8s" / folder], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")
        return read(run.stdout)

    base = build("base")
    assert {thing["kind"] for thing in base} == {thing["kind"] for thing in plain("base")}
    overlay = build("overlays/gpu")
    assert only(overlay, "ServiceMonitor")
    _, container = gateway(overlay)
    assert container["image"] == "deltaworks:gpu"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    kubernetes_validate.validate(only(overlay, "Deployment"), "1.30", strict=True)


@pytest.mark.parametrize("source", SOURCES)
def test_s10_non_root(objects: Of, source: str) -> None:
    for pod in pods(objects(source)):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert min(context["runAsUser"], context["runAsGroup"], context["fsGroup"]) >= 10_000


@pytest.mark.parametrize("source", SOURCES)
def test_s10_read_only_root_file_system(objects: Of, source: str) -> None:
    for pod in pods(objects(source)):
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
    pod, container = gateway(objects(source))
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/var/lib/deltaworks", "/tmp", "/dev/shm"}
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


@pytest.mark.parametrize("source", SOURCES)
def test_s10_capabilities_dropped_and_none_gained(objects: Of, source: str) -> None:
    for pod in pods(objects(source)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert "privileged" not in context


@pytest.mark.parametrize("source", SOURCES)
def test_s10_no_service_account_token(objects: Of, source: str) -> None:
    for pod in pods(objects(source)):
        assert pod["automountServiceAccountToken"] is False
    assert only(objects(source), "ServiceAccount")["automountServiceAccountToken"] is False
    assert not [thing for thing in objects(source) if "Role" in thing["kind"]]


@pytest.mark.parametrize("source", SOURCES)
def test_s10_seccomp(objects: Of, source: str) -> None:
    for pod in pods(objects(source)):
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("source", SOURCES)
def test_admin_plane_is_closed_unless_somebody_is_named(objects: Of, source: str) -> None:
    things = objects(source)
    policy = only(things, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == only(things, "Deployment")["spec"]["selector"]["matchLabels"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    admin = [rule for rule in policy["ingress"] if [port["port"] for port in rule["ports"]] != ["http"]]
    if source == "everything":
        assert admin == [
            {
                "ports": [{"port": "admin", "protocol": "TCP"}],
                "from": [{"podSelector": {"matchLabels": {"role": "operator"}}}],
            }
        ]
        assert policy["egress"] == [{"ports": [{"port": 443, "protocol": "TCP"}]}]
    else:
        assert (admin, policy["egress"]) == ([], [])


@pytest.mark.parametrize("source", SOURCES)
def test_services_lead_to_the_pods(objects: Of, source: str) -> None:
    things = objects(source)
    _, container = gateway(things)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["DELTAWORKS__SERVER__PORT"] == str(ports["http"])
    assert environment["DELTAWORKS__SERVER__ADMIN_PORT"] == str(ports["admin"])
    labels = only(things, "Deployment")["spec"]["template"]["metadata"]["labels"]
    targets = {}
    for service in [thing for thing in things if thing["kind"] == "Service"]:
        assert service["spec"]["selector"].items() <= labels.items()
        targets[service["metadata"]["name"]] = [port["targetPort"] for port in service["spec"]["ports"]]
    assert targets == {"deltaworks": ["http"], "deltaworks-headless": ["http"], "deltaworks-admin": ["admin"]}
    assert only(things, "Service", "deltaworks-headless")["spec"]["clusterIP"] == "None"
    test_pods = [thing for thing in things if thing["kind"] == "Pod"]
    assert not [pod for pod in test_pods if pod["metadata"]["labels"].items() >= labels.items()]


@pytest.mark.parametrize("source", SOURCES)
def test_probes_and_the_time_to_stop(objects: Of, source: str) -> None:
    pod, container = gateway(objects(source))
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in asked.values()} == {"http"}
    paths = {name: probe["path"] for name, probe in asked.items()}
    assert paths == {
        "startupProbe": "/health/ready",
        "readinessProbe": "/health/ready",
        "livenessProbe": "/health/live",
    }
    assert {(PUBLIC, path) for path in paths.values()} <= {(access, path) for access, _, path, _ in ROUTES}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    running = int(environment["DELTAWORKS__SERVER__SHUTDOWN_TIMEOUT_S"])
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= sleep + running + 20  # the engine's own time to stop


@pytest.mark.parametrize("source", SOURCES)
def test_settings_are_accepted_and_keys_come_from_the_secret(objects: Of, source: str, tmp_path: Path) -> None:
    things = objects(source)
    assert not [thing for thing in things if thing["kind"] == "Secret"]
    pod, container = gateway(things)
    file = tmp_path / "gateway.toml"
    file.write_text(only(things, "ConfigMap")["data"]["gateway.toml"])
    (tmp_path / "keys").write_text("key\n")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    environ = {}
    for entry in container["env"]:
        if entry["name"].startswith(ENV_PREFIX):
            environ[entry["name"]] = entry["value"]
        if entry["name"].endswith("_KEY_FILE"):
            assert Path(entry["value"]).parent == Path(mounts["keys"])
            environ[entry["name"]] = str(tmp_path / "keys")
    settings = load_settings(file, environ, {})
    assert (settings.server.host, settings.server.admin_port) == ("0.0.0.0", 8001)
    assert bool(settings.auth.admin_keys) == ("keys" in mounts) == (source not in ("default", "gpu"))
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert container["args"][0] == "serve"


def test_store_on_a_claim_has_one_server(objects: Of) -> None:
    one, many = only(objects("default"), "Deployment")["spec"], only(objects("everything"), "Deployment")["spec"]
    assert (one["replicas"], one["strategy"]) == (1, {"type": "Recreate"})
    assert only(objects("default"), "PersistentVolumeClaim", "deltaworks-store")
    assert many["strategy"]["type"] == "RollingUpdate"
    assert "replicas" not in many  # the autoscaler's
    assert not [thing for thing in objects("everything") if thing["kind"] == "PersistentVolumeClaim"]


def test_autoscaler_and_disruption_budget(objects: Of) -> None:
    scaler = only(objects("everything"), "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == only(objects("everything"), "Deployment")["metadata"]["name"]
    registry = CollectorRegistry()
    Telemetry(registry).watch_admission(lambda: 0, lambda: 0)
    names = {metric.name for metric in registry.collect()}
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} <= names
    budget = only(objects("default"), "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert (
        budget["selector"]["matchLabels"] == only(objects("default"), "Deployment")["spec"]["selector"]["matchLabels"]
    )


@pytest.mark.parametrize("source", ["everything", "manifests"])
def test_every_pod_is_scraped_once(objects: Of, source: str) -> None:
    monitor = only(objects(source), "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [thing for thing in objects(source) if thing["kind"] == "Service"]
    [scraped] = [service for service in services if wanted <= service["metadata"]["labels"].items()]
    [endpoint] = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in scraped["spec"]["ports"]]
    assert (PUBLIC, endpoint["path"]) in {(access, path) for access, _, path, _ in ROUTES}


def test_notes_tell_what_is_open(helm: dict[str, Any]) -> None:
    notes = {source: helm["rendered"][source]["deltaworks/templates/NOTES.txt"] for source in helm["rendered"]}
    assert "Inference is open to everybody" in notes["default"]
    assert "The admin plane answers 403" in notes["default"]
    assert "lets nobody reach the admin plane" in notes["plain"]
    assert "for those whom networkPolicy.adminFrom names" in notes["everything"]
    assert (CHART / "values.schema.json").is_file()
