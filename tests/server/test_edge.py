"""What holds on every path: error shape, request ids, keys, health, models."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from compressors.errors import DeltaError
from server.core import GatewayError
from server.engine.base import EngineError
from server.errors import TABLE, describe
from steering.errors import SteeringError

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}


ROOT = Path(__file__).parents[2]
FAMILIES = (GatewayError, EngineError, DeltaError, SteeringError)


def error_classes() -> set[str]:
    """The names of all error classes in the sources: a module that nothing here imports counts too."""
    bases = {
        node.name: {base.attr if isinstance(base, ast.Attribute) else base.id for base in node.bases}
        for house in ("server", "compressors", "steering")
        for path in (ROOT / house).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and all(isinstance(base, ast.Attribute | ast.Name) for base in node.bases)
    }
    found = {root.__name__ for root in FAMILIES}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def test_no_error_class_is_unmapped() -> None:
    classes = error_classes()
    assert {"ModelNotFound", "SlotError", "EngineDeadError", "PolicyError"} <= classes
    assert classes == {kind.__name__ for kind in TABLE}


def test_table_is_within_the_rules() -> None:
    for kind, mapping in TABLE.items():
        assert mapping.status != 422, kind
        assert re.fullmatch(r"[a-z_]+", mapping.code.format(kind="delta")), kind
        assert mapping.status < 500 or mapping.type.endswith("_error")


def test_foreign_error_tells_nothing() -> None:
    problem = describe(ValueError("/etc/passwd at 0xdeadbeef"))
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "passwd" not in str(problem.body)


def check_shape(response: httpx.Response, status: int, code: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert response.headers["x-request-id"]


@pytest.mark.anyio
async def test_unknown_route_wrong_method_and_crash_have_the_shape(client: httpx.AsyncClient, house: Any) -> None:
    for path in ("/", "/v1/nothing", "/v1/chat/completions/", "/docs"):
        check_shape(await client.get(path), 404, "route_not_found")
    wrong = await client.get("/v1/chat/completions")
    check_shape(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    house.engine.words = None  # makes the fake engine crash with a TypeError
    check_shape(await client.post("/v1/chat/completions", json=CHAT), 500, "internal_error")
    assert house.idle()


@pytest.mark.anyio
async def test_request_id_is_echoed_when_sane_and_made_otherwise(client: httpx.AsyncClient) -> None:
    for given, echoed in (("abc_DEF-1", True), ("x" * 129, False), ("a b", False), ("a\tb", False)):
        response = await client.get("/health/live", headers={"x-request-id": given})
        assert (response.headers["x-request-id"] == given) == echoed
    assert len({(await client.get("/v1/models")).headers["x-request-id"] for _ in range(3)}) == 3


@pytest.mark.anyio
async def test_loading_ready_draining(build: Callable[..., Any]) -> None:
    house = build()
    async with house.client() as client, house.client({"authorization": "Bearer admin-key"}) as admin:

        async def state() -> tuple[int, int, str]:
            live, ready = await client.get("/health/live"), await client.get("/health/ready")
            assert (ready.status_code == 200) == ("retry-after" not in ready.headers)
            return live.status_code, ready.status_code, ready.json()["status"]

        async def refused(code: str) -> None:
            response = await client.post("/v1/chat/completions", json=CHAT)
            check_shape(response, 503, code)
            assert int(response.headers["retry-after"]) > 0

        assert await state() == (200, 503, "loading")
        await refused("loading")
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        await house.gateway.start()
        assert await state() == (200, 200, "ready")
        drained = await admin.post("/v1/admin/drain")
        assert (drained.status_code, drained.json()) == (202, {"state": "draining", "rows_in_flight": 0})
        assert await state() == (200, 503, "draining")
        await refused("draining")
        assert (await admin.post("/v1/admin/resume")).json()["state"] == "ready"
        assert await state() == (200, 200, "ready")
        house.gateway.drain()  # as a signal does: for good
        assert await state() == (200, 503, "draining")
        check_shape(await admin.post("/v1/admin/resume"), 503, "draining")
    await house.gateway.stop()


@pytest.mark.anyio
async def test_models_lists_base_and_deltas(client: httpx.AsyncClient, upload: Any) -> None:
    digest = (await upload("red.v1", b"1")).json()["digest"]
    base, red = (await client.get("/v1/models")).json()["data"]
    assert (base["id"], base["object"], base["parent"], base["max_model_len"]) == ("tiny-base", "model", None, 64)
    assert (red["id"], red["parent"], red["metadata"]["digest"]) == ("red.v1", "tiny-base", digest)
    assert (await client.get("/v1/models/red.v1")).json() == red
    assert (await client.get("/v1/models/tiny-base")).json() == base
    check_shape(await client.get("/v1/models/some/other:name"), 404, "model_not_found")


@pytest.mark.anyio
async def test_overload_is_503_with_retry_after(client: httpx.AsyncClient, house: Any) -> None:
    admission = house.context.admission
    with admission.permit(16):
        response = await client.post("/v1/chat/completions", json=CHAT)
        check_shape(response, 503, "server_overloaded")
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")
    with admission.permit(1) as permit:
        permit.queue(98)
        check_shape(await client.post("/v1/chat/completions", json=CHAT), 503, "server_overloaded")
        permit.started()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert house.idle()


@pytest.mark.anyio
async def test_a_large_request_alone_is_let_in(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny-base", "prompt": ["x" * 30] * 10}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


@pytest.mark.anyio
async def test_r7_no_room_for_a_delta_is_503(client: httpx.AsyncClient, upload: Any, house: Any) -> None:
    digests = [(await upload(name, name.encode())).json()["digest"] for name in ("red", "blue", "green")]
    pool, registry = house.context.pool, house.context.registry
    async with pool.lease(registry.engine_delta(digests[0])), pool.lease(registry.engine_delta(digests[1])):
        response = await client.post("/v1/completions", json={"model": "green", "prompt": "a"})
        check_shape(response, 503, "delta_capacity")
        assert response.headers["retry-after"] == "2"
    assert (await client.post("/v1/completions", json={"model": "green", "prompt": "a"})).status_code == 200
