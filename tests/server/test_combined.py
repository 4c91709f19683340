"""Several deltas of one request: the weighted sum of them under an identity of its own, every part leased, every mistake named."""

import asyncio
import dataclasses
import hashlib
from typing import Any

import httpx
import pytest

from compressors.artifact import TokenizerInfo
from server.artifacts.checks import delta_check
from server.artifacts.combination import combination
from server.core import InvalidRequest
from server.engine.base import EngineDelta, WeightedDelta
from tests.server.fake_checks import CHECKS, fake_verify

pytestmark = pytest.mark.anyio

RED, BLUE, GREEN = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2", b"3"))
HALVES = [{"name": "red", "weight": 0.5}, {"name": "blue", "weight": 0.5}]


@pytest.fixture
async def named(upload: Any) -> None:
    for name, content in (("red", b"1"), ("blue", b"2"), ("green", b"3")):
        assert (await upload(name, content)).status_code == 201


def ask(client: httpx.AsyncClient, delta: Any, path: str = "completions", **fields: Any) -> Any:
    prompt = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    return client.post(f"/v1/{path}", json={"model": "tiny-base", **prompt, "delta": delta, **fields})


def digest(*parts: tuple[str, float]) -> str:
    return combination([WeightedDelta(EngineDelta(name, ""), weight) for name, weight in parts], True).digest


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_a_combination_is_served_under_its_own_digest(
    client: httpx.AsyncClient, named: Any, house: Any, path: str
):
    response = await ask(client, HALVES, path)
    body = response.json()
    assert response.status_code == 200, body
    mine = digest((RED, 0.5), (BLUE, 0.5))
    told = body["gateway"]
    assert (told["delta"], told["delta_digest"]) == ("combined", mine)
    assert told["deltas"] == [
        {"name": "red", "weight": 0.5, "digest": RED},
        {"name": "blue", "weight": 0.5, "digest": BLUE},
    ]
    served = house.engine.calls[-1][2]
    assert served.digest == mine
    assert {part.delta.digest: part.weight for part in served.parts} == {RED: 0.5, BLUE: 0.5}
    assert house.engine.loads == [served.parts[0].delta.digest, served.parts[1].delta.digest, mine]
    assert house.idle()
    plain = (await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "a", "delta": None})).json()
    assert "deltas" not in plain["gateway"]
    assert plain["system_fingerprint"] != body["system_fingerprint"]


async def test_identity_is_of_digests_and_weights_whatever_their_order(
    client: httpx.AsyncClient, named: Any, house: Any
) -> None:
    first = (await ask(client, HALVES)).json()
    again = (await ask(client, HALVES[::-1])).json()
    assert first["gateway"]["delta_digest"] == again["gateway"]["delta_digest"]
    assert first["system_fingerprint"] == again["system_fingerprint"]
    assert len(house.engine.loads) == 3
    other = (await ask(client, [{"name": "red", "weight": 0.25}, {"name": "blue", "weight": 0.5}])).json()
    assert other["gateway"]["delta_digest"] != first["gateway"]["delta_digest"]
    assert digest((RED, 0.0), (BLUE, 1)) == digest((BLUE, 1.0), (RED, -0.0))
    assert digest((RED, 1), (BLUE, 2)) != digest((RED, 2), (BLUE, 1))


async def test_one_delta_that_counts_once_is_that_delta(client: httpx.AsyncClient, named: Any, house: Any) -> None:
    told = (await ask(client, [{"name": "red"}])).json()["gateway"]
    assert (told["delta"], told["delta_digest"]) == ("red", RED)
    assert "deltas" not in told
    scaled = (await ask(client, [{"name": "red", "weight": -2}])).json()["gateway"]
    assert (scaled["delta"], scaled["deltas"][0]["weight"]) == ("combined", -2)
    assert house.engine.calls[-1][2].parts[0].weight == -2


@pytest.mark.parametrize(
    ("delta", "status", "param"),
    [
        ([], 400, "delta"),
        ("red", 400, "delta"),
        ({"name": "red"}, 400, "delta"),
        (["red"], 400, "delta.0"),
        ([{"name": "red"}] * 5, 400, "delta"),
        ([{"name": "red"}, {"name": "red", "weight": 2}], 400, "delta.1.name"),
        ([{"name": ""}], 400, "delta.0.name"),
        ([{"weight": 1}], 400, "delta.0.name"),
        ([{"name": "red", "weight": 8.5}], 400, "delta.0.weight"),
        ([{"name": "red", "weight": -9}], 400, "delta.0.weight"),
        ([{"name": "red", "weight": "1"}], 400, "delta.0.weight"),
        ([{"name": "red", "weight": True}], 400, "delta.0.weight"),
        ([{"name": "red", "wieght": 1}], 400, "delta.0.wieght"),
        ([{"name": "red"}, {"name": "nobody"}], 404, "delta.1.name"),
        ([{"name": "tiny-base"}], 404, "delta.0.name"),
        ([{"name": "red"}, {"name": "twin"}], 400, "delta.1.name"),
        ([{"name": "red"}, {"name": "blue"}, {"name": "green"}], 400, "delta"),  # this house keeps two deltas
    ],
)
async def test_a_mistake_is_named(
    client: httpx.AsyncClient, named: Any, upload: Any, house: Any, delta: Any, status: int, param: str
) -> None:
    await upload("twin", b"1")
    response = await ask(client, delta)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert house.engine.calls == []
    assert house.idle()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_weights_are_numbers(client: httpx.AsyncClient, named: Any, number: str) -> None:
    content = f'{{"model": "tiny-base", "prompt": "a", "delta": [{{"name": "red", "weight": {number}}}]}}'
    response = await client.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("delta.0.weight", None)  # None: no JSON at all


async def test_model_is_the_base_beside_a_combination(client: httpx.AsyncClient, named: Any) -> None:
    named_twice = await ask(client, HALVES, model="green")
    assert (named_twice.status_code, named_twice.json()["error"]["param"]) == (400, "model")
    unknown = await ask(client, HALVES, model="nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_parts_are_leased_while_the_combination_runs(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, named: Any, house: Any
) -> None:
    house.engine.block_at = 1
    running = asyncio.create_task(ask(client, HALVES))
    while not house.engine.running:
        await asyncio.sleep(0.001)
    for name in ("red", "blue"):
        assert (await admin.delete(f"/v1/admin/deltas/{name}")).status_code == 409
        assert (await admin.post(f"/v1/admin/deltas/{name}/unload")).status_code == 409
    full = await client.post("/v1/completions", json={"model": "green", "prompt": "a"})
    assert (full.status_code, full.json()["error"]["code"]) == (503, "delta_capacity")
    status = (await admin.get("/v1/admin/status")).json()
    assert [resident["in_flight"] for resident in status["resident"]] == [1, 1]
    assert status["resident_combinations"] == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.idle()


async def test_a_combination_leaves_with_its_parts_and_comes_back(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, named: Any, house: Any
) -> None:
    mine = (await ask(client, HALVES)).json()["gateway"]["delta_digest"]
    assert (await client.post("/v1/completions", json={"model": "green", "prompt": "a"})).status_code == 200
    await asyncio.sleep(0.01)
    assert mine in house.engine.unloads
    assert house.context.pool.combinations.residents() == []
    assert (await ask(client, HALVES)).status_code == 200
    assert house.engine.loads.count(mine) == 2
    assert (await admin.delete("/v1/admin/deltas/red")).status_code == 204
    assert house.engine.unloads.count(mine) == 2
    assert (await ask(client, HALVES)).status_code == 404


async def test_combinations_make_room_for_each_other(client: httpx.AsyncClient, named: Any, house: Any) -> None:
    for i in range(40):
        assert (await ask(client, [{"name": "red", "weight": i / 10}, {"name": "blue"}])).status_code == 200
    assert len(house.context.pool.combinations.residents()) <= house.context.pool.combinations.max_resident
    assert house.engine.loads.count(RED) == 1
    series = house.context.telemetry.registry.collect()
    labels = {sample.labels["delta"] for family in series for sample in family.samples if "delta" in sample.labels}
    assert labels == {"combined", "none", "base", "other"}


async def test_nobody_may_be_called_combined(upload: Any) -> None:
    response = await upload("combined", b"1")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


def part(name: str, template: str = "", stop_ids: tuple[int, ...] = ()) -> WeightedDelta:
    return WeightedDelta(EngineDelta(name, "", template, stop_ids), 1.0)


def test_templates_must_agree_for_a_chat_and_end_tokens_unite() -> None:
    made = combination([part("a"), part("b", "T", (7,))], chat=True)
    assert (made.chat_template, made.stop_ids, made.base_stops) == ("T", (7,), True)
    made = combination([part("a", "T", (8, 7)), part("b", "T", (7, 9))], chat=True)
    assert (made.chat_template, made.stop_ids, made.base_stops) == ("T", (7, 8, 9), False)
    with pytest.raises(InvalidRequest, match="different chat templates"):
        combination([part("a", "T"), part("b", "U")], chat=True)
    assert combination([part("a", "T"), part("b", "U")], chat=False).chat_template == ""


async def test_a_chat_of_two_templates_is_refused_and_a_completion_is_not(build: Any) -> None:
    def verify(path: Any) -> Any:
        report = fake_verify(path)
        report.manifest.tokenizer = TokenizerInfo(chat_template=path.read_text())
        return report

    house = build(checks=dataclasses.replace(CHECKS, delta=delta_check(verify)))
    await house.gateway.start()
    async with house.client({"authorization": "Bearer admin-key"}) as both:
        for name, content in (("red", b"1"), ("blue", b"2")):
            form = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
            assert (await both.post("/v1/admin/deltas", data=form, files={"file": content})).status_code == 201
    async with house.client() as client:
        refused = await ask(client, HALVES, "chat/completions")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "delta")
        assert (await ask(client, HALVES)).status_code == 200
    await house.gateway.stop()
