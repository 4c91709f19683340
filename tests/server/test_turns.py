"""The order in which requests go to the engine. Time is steps of an engine that gives every row it has a token a step."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.config import Settings
from server.turns import TurnMetrics, Turns

pytestmark = pytest.mark.anyio

PLACES = 8


class Steps:
    """A counter of decode steps that rows wait on."""

    def __init__(self) -> None:
        self.now = 0
        self._next = asyncio.Event()

    async def wait(self) -> None:
        await self._next.wait()

    async def step(self) -> None:
        self.now += 1
        self._next.set()
        self._next = asyncio.Event()
        for _ in range(5):
            await asyncio.sleep(0)


class Line:
    """Requests against `Turns`; remembers who went in which order, and after how many steps and other requests."""

    def __init__(self, max_rows: int = PLACES, max_deltas: int = 8) -> None:
        self.registry = CollectorRegistry()
        self.turns = Turns(max_rows, max_deltas, TurnMetrics(self.registry))
        self.steps = Steps()
        self.order: list[str | None] = []
        self.waited: list[tuple[str | None, int, int]] = []
        self.inside: list[str | None] = []
        self.most_deltas = 0
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, delta: str | None, tokens: int = 4, rows: int = 1, prompt: int = 1) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(self._ask(delta, tokens, rows, prompt)))
        return self.tasks[-1]

    async def _ask(self, delta: str | None, tokens: int, rows: int, prompt: int) -> None:
        asked, before = self.steps.now, len(self.order)
        async with self.turns.turn(delta, rows, prompt) as flow:
            self.waited.append((delta, self.steps.now - asked, len(self.order) - before))
            self.order.append(delta)
            self.inside.append(delta)
            self.most_deltas = max(self.most_deltas, len({one for one in self.inside if one is not None}))
            assert self.turns.rows <= max(self.turns.max_rows, rows)
            for _ in range(tokens):
                await self.steps.wait()
                flow.served(rows)
            self.inside.remove(delta)

    async def run(self, steps: int | None = None) -> None:
        for _ in range(10_000 if steps is None else steps):
            if all(task.done() for task in self.tasks):
                break
            await self.steps.step()
        if steps is None:
            await asyncio.gather(*self.tasks)


async def test_r8_a_delta_with_one_request_does_not_wait_for_the_queue_of_a_hot_one() -> None:
    line = Line()
    for _ in range(200):
        line.ask("hot", tokens=20)
    await line.run(30)
    line.ask("cold", tokens=20)
    await line.run()
    ((_, steps, overtaken),) = [one for one in line.waited if one[0] == "cold"]
    assert steps <= 20  # of one request: first come, first served would have been 200 / 8 * 20 = 500
    assert overtaken == 0


async def test_r8_of_many_cold_deltas_each_waits_for_one_request_of_every_other() -> None:
    line = Line(max_deltas=100)
    for _ in range(200):
        line.ask("hot", tokens=20)
    await line.run(30)
    for number in range(16):
        line.ask(f"cold-{number}", tokens=20)
    await line.run()
    assert max(overtaken for delta, _, overtaken in line.waited if delta != "hot") <= 15
    assert max(steps for delta, steps, _ in line.waited if delta != "hot") <= 2 * 20


async def test_r8_under_a_zipf_load_rare_deltas_wait_no_longer_than_common_ones() -> None:
    """32 deltas, more asked than can be served. Everybody gets the same tokens as long as it asks for them."""
    line, draw = Line(max_deltas=100), random.Random(0)
    weights = [1 / (rank + 1) for rank in range(32)]
    for _ in range(400):
        for delta in draw.choices(range(32), weights, k=2):
            line.ask(f"{delta:02}", tokens=8)
        await line.steps.step()
    await line.run()
    mean = {}
    for delta in ("00", "01", "16", "31"):
        waits = [steps for name, steps, _ in line.waited if name == delta]
        mean[delta] = sum(waits) / len(waits)
    assert mean["31"] < mean["01"] < mean["00"]
    rare = [steps for name, steps, _ in line.waited if int(name or 0) >= 16]
    common = [steps for name, steps, _ in line.waited if int(name or 0) < 2]
    assert max(rare) < max(common) / 2
    assert sorted(rare)[len(rare) * 95 // 100] < sorted(common)[len(common) // 2] / 4


async def test_two_busy_deltas_are_served_the_same_tokens_however_long_their_answers_are() -> None:
    line = Line()
    for number in range(2000):
        line.ask("short", tokens=4, prompt=0)
        if number < 200:
            line.ask("long", tokens=40, prompt=0)
    await line.run(800)
    long, short = (line.order.count(delta) * tokens for delta, tokens in (("long", 40), ("short", 4)))
    assert 0.75 < short / long < 1.33
    for task in line.tasks:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)
    assert (line.turns.rows, line.turns.waiting) == (0, 0)


async def test_r8_a_delta_for_which_the_batch_has_no_room_waits_for_one_to_leave() -> None:
    """Four deltas keep a batch for two busy; none of the others is shut out, and base rows always find room."""
    line = Line(max_deltas=2)
    for number in range(160):
        line.ask(f"hot-{number % 2}", tokens=10)
    await line.run(15)
    late = [line.ask(delta, tokens=10) for delta in ("cold-0", "cold-1", None)]
    await line.run()
    assert line.most_deltas == 2
    assert all(task.done() for task in late)
    waits = {delta: steps for delta, steps, _ in line.waited if delta is None or delta.startswith("cold")}
    assert waits["cold-0"] <= 2 * 10
    assert waits["cold-1"] <= 4 * 10
    assert waits[None] <= 10
    assert line.order.count("hot-0") == line.order.count("hot-1") == 80


async def test_a_large_request_is_not_overtaken_for_ever() -> None:
    line = Line()
    for _ in range(100):
        line.ask("small", tokens=3)
    await line.run(4)
    line.ask("large", rows=PLACES, tokens=3)
    line.ask("larger than all places", rows=3 * PLACES, tokens=3)
    await line.run()
    waits = {delta: steps for delta, steps, _ in line.waited if delta and delta.startswith("large")}
    assert max(waits.values()) <= 4 * 3


async def test_a_request_that_is_cancelled_gives_its_place_back_wherever_it_stands() -> None:
    line = Line(max_rows=1)
    for turns in range(12):
        running, waiting, last = line.ask("a", tokens=1), line.ask("b", tokens=1), line.ask("c", tokens=1)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        if turns % 2:
            running.cancel()
        await line.run(6)
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert last.done()
        assert (line.turns.rows, line.turns.waiting) == (0, 0)


async def test_deltas_that_come_and_go_leave_nothing_behind() -> None:
    line = Line()
    for number in range(300):
        line.ask(f"{number}", tokens=2)
        line.ask("steady", tokens=2)
        await line.steps.step()
    await line.run()
    assert len(line.turns._flows) <= 1
    assert line.registry.get_sample_value("deltaworks_rows_waiting") == 0
    assert line.registry.get_sample_value("deltaworks_queue_duration_seconds_count") == 600


async def test_r8_through_the_gateway(build: Callable[..., Any], settings: Settings) -> None:
    """One place with the engine, a queue of one delta, and one request of another: it is the next."""
    admission = settings.admission.model_copy(update={"max_running": 1, "max_queued_tokens": 10_000})
    house = build(settings=settings.model_copy(update={"admission": admission}))
    await house.gateway.start()
    async with house.client() as client, house.client({"authorization": "Bearer admin-key"}) as admin:
        for name in ("red", "blue"):
            content = name.encode()
            query = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
            assert (await admin.post("/v1/admin/deltas", params=query, content=content)).status_code == 201
        house.engine.block_at = 1

        def post(model: str) -> asyncio.Task[Any]:
            return asyncio.create_task(client.post("/v1/completions", json={"model": model, "prompt": "a"}))

        first = post("red")
        await asyncio.sleep(0.05)
        assert len(house.engine.running) == 1
        house.engine.block_at = None
        others = [post("red") for _ in range(5)]
        await asyncio.sleep(0.05)
        others.append(post("blue"))
        await asyncio.sleep(0.05)
        assert len(house.engine.calls) == 1
        first.cancel()
        assert [response.status_code for response in await asyncio.gather(*others)] == [200] * 6
        served = [delta.digest for _, _, delta, _ in house.engine.calls]
        assert served.index(next(digest for digest in served if digest != served[0])) == 1
    assert house.idle()
    await house.gateway.stop()
