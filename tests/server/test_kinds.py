"""Profiles and SAEs live the life of deltas: upload, versions, alias, deletion under requests, restart with three kinds."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.artifacts.backing import StoreError

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
KINDS = [("profiles", "profile"), ("saes", "sae")]
STEERED = {
    "profiles": {"profile": "one", "direction": "use_context"},
    "saes": {"edits": [{"sae": "one", "features": [{"id": 1, "op": "ablate"}]}]},
}


def content(**facts: Any) -> bytes:
    return json.dumps(facts).encode()


def leftovers(house: Any) -> list[Path]:
    return [path for path in house.store.root.rglob("*") if path.is_file() and path.name != "lock"]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "prompt": "abc", **fields}


@pytest.mark.parametrize(("plural", "kind"), KINDS)
async def test_upload_list_get_move(admin: httpx.AsyncClient, upload: Any, house: Any, plural: str, kind: str) -> None:
    first = await upload("one", content(model_name="a"), plural)
    assert first.status_code == 201
    assert first.headers["location"] == f"/v1/admin/{plural}/one"
    card = first.json()
    assert (card["object"], card["name"], card["generation"]) == (kind, "one", 1)
    (version,) = card["versions"]
    assert version["digest"] == card["digest"] == hashlib.sha256(content(model_name="a")).hexdigest()
    assert (version["base_fingerprint"], version["model_name"]) == ("sha256:ba5e", "a")
    assert (version["in_flight"], version["resident_edits"]) == (0, 0)
    assert (await upload("one", content(model_name="a"), plural)).status_code == 200
    second = (await upload("one", content(model_name="b"), plural)).json()
    assert (second["generation"], len(second["versions"])) == (2, 2)
    move = {"digest": card["digest"], "expected_generation": 2}
    moved = await admin.put(f"/v1/admin/{plural}/one/alias", json=move)
    assert (moved.status_code, moved.json()["digest"], moved.json()["generation"]) == (200, card["digest"], 3)
    again = await admin.put(f"/v1/admin/{plural}/one/alias", json=move)
    assert (again.status_code, again.json()["error"]["code"]) == (409, f"{kind}_generation_mismatch")
    assert (await admin.get(f"/v1/admin/{plural}")).json()["data"] == [moved.json()]
    assert (await admin.get(f"/v1/admin/{plural}/one")).json() == moved.json()
    assert (await admin.get("/v1/admin/deltas")).json()["data"] == []
    assert [model["id"] for model in (await admin.get("/v1/models")).json()["data"]] == ["tiny-base"]


@pytest.mark.parametrize(
    ("plural", "kind", "code"), [("profiles", "profile", "profile_invalid"), ("saes", "sae", "sae_mismatch")]
)
async def test_refused_upload_leaves_nothing(
    admin: httpx.AsyncClient, upload: Any, house: Any, plural: str, kind: str, code: str
) -> None:
    for bad, fields, expected in (
        (b"broken", {}, code),
        (content(), {"sha256": "0" * 64}, "digest_mismatch"),
        (content(), {"name": "a/b"}, "invalid_value"),
        (content(), {"expected_generation": "4"}, f"{kind}_generation_mismatch"),
        (b" " * 3_000_001, {}, "body_too_large"),
    ):
        form = {"name": "one", **fields}
        response = await upload(form.pop("name"), bad, plural, **form)
        assert response.json()["error"]["code"] == expected
        assert leftovers(house) == []
    counter = house.context.telemetry.registry.get_sample_value
    invalid = "base_mismatch" if code == "sae_mismatch" else "format"
    for reason in (invalid, "digest", "invalid_name", "generation", "too_large"):
        labels = {"outcome": "rejected", "reason": reason}
        assert counter(f"deltaworks_{kind}_uploads_total", labels) == 1
        assert counter("deltaworks_delta_uploads_total", labels) == 0
    assert counter(f"deltaworks_{kind}_verify_failures_total", {"reason": invalid}) == 1


@pytest.mark.parametrize(("plural", "kind"), KINDS)
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("PUT", "/alias")])
async def test_unknown_name_is_404(admin: httpx.AsyncClient, plural: str, kind: str, method: str, path: str) -> None:
    sent = {"digest": "0" * 64, "expected_generation": 0} if method == "PUT" else None
    response = await admin.request(method, f"/v1/admin/{plural}/nobody{path}", json=sent)
    assert (response.status_code, response.json()["error"]["code"]) == (404, f"{kind}_not_found")


async def test_kinds_share_no_names(admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any) -> None:
    for plural in ("deltas", "profiles", "saes"):
        assert (await upload("one", content(model_name=plural), plural)).status_code == 201
    assert (await client.post(COMPLETIONS, json=body(model="one"))).status_code == 200
    for plural in ("profiles", "saes"):
        assert (await client.post(COMPLETIONS, json=body(steering=STEERED[plural]))).status_code == 200
    await admin.delete("/v1/admin/profiles/one")
    assert (await client.post(COMPLETIONS, json=body(model="one"))).status_code == 200
    assert (await client.post(COMPLETIONS, json=body(steering=STEERED["profiles"]))).status_code == 404


@pytest.mark.parametrize(("plural", "kind"), KINDS)
async def test_moved_alias_is_another_edit(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, plural: str, kind: str
) -> None:
    seen = []
    for name in ("a", "b"):
        await upload("one", content(model_name=name), plural)
        shown = (await client.post(COMPLETIONS, json=body(steering=STEERED[plural]))).json()["gateway"]["steering"]
        seen.append(shown["fingerprint"])
    assert len(set(seen)) == 2


@pytest.mark.parametrize(("plural", "kind"), KINDS)
async def test_deletion_under_a_running_request(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any, plural: str, kind: str
) -> None:
    digest = (await upload("one", content(), plural)).json()["digest"]
    house.engine.block_at = 1
    running = asyncio.create_task(client.post(COMPLETIONS, json=body(steering=STEERED[plural])))
    while not house.engine.running:
        await asyncio.sleep(0.005)
    card = (await admin.get(f"/v1/admin/{plural}/one")).json()
    assert (card["versions"][0]["in_flight"], card["versions"][0]["resident_edits"]) == (1, 1)
    refused = await admin.delete(f"/v1/admin/{plural}/one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, f"{kind}_in_use")
    assert house.store.objects() == [digest]
    draining = asyncio.create_task(admin.delete(f"/v1/admin/{plural}/one?drain=true"))
    while (await admin.get(f"/v1/admin/{plural}/one")).status_code != 404:
        await asyncio.sleep(0.002)
    assert not draining.done()
    hidden = await client.post(COMPLETIONS, json=body(steering=STEERED[plural]))
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, f"{kind}_not_found")
    busy = await upload("one", content(), plural)
    assert (busy.status_code, busy.json()["error"]["code"]) == (429, f"{kind}_busy")
    running.cancel()
    assert (await draining).status_code == 204
    assert leftovers(house) == []
    assert house.engine.edits == {}  # the idle edit that was made of it has left the engine
    assert house.engine.edit_unloads == house.engine.edit_loads


async def test_a_probe_and_a_waiting_edit_hold_their_profile(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    """Also a request that still waits for its delta has its profile safe."""
    await upload("one", content(), "profiles")
    await upload("red", b"1")
    house.engine.hold_loads = True
    conflict = {"score": True, "profile": "one"}
    waiting = asyncio.create_task(client.post(COMPLETIONS, json=body(model="red", conflict=conflict)))
    while not house.engine.loads:
        await asyncio.sleep(0.005)
    assert house.engine.edit_loads == []
    refused = await admin.delete("/v1/admin/profiles/one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "profile_in_use")
    house.engine.hold_loads = False
    assert (await waiting).json()["gateway"]["conflict"]["score"] == 0.5
    assert (await admin.delete("/v1/admin/profiles/one")).status_code == 204


async def test_bytes_that_two_kinds_refer_to_go_with_the_last(
    admin: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    shared = content()
    for plural in ("profiles", "saes", "deltas"):
        assert (await upload("one", shared, plural)).status_code == 201
    for plural in ("saes", "deltas"):
        assert (await admin.delete(f"/v1/admin/{plural}/one")).status_code == 204
        assert house.store.objects() == [hashlib.sha256(shared).hexdigest()]
    assert (await admin.delete("/v1/admin/profiles/one")).status_code == 204
    assert leftovers(house) == []


async def test_restart_keeps_all_three_kinds_and_sweeps_the_rest(
    admin: httpx.AsyncClient, upload: Any, house: Any, build: Callable[..., Any]
) -> None:
    digests = {}
    for plural in ("deltas", "profiles", "saes"):
        await upload("one", content(model_name=f"old {plural}"), plural)
        digests[plural] = (await upload("one", content(model_name=plural), plural)).json()["digest"]
    (house.store.root / "objects" / ("0" * 64)).write_bytes(b"never named")
    before = {plural: (await admin.get(f"/v1/admin/{plural}")).json() for plural in digests}
    reborn = build()
    await reborn.gateway.start()
    assert len(house.store.objects()) == 6
    async with reborn.client({"authorization": "Bearer admin-key"}) as second:
        after = {plural: (await second.get(f"/v1/admin/{plural}")).json() for plural in digests}
        assert after == before
        steering = STEERED["profiles"]
        shown = (await second.post(COMPLETIONS, json=body(model="one", steering=steering))).json()["gateway"]
    assert (shown["delta_digest"], shown["steering"]["profile_digest"]) == (digests["deltas"], digests["profiles"])


async def test_objects_of_a_kind_that_we_do_not_know_are_kept(
    upload: Any, house: Any, build: Callable[..., Any]
) -> None:
    (house.store.root / "objects" / ("0" * 64)).write_bytes(b"a tune's")
    (house.store.root / "refs" / "tune").mkdir()
    (house.store.root / "refs" / "tune" / "new.json").write_text("{}")
    build()
    assert house.store.objects() == ["0" * 64]


@pytest.mark.parametrize("kind", ["profile", "sae"])
async def test_damaged_or_orphaned_name_stops_the_start(
    house: Any, build: Callable[..., Any], upload: Any, kind: str
) -> None:
    digest = (await upload("one", content(), f"{kind}s")).json()["digest"]
    ref = house.store.root / "refs" / kind / "one.json"
    good = ref.read_bytes()
    ref.write_bytes(good[:-9])
    with pytest.raises(StoreError, match=r"one\.json is damaged"):
        build()
    ref.write_bytes(good)
    house.store.object_path(digest).unlink()
    with pytest.raises(StoreError, match=f"which {kind} 'one' refers to"):
        build()
