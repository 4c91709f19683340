"""What a gateway meets in production, all at once: askers, leavers, killed clients, uploads and alias moves, health probes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.child import Child

_PROBE_S, _LEAVE_S, _MOVE_S, _KILL_S = 0.05, 0.2, 2.0, 5.0
_TOKENS = 16
_TIMEOUT_S = 120
_MOVING = "moving"  # the delta that is uploaded again and whose alias moves
# A client of another process: it reads until the first chunk of its stream, says so, and goes on until it is killed.
_CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1])
connection.request("POST", "/v1/completions", sys.argv[2], {"content-type": "application/json"})
reply = connection.getresponse()
reply.readline()
print(reply.status, flush=True)
while reply.readline():
    pass
"""
Done = Callable[[], bool]


@dataclass(frozen=True)
class _Version:
    """Of the delta that moves."""

    data: bytes
    digest: str

    @classmethod
    def read(cls, path: Path) -> _Version:
        data = path.read_bytes()
        return cls(data, hashlib.sha256(data).hexdigest())


@dataclass
class Traffic:
    """Asks one gateway, and counts what came of it. `faults` are answers that should not have been, in words."""

    child: Child
    models: Sequence[str]
    deltas: Sequence[Path] = ()  # versions of the delta that moves; two at least, or none
    answered: int = 0
    moved: int = 0
    left: int = 0
    killed: int = 0
    faults: list[str] = field(default_factory=list)
    probe_ms: list[float] = field(default_factory=list)

    async def everything(self, done: Done, clients: int) -> None:
        """All at once until `done`, of askers so many."""
        askers = (self.askers(done, seed) for seed in range(clients))
        await asyncio.gather(*askers, self.leavers(done), self.movers(done), self.killers(done), self.probes(done))

    async def probes(self, done: Done) -> None:
        """Ask for readiness, and take the time."""
        async with self._client() as client:
            while not done():
                started = time.perf_counter()
                await self._asked("readiness", client.get("/health/ready"), (200,))
                self.probe_ms.append(1000 * (time.perf_counter() - started))
                await _pause(_PROBE_S, done)

    async def askers(self, done: Done, seed: int) -> None:
        """One client that asks question after question, streamed or not, of one model after the other."""
        rng = random.Random(seed)
        async with self._client() as client:
            while not done():
                body = self._body(rng, _TOKENS)
                if rng.random() < 0.5:
                    await self._whole(client, body)
                else:
                    await self._streamed(client, body)

    async def leavers(self, done: Done, tokens: int = 256) -> None:
        """Clients that close their stream after a few chunks."""
        rng = random.Random("leavers")
        while not done():
            async with self._client() as client:
                try:
                    async with client.stream("POST", "/v1/completions", json=self._body(rng, tokens, True)) as reply:
                        self._check("a leaver", reply.status_code == 200, reply.status_code)
                        wanted = rng.randint(1, 8)
                        async for line in reply.aiter_lines():
                            wanted -= line.startswith("data: ")
                            if not wanted:
                                break
                except httpx.HTTPError as error:
                    self._check("a leaver", False, repr(error))
            self.left += 1
            await _pause(_LEAVE_S, done)

    async def killers(self, done: Done) -> None:
        """Client processes that are killed in the middle of their stream."""
        rng = random.Random("killers")
        while not done():
            body = httpx.Request("POST", self.child.url, json=self._body(rng, 256, True)).content.decode()
            address = self.child.url.removeprefix("http://")
            said = await asyncio.to_thread(_killed, [sys.executable, "-c", _CLIENT, address, body])
            self._check("a client that is killed", said.strip() == b"200", said)
            self.killed += 1
            await _pause(_KILL_S, done)

    async def movers(self, done: Done) -> None:
        """Upload one version after the other of a delta, move its alias back and forth, ask it, delete what is old."""
        versions = [_Version.read(path) for path in self.deltas]
        async with self._client() as client:
            turn = 0
            while not done():
                first, second = (versions[(turn + i) % len(versions)] for i in range(2))
                generation = await self._uploaded(client, first)
                generation = await self._uploaded(client, second, generation)
                move = {"digest": first.digest, "expected_generation": generation}
                await self._asked("an alias", client.put(f"/v1/admin/deltas/{_MOVING}/alias", json=move), (200,))
                await self._whole(client, self._body(random.Random(turn), _TOKENS) | {"model": _MOVING})
                old = f"/v1/admin/deltas/{_MOVING}/versions/{second.digest}?drain=true"
                await self._asked("a deletion", client.delete(old), (200, 204))
                self.moved += 1
                turn += 1
                await _pause(_MOVE_S, done)

    async def _uploaded(
        self, client: httpx.AsyncClient, version: _Version, generation: int | None = None
    ) -> int | None:
        """The name's generation afterwards."""
        form = {"name": _MOVING, "sha256": version.digest}
        if generation is not None:
            form["expected_generation"] = str(generation)
        sent = client.post("/v1/admin/deltas", data=form, files={"file": ("delta", version.data)})
        reply = await self._asked("an upload", sent, (200, 201))
        return None if reply is None else int(reply.json()["generation"])

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        reply = await self._asked("an answer", client.post("/v1/completions", json=body), (200,))
        if reply is not None:
            self._count(reply.json()["usage"]["completion_tokens"])

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with client.stream("POST", "/v1/completions", json=asked) as reply:
                lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: ")]
        except httpx.HTTPError as error:
            self._check("a stream", False, repr(error))
            return
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        usage = chunks[-1].get("usage") if chunks else None
        whole = reply.status_code == 200 and lines[-1:] == ["[DONE]"] and usage is not None
        self._check("a stream", whole, (reply.status_code, chunks[-1:]))
        if usage is not None:
            self._count(usage["completion_tokens"])

    def _count(self, tokens: int) -> None:
        self._check("an answer", tokens == _TOKENS, f"{tokens} tokens, not {_TOKENS}")
        self.answered += 1

    async def _asked(self, what: str, sent: Any, statuses: tuple[int, ...]) -> httpx.Response | None:
        """The answer; None, and a fault, where it is another or none."""
        try:
            reply: httpx.Response = await sent
        except httpx.HTTPError as error:
            self._check(what, False, repr(error))
            return None
        self._check(what, reply.status_code in statuses, (reply.status_code, reply.text[:200]))
        return reply if reply.status_code in statuses else None

    def _check(self, what: str, right: bool, found: object) -> None:
        if not right:
            self.faults.append(f"{what}: {found}")

    def _body(self, rng: random.Random, tokens: int, stream: bool = False) -> dict[str, Any]:
        prompt = [rng.randrange(1000, 40_000) for _ in range(rng.randint(4, 32))]
        body = {"model": rng.choice(self.models), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        return body | {"stream": True} if stream else body

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.child.url, headers=self.child.admin_headers, timeout=_TIMEOUT_S)


def _killed(command: Sequence[str]) -> bytes:
    """The first line that a process says, which is killed then."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        said: bytes = client.stdout.readline()
        client.kill()
    return said


async def _pause(seconds: float, done: Done) -> None:
    end = time.monotonic() + seconds
    while not done() and (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _PROBE_S))
