"""Two servers on one store, a folder or a bucket: one sees what the other did, and of two changes one wins."""

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.artifacts.bucket import Bucket
from server.artifacts.store import Store
from server.config import Settings
from tests.server.conftest import ADMIN, ByteTokenizer, FakeEngine, House
from tests.server.s3_server import BUCKET, S3Server, running_s3

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

DELTAS = "/v1/admin/deltas"
OpenStore = Callable[[], Store]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the same place again and again, as servers of one machine do."""
    stores: list[Store] = []

    def open_store() -> Store:
        if request.param == "folder":
            stores.append(Store(tmp_path / "store"))
        else:
            url = request.getfixturevalue("s3").url
            stores.append(Store(Bucket(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "cache", url)))
        stores[-1].open()
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


class Server:
    """A house with its admin's client."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.house = House(FakeEngine(), store, settings, ByteTokenizer())
        self.http = self.house.client(ADMIN)
        self.store = store

    async def upload(self, name: str, content: bytes, **query: str) -> httpx.Response:
        query = {"name": name, "sha256": hashlib.sha256(content).hexdigest(), **query}
        return await self.http.post(DELTAS, params=query, content=content)

    async def move(self, name: str, digest: str, expected: int) -> httpx.Response:
        body = {"digest": digest, "expected_generation": expected}
        return await self.http.put(f"{DELTAS}/{name}/alias", json=body)

    async def card(self, name: str) -> dict[str, Any]:
        card: dict[str, Any] = (await self.http.get(f"{DELTAS}/{name}")).json()
        return card

    async def ask(self, model: str) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": model, "prompt": "a"})

    async def until(self, seen: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not await seen():
                await asyncio.sleep(0.02)


@pytest.fixture
async def servers(open_store: OpenStore, settings: Settings) -> AsyncGenerator[tuple[Server, Server], None]:
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"refresh_s": 0.05})})
    async with AsyncExitStack() as stack:
        pair = []
        for _ in range(2):
            server = Server(open_store(), settings)
            await server.house.gateway.start()
            stack.push_async_callback(server.house.gateway.stop)
            pair.append(await stack.enter_async_context(_Open(server)))
        yield pair[0], pair[1]


class _Open:
    def __init__(self, server: Server) -> None:
        self.server = server

    async def __aenter__(self) -> Server:
        return self.server

    async def __aexit__(self, *error: object) -> None:
        await self.server.http.aclose()


async def test_what_one_server_does_the_other_serves(servers: tuple[Server, Server]) -> None:
    one, two = servers
    first, second = b"first", b"second"
    digests = [hashlib.sha256(content).hexdigest() for content in (first, second)]
    assert (await one.upload("red", first)).status_code == 201

    async def served() -> bool:
        return (await two.ask("red")).status_code == 200

    await two.until(served)
    assert (await two.ask("red")).json()["gateway"]["delta_digest"] == digests[0]
    assert two.store.object_path(digests[0]).read_bytes() == first

    assert (await two.upload("red", second)).status_code == 201

    async def moved() -> bool:
        return (await one.ask("red")).json()["gateway"]["delta_digest"] == digests[1]

    await one.until(moved)
    assert (await one.move("red", digests[0], 2)).status_code == 200
    assert (await two.move("red", digests[0], 2)).status_code == 409  # whether or not it has heard of the move

    await two.http.post(f"{DELTAS}/red/pin")

    async def pinned() -> bool:
        return one.house.context.pool.pinned(digests[0])

    await one.until(pinned)
    assert (await one.http.delete(f"{DELTAS}/red")).status_code == 204

    async def gone() -> bool:
        return (await two.ask("red")).status_code == 404

    await two.until(gone)
    assert (await two.card("red"))["error"]["code"] == "delta_not_found"
    assert not two.house.context.pool.pinned(digests[0])
    await two.until(lambda: _holds(lambda: not two.house.context.pool.residents()))
    assert (await two.upload("red", first)).json()["generation"] == 1


async def _holds(condition: Callable[[], bool]) -> bool:
    return condition()


async def test_a_profile_of_the_other_server_steers(servers: tuple[Server, Server]) -> None:
    one, two = servers
    content = b'{"model_name": "a"}'
    query = {"name": "p", "sha256": hashlib.sha256(content).hexdigest()}
    assert (await one.http.post("/v1/admin/profiles", params=query, content=content)).status_code == 201
    body = {"model": "tiny-base", "prompt": "a", "steering": {"profile": "p", "direction": "use_context"}}
    await two.until(partial(_steers, two, body))
    assert two.store.object_path(query["sha256"]).read_bytes() == content


async def _steers(server: Server, body: dict[str, Any]) -> bool:
    return (await server.http.post("/v1/completions", json=body)).status_code == 200


async def test_r17_of_racing_admins_one_wins_and_the_others_change_nothing(servers: tuple[Server, Server]) -> None:
    digests = [(await servers[0].upload("red", bytes([65 + n]) * 9)).json()["digest"] for n in range(6)]
    generation = 6
    draw = random.Random(17)
    for _ in range(5):
        targets = draw.sample([digest for digest in digests if digest != digests[-1]], 4)
        moves = [servers[n % 2].move("red", target, generation) for n, target in enumerate(targets)]
        answers = await asyncio.gather(*moves)
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
        (winner,) = [target for target, answer in zip(targets, answers, strict=True) if answer.status_code == 200]
        generation += 1
        for server in servers:
            await server.until(partial(_points, server, winner, generation))
        codes = {answer.json()["error"]["code"] for answer in answers if answer.status_code == 409}
        assert codes == {"delta_generation_mismatch"}
        digests.remove(winner)
        digests.append(winner)
    assert len((await servers[0].card("red"))["versions"]) == 6


async def _points(server: Server, digest: str, generation: int) -> bool:
    card = await server.card("red")
    return (card["digest"], card["generation"]) == (digest, generation)


async def test_uploads_of_one_name_through_both_servers_are_all_there(servers: tuple[Server, Server]) -> None:
    contents = [f"version {n}".encode() for n in range(12)]

    async def upload(n: int) -> int:
        while (answer := await servers[n % 2].upload("red", contents[n])).status_code == 429:
            await asyncio.sleep(0.01)
        return answer.status_code

    assert await asyncio.gather(*(upload(n) for n in range(12))) == [201] * 12
    stored = sorted(hashlib.sha256(content).hexdigest() for content in contents)
    for server in servers:
        await server.until(partial(_has, server, stored))
    assert servers[1].store.objects() == stored


async def _has(server: Server, digests: list[str]) -> bool:
    return sorted(version["digest"] for version in (await server.card("red"))["versions"]) == digests


async def test_no_name_ever_lacks_its_bytes_while_servers_upload_and_delete(
    servers: tuple[Server, Server], open_store: OpenStore
) -> None:
    """Four admins share few contents between few names, so that uploads meet deletions of the same object."""
    contents = [f"shared {n}".encode() for n in range(3)]

    async def admin(number: int) -> None:
        draw, server = random.Random(number), servers[number % 2]
        for _ in range(12):
            name, content = draw.choice("ab"), draw.choice(contents)
            if draw.random() < 0.6:
                answer = await server.upload(name, content)
                assert answer.status_code in (200, 201, 429), answer.text
            else:
                answer = await server.http.delete(f"{DELTAS}/{name}?drain=true")
                assert answer.status_code in (204, 404, 409, 429), answer.text

    await asyncio.gather(*(admin(number) for number in range(4)))
    late = Server(open_store(), servers[0].house.settings)  # its start fails where a name lacks its object
    await late.house.gateway.start()
    for card in (await late.http.get(DELTAS)).json()["data"]:
        for version in card["versions"]:
            late.store.fetch(version["digest"])
            assert late.store.object_path(version["digest"]).read_bytes() in contents
    await late.http.aclose()
    await late.house.gateway.stop()
