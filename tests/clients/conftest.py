"""One server with the demo's deltas, and clients that are installed in environments of their own (`make test-clients`)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.child import child_server

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
CACHE = Path(os.environ.get("DELTAWORKS_CLIENTS", ROOT / ".clients"))
DELTAS = ("captain", "json")
NPM = ("openai@6", "ai@6", "@ai-sdk/openai-compatible@2", "zod@4")
_TIMEOUT_S = 600


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the server's /v1; models `base`, `captain`, `json`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAWORKS__SERVER__TOKENIZER_INFO", "true")  # lm-eval asks
        arguments = ["--served-name", "base", "--max-model-len", "2048", "--kv-cache-bytes", str(256 << 20)]
        with child_server(tmp_path_factory.mktemp("server"), arguments) as child:
            child.wait_ready(_TIMEOUT_S)
            with httpx.Client(base_url=child.url, headers=child.admin_headers, timeout=120) as admin:
                for name in DELTAS:
                    data = (ROOT / "deploy" / "demo" / f"{name}.safetensors").read_bytes()
                    form = {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
                    admin.post("/v1/admin/deltas", data=form, files={"file": (name, data)}).raise_for_status()
            yield f"{child.url}/v1"


@pytest.fixture(scope="session")
def installed() -> Callable[..., Path]:
    """`installed(name, *requirements)`: the bin folder of an environment with these, made where the cache has none.

    `beside`: it also sees the packages of this environment, so that what needs torch does not bring another.
    """

    def installed(name: str, *requirements: str, beside: bool = False) -> Path:
        folder = CACHE / name
        done = folder / "requirements.txt"
        if not done.exists() or done.read_text() != "\n".join(requirements):
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
            if beside:
                site = next(folder.glob("lib/python*/site-packages"))
                (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin/python")]
            _run([*pip, "install", "--quiet", *requirements])
            done.write_text("\n".join(requirements))
        return folder / "bin"

    return installed


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """`node(program, url)`: run one of the programs for Node.js; returns the JSON that it prints."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = CACHE / "npm"
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != "\n".join(NPM):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        _run(["npm", "install", "--no-audit", "--no-fund", *NPM], cwd=folder)
        done.write_text("\n".join(NPM))

    def run(program: str, url: str) -> Any:
        shutil.copy(PROGRAMS / program, folder)  # modules are looked for beside the program
        return json.loads(_run(["node", program, url], cwd=folder))

    return run


@pytest.fixture(scope="session")
def python() -> Callable[..., Any]:
    """`python(bin folder, program, url)`: run one of the programs; returns the JSON that it prints."""

    def run(folder: Path, program: str, url: str) -> Any:
        return json.loads(_run([str(folder / "python"), str(PROGRAMS / program), url]))

    return run


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    return _run


def _run(command: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """What the command prints; a failure shows the end of it."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{command[:4]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
