"""Two replicas on one store: what one is given both serve, a delta has a home, and the end of one costs no client its answer."""

import hashlib
import itertools
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from compressors.artifact import SEAL_KEY, encode_header
from server.engine.base import EngineDelta
from tests.scale.conftest import BASE, START_S, Cluster, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

NAMES = [f"tune-{i}" for i in range(12)]  # so many that both replicas are the home of one
SHARED_S = 10  # the store is read every two seconds


def body(model: str, tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0} | more


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    form = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    return client.post("/v1/admin/deltas", data=form, files={"file": content})


def renamed(content: bytes, number: int) -> bytes:
    """The same delta with another digest."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {key: text for key, text in header["__metadata__"].items() if key != SEAL_KEY}
    header["__metadata__"]["number"] = str(number)
    head = encode_header(header)
    return len(head).to_bytes(8, "little") + head + content[8 + length :]


def text_of(url: str, model: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=body(model), timeout=120)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.fixture(scope="session")
def contents(tiny_deltas: list[EngineDelta]) -> list[bytes]:
    return [Path(delta.path).read_bytes() for delta in tiny_deltas]


@pytest.fixture(scope="session")
def texts(cluster: Cluster, contents: list[bytes]) -> list[str]:
    """What the base and each delta answer. Uploaded through the first replica, asked of the second."""
    first, second = cluster.replicas
    with cluster.admin(first) as admin:
        for name, content in zip(NAMES, itertools.cycle(contents), strict=False):
            answer = upload(admin, name, content)
            assert answer.status_code == 201, answer.text
    uploaded = time.monotonic()
    until(lambda: served(second) >= {BASE, *NAMES}, SHARED_S)
    print(f"served by the other replica after {time.monotonic() - uploaded:.1f} s")
    return [text_of(second, model) for model in (BASE, *NAMES[:3])]


def served(url: str) -> set[str]:
    return {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]}


def test_what_one_replica_is_given_both_serve(cluster: Cluster, texts: list[str]) -> None:
    assert len(set(texts)) == 4
    for url in (*cluster.replicas, cluster.url):
        assert [text_of(url, model) for model in (BASE, *NAMES[:3])] == texts


def test_a_delta_has_one_home_and_the_base_none(cluster: Cluster, texts: list[str]) -> None:
    def home(model: str) -> str:
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body(model, 2), timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-replica-id"]

    with ThreadPoolExecutor(4) as pool:
        homes = {name: set(pool.map(home, [name] * 4)) for name in NAMES}
        assert {len(found) for found in homes.values()} == {1}
        both = set().union(*homes.values())
        assert len(both) == 2
        assert set(pool.map(home, [BASE] * 24)) == both
        assert set(pool.map(home, [f"{BASE}:{NAMES[0]}", f"{NAMES[0]}@1"])) == homes[NAMES[0]]
    with cluster.admin() as admin:
        loaded = admin.post(f"/v1/admin/deltas/{NAMES[5]}/load")
    assert {loaded.headers["x-replica-id"]} == homes[NAMES[5]]


def test_tokens_stream_through_the_proxy_and_a_client_that_leaves_ends_its_row(
    cluster: Cluster, texts: list[str]
) -> None:
    def rows() -> int:
        found = [admin.get("/v1/admin/status").json()["rows_in_flight"] for admin in (first, second)]
        return sum(found)

    with (
        cluster.admin(cluster.replicas[0]) as first,
        cluster.admin(cluster.replicas[1]) as second,
        httpx.Client(base_url=cluster.url, timeout=120) as http,
    ):
        asked = body(NAMES[0], 480, stream=True, ignore_eos=True)
        with http.stream("POST", "/v1/completions", json=asked) as reply:
            lines = reply.iter_lines()  # held: httpx closes the connection with the iterator
            assert next(lines).startswith("data: {")
            assert rows() == 1
        until(lambda: rows() == 0, 20)
        with http.stream("POST", "/v1/completions", json=body(NAMES[0], 8, stream=True, ignore_eos=True)) as reply:
            events = [line for line in reply.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 8


@dataclass
class Load:
    """Clients that try again after a 503 or a stream that broke, and what they saw."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answered: list[str] = field(default_factory=list)  # models
    refused: list[httpx.Response] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # codes of error events
    odd: list[str] = field(default_factory=list)  # anything else that a client saw
    longest_s: float = 0.0

    def ask_on(self, number: int) -> None:
        """One client, until it is stopped; the models go round."""
        with httpx.Client(base_url=self.url, timeout=120) as http:
            for model in itertools.islice(itertools.cycle([BASE, *NAMES]), number, None):
                if self.stop.is_set():
                    return
                started = time.monotonic()
                while not self.once(http, body(model, 16, stream=number % 2 == 0, ignore_eos=True)):
                    time.sleep(0.5)
                self.answered.append(model)
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                time.sleep(0.1)  # the replica that starts wants the core too

    def once(self, http: httpx.Client, asked: dict[str, Any]) -> bool:
        try:
            answer = http.post("/v1/completions", json=asked)
        except httpx.TransportError as error:
            self.odd.append(repr(error))
            return False
        if answer.status_code == 503:
            self.refused.append(answer)
            return False
        if answer.status_code != 200:
            self.odd.append(answer.text)
            return False
        if not asked["stream"]:
            return True
        frames = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        failed = [json.loads(frame)["error"]["code"] for frame in frames if '"error"' in frame]
        self.broken += failed
        if frames[-1] != "[DONE]":
            self.odd.append(f"a stream without an end: {frames[-1]}")
        return not failed


def uploads(cluster: Cluster, contents: list[bytes], load: Load, acknowledged: dict[str, int]) -> None:
    """Names in turn, each tried until it is acknowledged."""
    with cluster.admin() as admin:
        for number in itertools.count(1):
            while True:
                if load.stop.is_set():
                    return
                answer = upload(admin, f"up-{number}", renamed(contents[number % 3], number))
                if answer.status_code in (200, 201):
                    acknowledged[f"up-{number}"] = number % 3
                    time.sleep(0.5)
                    break
                load.refused.append(answer) if answer.status_code == 503 else load.odd.append(answer.text)
                time.sleep(0.5)


@pytest.fixture(scope="module")
def killed(cluster: Cluster, contents: list[bytes], texts: list[str]) -> tuple[Load, dict[str, int]]:
    """One replica is killed under load; the load ends when another has taken its place."""
    load, acknowledged = Load(cluster.url), {}
    clients = [threading.Thread(target=load.ask_on, args=(number,)) for number in range(4)]
    clients.append(threading.Thread(target=uploads, args=(cluster, contents, load, acknowledged)))
    for client in clients:
        client.start()
    try:
        until(lambda: load.odd or (len(load.answered) >= 20 and len(acknowledged) >= 3), 300)
        assert load.odd == []
        before = len(acknowledged)
        victim = cluster.process_of(cluster.replicas[0])
        victim.send_signal(signal.SIGKILL)
        at = time.monotonic()
        until(lambda: not victim.is_running(), 30)
        cluster.wait_replicas()
        print(f"back after {time.monotonic() - at:.1f} s")
        until(lambda: load.odd or len(acknowledged) >= before + 3, 300)
    finally:
        load.stop.set()
        for client in clients:
            client.join(300)
    assert not any(client.is_alive() for client in clients)
    print(f"{len(load.answered)} answers, {len(load.refused)} refused, broken streams: {load.broken}")
    print(f"longest wait of a client, retries included: {load.longest_s:.1f} s; uploads: {len(acknowledged)}")
    return load, acknowledged


def test_a_killed_replica_costs_clients_retried_503s(killed: tuple[Load, dict[str, int]]) -> None:
    load, _ = killed
    assert load.odd == []
    assert load.refused or load.broken  # it was under load
    for answer in load.refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert set(load.broken) <= {"replica_gone"}


def test_no_acknowledged_upload_is_lost(
    cluster: Cluster, killed: tuple[Load, dict[str, int]], texts: list[str]
) -> None:
    _, acknowledged = killed
    assert len(acknowledged) >= 6
    for url in cluster.replicas:
        until(lambda url=url: served(url) >= {BASE, *NAMES, *acknowledged}, SHARED_S)
        for name, number in [*acknowledged.items()][:2] + [*acknowledged.items()][-6:]:
            assert text_of(url, name) == texts[1 + number]


def test_the_replica_that_took_the_place_is_a_home_too(cluster: Cluster, killed: Any, texts: list[str]) -> None:
    answers = [httpx.post(f"{cluster.url}/v1/completions", json=body(name, 2), timeout=120) for name in NAMES]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["x-replica-id"] for answer in answers}) == 2


def test_sigterm_drains_and_leaves_no_process(cluster: Cluster, killed: Any) -> None:
    started = cluster.processes()
    asked = body(NAMES[0], 64, stream=True, ignore_eos=True)
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=asked, timeout=120) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        cluster.child.process.send_signal(signal.SIGTERM)
        rest = [*lines]
    assert rest[-1] == "data: [DONE]"
    assert not any('"error"' in line for line in rest)
    assert cluster.child.process.wait(START_S) == 0
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
