"""Labelling begins before the server does: it is waited for, so long, and only until it has answered once."""

import asyncio
import json
import threading
from pathlib import Path

import pytest

from steering.errors import EndpointError
from steering.gate.endpoint import Endpoint
from steering.gate.labels import read_labels
from tests.steering.chat_server import ChatServer, serving, task
from tests.steering.gate_world import gate

LOADING = json.dumps({"error": {"message": "the model is still loading", "code": "loading"}})


def label(port: int, folder: Path, wait_s: int) -> int:
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task(f"q{i}", i, 1)) + "\n" for i in range(3)))
    where = ("--base-url", f"http://127.0.0.1:{port}/v1", "--model", "tiny", "--wait", wait_s)
    return gate("label", folder / "tasks.jsonl", "-o", folder / "labels.jsonl", "--k", 1, *where)


@pytest.mark.slow
def test_a_server_that_loads_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as chat:
        chat.fail = lambda index, body: (503, LOADING) if index <= 3 else None  # once to each task
        assert label(int(chat.url.rpartition(":")[2]), tmp_path, wait_s=60) == 0
    assert len(read_labels(tmp_path / "labels.jsonl").rows) == 3
    assert capsys.readouterr().err.count(f"left: {chat.url}/v1/chat/completions: status 503: {LOADING}") == 1


@pytest.mark.slow
def test_a_server_that_does_not_listen_yet_is_waited_for() -> None:
    """It starts when it is told of, and is loading then."""
    chat = ChatServer()
    chat.fail = lambda index, body: (503, LOADING) if index == 1 else None
    with serving() as other:
        port = int(other.url.rpartition(":")[2])
    waited_for, answered = threading.Event(), threading.Event()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        waited_for.set()

    def start() -> None:
        assert waited_for.wait(60)
        with serving(chat, port):
            answered.wait(60)

    async def ask() -> str:
        async with Endpoint(f"{other.url}/v1", patience_s=(), start_s=60, tell=tell) as endpoint:
            return (await endpoint.chat({"messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 50})).text

    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert asyncio.run(ask()).endswith("The answer is 2.")
    finally:
        answered.set()
        thread.join()
    assert len(chat.requests) == 2
    (said,) = told
    assert said.startswith(f"waiting for the server to start, 60 s left: {other.url}/v1")


@pytest.mark.slow
@pytest.mark.parametrize("loading", [True, False])
def test_the_wait_ends(loading: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as chat:
        chat.fail = lambda index, body: (503, LOADING)
        port = int(chat.url.rpartition(":")[2])
        if loading:
            assert label(port, tmp_path, wait_s=1) == 1
    if not loading:
        assert label(port, tmp_path, wait_s=1) == 1
    said = capsys.readouterr().err
    assert "error: the server has not started within 1 s: http://127.0.0.1" in said
    assert ("status 503: " + LOADING in said) == loading
    assert not (tmp_path / "labels.jsonl").exists()


@pytest.mark.parametrize("status", [200, 400])
def test_a_server_that_has_answered_has_started(status: int) -> None:
    async def ask() -> None:
        async with Endpoint(f"{chat.url}/v1", patience_s=(), start_s=60) as endpoint:
            body = {"messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 5}
            if status == 200:
                await endpoint.chat(body)
            else:
                with pytest.raises(EndpointError, match="status 400"):
                    await endpoint.chat(body)
            await endpoint.chat(body)

    with serving() as chat:
        chat.fail = lambda index, body: (503, "busy") if index > 1 else (400, "") if status == 400 else None
        with pytest.raises(EndpointError, match="status 503: busy"):
            asyncio.run(ask())
