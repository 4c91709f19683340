"""schemathesis asks a server whatever the API's document allows, and what it forbids; schemathesis.toml has the exceptions.

`SCHEMATHESIS_EXAMPLES=1000 pytest tests/server/test_schemathesis.py` asks more and differently every time.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import ADMIN

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.mark.slow
def test_every_check_of_schemathesis_holds(live: Any) -> None:
    for name in ("red", "blue"):
        query = {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        url = f"{live.url}/v1/admin/deltas"
        assert httpx.post(url, params=query, content=name.encode(), headers=ADMIN).status_code == 201
    examples = os.environ.get("SCHEMATHESIS_EXAMPLES")
    asked = ["--max-examples", examples] if examples else ["--generation-deterministic", "--seed", "1"]
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", "--no-color", *asked]
    done = subprocess.run([*command, f"{live.url}/openapi.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert live.wait_idle()
