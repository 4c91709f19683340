"""`deltaworks serve` from the outside: refusals at the start, and a process that comes up and goes down cleanly."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from compressors.base import default_base
from server.cli import main
from server.config import ServerSettings
from server.serve import _listening

pytestmark = pytest.mark.slow  # waits, processes and servers of its own


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., int]:
    def serve(*arguments: str) -> int:
        return main(["serve", "--store", str(tmp_path / "store"), "--port", "0", *arguments])

    return serve


def test_port_in_use(serve: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve("--port", str(port)) == 1
    assert f"error: port {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_admin_port_in_use(serve: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve("--admin-port", str(port)) == 1
    assert f"error: port {port} on 127.0.0.1 is in use; choose another with --admin-port" in capsys.readouterr().err


def test_s9_only_this_machine_is_listened_to_unless_told() -> None:
    for host, changes in (("127.0.0.1", {}), ("0.0.0.0", {"host": "0.0.0.0"})):
        settings = ServerSettings.model_validate({"port": 0, "admin_port": 0, **changes})
        with _listening(settings) as listeners:
            assert [listener.getsockname()[0] for listener in listeners] == [host] * 2


def test_what_is_sent_leaves_at_once() -> None:
    """A connection's small writes are not held back until the client has acknowledged the one before."""
    with _listening(ServerSettings(port=0)) as (listener,), socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_store_that_cannot_be_used(
    serve: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file")
    assert serve() == 1
    assert "error: cannot use the store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "has no tokenizer"),
    ],
)
def test_folder_that_is_no_model(
    serve: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    files: dict[str, str],
    message: str,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert serve(str(folder)) == 1
    assert message in capsys.readouterr().err


def test_tool_template_that_is_not_there(
    serve: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAWORKS__TOOLS__TEMPLATE", "hermse")
    assert serve(str(default_base(progress=False))) == 1
    assert "error: tools.template 'hermse' is none of auto, own, hermes" in capsys.readouterr().err


def test_print_config_shows_flags_and_starts_nothing(
    serve: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert serve("--dtype", "float32", "--print-config") == 0
    printed = capsys.readouterr().out
    assert 'dtype = "float32"' in printed
    assert not (tmp_path / "store").exists()


def test_s7_no_secret_in_print_config_or_in_what_refuses_settings(
    serve: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("# users\ncanary-in-a-file\n")
    monkeypatch.setenv("DELTAWORKS__AUTH__API_KEYS", "canary-api, canary-second")
    monkeypatch.setenv("DELTAWORKS__AUTH__ADMIN_KEYS", "canary-admin")
    keys = ("--api-key-file", str(tmp_path / "keys"), "--admin-key-file", str(tmp_path / "keys"))
    assert serve(*keys, "--print-config") == 0
    printed = capsys.readouterr().out
    assert "canary" not in printed
    assert printed.count('"**********"') == 5
    for name in ("AUTH__ADMIN_KEYZ", "AUTH__ADMIN_KEY_FILE__X", "ENGINE__VLLM__HF_TOKEN"):
        with monkeypatch.context() as patch:
            patch.setenv(f"DELTAWORKS__{name}", "canary-misplaced")
            assert serve("--print-config") == 1
        said = capsys.readouterr()
        assert "error: " in said.err
        assert "canary" not in said.out + said.err


def test_bad_setting_is_one_line(
    serve: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAWORKS__SERVER__PROT", "1")
    assert serve() == 1
    assert capsys.readouterr().err == "error: unknown setting 'server.prot' (did you mean 'port'?)\n"


PROGRAM = """
import asyncio, sys
from pathlib import Path
from server import serve
from server.artifacts.checks import Checks
from server.artifacts.store import Store
from server.config import load_settings
from server.core import FinishReason, TokenEvent
from server.engine.base import EngineError
from server.key_files import KeyFiles
from server.wiring import Base, wire

class Tokenizer:
    vocab_size, chat_template, own_tool_template = 256, "", ""
    def encode(self, text, add_special_tokens): return list(text.encode())

class Engine:
    max_model_len, dead, dtype, busy, signs = 64, False, "float32", False, 0
    def watch(self, observe): ...
    def own_metrics(self): return ()
    async def start(self):
        if sys.argv[2] == "fail": raise EngineError("no such weights")
        while not Path(sys.argv[1], "go").exists(): await asyncio.sleep(0.01)
    async def stop(self): print("engine stopped", flush=True)
    async def generate(self, request_id, ids, sampling, delta, salt, edit):
        for step in range(5):
            while step and Path(sys.argv[1], "hold").exists(): await asyncio.sleep(0.01)
            yield TokenEvent(0, "x", (1,), None, FinishReason.STOP if step == 4 else None, 1, 0)

store = Store(Path(sys.argv[1], "store"))
keys = Path(sys.argv[1], "keys")
def load(): return load_settings(None, {}, {"auth": {"api_key_file": keys}} if keys.exists() else {})
settings = load()
ports = {"port": 0, "admin_port": 0 if sys.argv[2] == "split" else None}
with serve._listening(settings.server.model_copy(update=ports)) as listeners:
    store.open()
    context, known = wire(settings, store, Base("b", "f"), Engine(), Tokenizer(), Checks(None, None, None, None))
    app = serve._app(context, known, listeners)
    key_files = KeyFiles(known, settings.auth, lambda: load().auth, context.telemetry.key_reloads)
    status = asyncio.run(serve._run(app, context.gateway, listeners, settings.server, key_files))
    store.close()
sys.exit(status)
"""


@pytest.fixture
def process(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    if request.param == "keys":
        (tmp_path / "keys").write_text("one\n")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def first_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "the model is loading" in line
    return line.split()[2].rstrip(",")


def until(url: str, status: int) -> dict[str, str]:
    deadline = time.monotonic() + 10
    while True:
        response = httpx.get(url)
        if response.status_code == status:
            body: dict[str, str] = response.json()
            return body
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("process", ["load"], indirect=True)
def test_r11_up_while_loading_then_ready_then_drained(process: subprocess.Popen[str], tmp_path: Path) -> None:
    """After SIGTERM: not ready and 503 at once, while the running stream ends as it would have; then exit 0."""
    url = first_url(process)
    assert until(f"{url}/health/live", 200) == {"status": "alive"}
    assert until(f"{url}/health/ready", 503) == {"status": "loading"}
    for file in ("go", "hold"):
        (tmp_path / file).touch()
    until(f"{url}/health/ready", 200)
    body = {"model": "b", "prompt": "a", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        assert until(f"{url}/health/ready", 503) == {"status": "draining"}
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/health/live").status_code == 200
        (tmp_path / "hold").unlink()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0
    assert out.endswith("engine stopped\n")
    records = [json.loads(line) for line in err.splitlines()]
    assert [record["status"] for record in records if record.get("route") == "/v1/completions"] == [503, 200]


@pytest.mark.parametrize("process", ["load"], indirect=True)
def test_r11_what_runs_on_past_the_time_is_cut_with_a_second_signal(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    url = first_url(process)
    for file in ("go", "hold"):
        (tmp_path / file).touch()
    until(f"{url}/health/ready", 200)
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "b", "prompt": "a", "stream": True}) as response:
        next(response.iter_lines())
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        out, _ = process.communicate(timeout=10)
    assert (process.returncode, out.endswith("engine stopped\n")) == (0, True)


@pytest.mark.parametrize("process", ["split"], indirect=True)
def test_s4_admin_plane_on_its_own_port(process: subprocess.Popen[str], tmp_path: Path) -> None:
    url = first_url(process)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("admin plane on http://127.0.0.1:")
    admin = said.split()[-1]
    (tmp_path / "go").touch()
    for there in (url, admin):
        until(f"{there}/health/ready", 200)
        assert httpx.get(f"{there}/health/live", headers={"x": "y" * 70_000}).status_code == 431
    host = {"host": admin.removeprefix("http://"), "x-forwarded-port": admin.rpartition(":")[2]}
    assert httpx.get(f"{url}/v1/admin/status", headers=host).json()["error"]["code"] == "route_not_found"
    assert httpx.get(f"{admin}/v1/admin/status").json()["error"]["code"] == "admin_disabled"
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.get(f"{admin}/v1/models").json()["error"]["code"] == "route_not_found"


@pytest.mark.parametrize("process", ["keys"], indirect=True)
def test_keys_are_read_again_on_sighup(process: subprocess.Popen[str], tmp_path: Path) -> None:
    url = first_url(process)

    def models(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    def told(outcome: str) -> None:
        line = f'deltaworks_key_reloads_total{{outcome="{outcome}"}} 1.0'
        deadline = time.monotonic() + 10
        process.send_signal(signal.SIGHUP)
        while line not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    until(f"{url}/health/live", 200)
    assert (models("one"), models("two")) == (200, 401)
    (tmp_path / "new").write_text("two\n")
    (tmp_path / "new").replace(tmp_path / "keys")
    told("ok")
    assert (models("one"), models("two")) == (401, 200)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert process.wait(10) == 0


@pytest.mark.parametrize("process", ["load"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_loading_stops_the_engine_too(
    process: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    until(f"{first_url(process)}/health/ready", 503)
    process.send_signal(number)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "engine stopped\n")


@pytest.mark.parametrize("process", ["fail"], indirect=True)
def test_engine_that_cannot_start_ends_the_server(process: subprocess.Popen[str]) -> None:
    first_url(process)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "error: no such weights" in err
    assert out == "engine stopped\n"


def test_commands_of_the_other_houses_join(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["delta", "--help"])
    assert "usage: deltaworks delta" in capsys.readouterr().out


def test_default_base_folder_gives_the_served_name() -> None:
    assert default_base(progress=False).name == "smollm2-135m-instruct"
