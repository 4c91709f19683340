"""The admin plane: upload in both forms, versions, compare-and-swap, residency, deletion, and every bad upload."""

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

DELTAS = "/v1/admin/deltas"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leftovers(house: Any) -> list[Path]:
    return [path for path in house.store.root.rglob("*") if path.is_file() and path.name != "lock"]


async def test_first_upload_is_201_and_a_repeat_200(admin: httpx.AsyncClient, upload: Any, house: Any) -> None:
    content = b"a delta"
    created = await upload("red", content)
    assert created.status_code == 201
    assert created.headers["location"] == f"{DELTAS}/red"
    assert created.headers["etag"] == f'"{sha256(content)}"'
    card = created.json()
    assert (card["name"], card["digest"], card["generation"]) == ("red", sha256(content), 1)
    (version,) = card["versions"]
    assert (version["nbytes"], version["method"], version["state"]) == (len(content), "impart", "stored")
    again = await upload("red", content)
    assert (again.status_code, again.json()) == (200, card)
    assert (await admin.get(f"{DELTAS}/red")).json() == card
    assert (await admin.get(DELTAS)).json()["data"] == [card]
    assert house.store.object_path(sha256(content)).read_bytes() == content


async def test_raw_body_upload(admin: httpx.AsyncClient, house: Any) -> None:
    content = bytes(range(256)) * 9000  # more than one batch
    query = {"name": "raw.v1", "sha256": sha256(content), "expected_generation": "0"}
    response = await admin.post(DELTAS, params=query, content=content)
    assert (response.status_code, response.json()["digest"]) == (201, sha256(content))
    assert house.store.object_path(sha256(content)).read_bytes() == content


async def test_multipart_with_the_fields_after_the_file(admin: httpx.AsyncClient, house: Any) -> None:
    content = b"\r\n--B\r" * 100_000 + b"--"  # nearly a boundary, many times
    parts = [
        b'--BB\r\nContent-Disposition: form-data; name="file"; filename="d"\r\n\r\n' + content + b"\r\n",
        b'--BB\r\ncontent-disposition: form-data; name="sha256"\r\n\r\n' + sha256(content).encode() + b"\r\n",
        b'--BB\r\nContent-Disposition: form-data; name="name"\r\n\r\nred\r\n--BB--\r\n',
    ]

    async def dribble() -> Any:
        body = b"".join(parts)
        for start in range(0, len(body), 4999):
            yield body[start : start + 4999]

    headers = {"content-type": "multipart/form-data; boundary=BB"}
    response = await admin.post(DELTAS, content=dribble(), headers=headers)
    assert response.status_code == 201, response.text
    assert house.store.object_path(sha256(content)).read_bytes() == content


BAD_UPLOADS = [
    (b"broken header", {}, 400, "delta_invalid", None),
    (b"foreign base", {}, 400, "delta_base_mismatch", None),
    (b"ok", {"sha256": "0" * 64}, 400, "digest_mismatch", "sha256"),
    (b"ok", {"sha256": "xyz"}, 400, "invalid_value", "sha256"),
    (b"ok", {"name": "a/b"}, 400, "invalid_value", "name"),
    (b"ok", {"name": ".."}, 400, "invalid_value", "name"),
    (b"ok", {"name": "x" * 129}, 400, "invalid_value", "name"),
    (b"ok", {"name": "tiny-base"}, 400, "invalid_value", "name"),
    (b"ok", {"name": "none"}, 400, "invalid_value", "name"),
    (b"ok", {"name": ""}, 400, "invalid_value", "name"),
    (b"ok", {"nmae": "x"}, 400, "invalid_value", "nmae"),
    (b"ok", {"activate": "perhaps"}, 400, "invalid_value", "activate"),
    (b"ok", {"expected_generation": "3"}, 409, "delta_generation_mismatch", "expected_generation"),
    (b"x" * 3_000_001, {}, 413, "body_too_large", None),
    (b"x" * 3_100_000, {}, 413, "body_too_large", None),
]


@pytest.mark.parametrize(("content", "fields", "status", "code", "param"), BAD_UPLOADS)
@pytest.mark.parametrize("form", ["multipart", "raw"])
async def test_r14_bad_upload_leaves_nothing(
    admin: httpx.AsyncClient,
    house: Any,
    form: str,
    content: bytes,
    fields: dict[str, str],
    status: int,
    code: str,
    param: str | None,
) -> None:
    fields = {"name": "red", "sha256": sha256(content), **fields}
    if form == "raw":
        response = await admin.post(DELTAS, params=fields, content=content)
    else:
        response = await admin.post(DELTAS, data=fields, files={"file": content})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert leftovers(house) == []
    assert (await admin.get(DELTAS)).json()["data"] == []


@pytest.mark.parametrize("missing", ["name", "sha256", "file"])
async def test_missing_form_field(admin: httpx.AsyncClient, house: Any, missing: str) -> None:
    fields = {"name": (None, b"red"), "sha256": (None, sha256(b"ok").encode()), "file": ("d", b"ok")}
    del fields[missing]
    response = await admin.post(DELTAS, files=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, missing)
    assert leftovers(house) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=B", b"no boundary here"),
        ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc'),
        ("multipart/form-data; boundary=" + "B" * 500, b""),
    ],
)
async def test_malformed_multipart(admin: httpx.AsyncClient, house: Any, content_type: str, body: bytes) -> None:
    response = await admin.post(DELTAS, content=body, headers={"content-type": content_type})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_multipart")
    assert leftovers(house) == []


@pytest.mark.parametrize("full_at", [0, 1, 2])
async def test_no_space_left_is_507_and_leaves_nothing(
    upload: Any, house: Any, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    """The disk fills up at the file, at its folder, or at the name that should point to it."""
    calls = iter(range(100))
    sync = os.fsync

    def full(handle: int) -> None:
        if next(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        response = await upload("red", b"ok")
    assert (response.status_code, response.json()["error"]["code"]) == (507, "insufficient_storage")
    assert response.headers["x-should-retry"] == "false"
    assert leftovers(house) == []
    assert (await upload("red", b"ok")).status_code == 201


async def test_second_version_moves_the_name_and_the_first_can_be_moved_back(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any
) -> None:
    one, two = (await upload("red", b"1")).json()["digest"], (await upload("red", b"2")).json()["digest"]
    card = (await admin.get(f"{DELTAS}/red")).json()
    assert (card["digest"], card["generation"]) == (two, 2)
    moved = await admin.put(f"{DELTAS}/red/alias", json={"digest": one, "expected_generation": 2})
    assert (moved.status_code, moved.json()["digest"], moved.json()["generation"]) == (200, one, 3)
    body = (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).json()
    assert body["gateway"]["delta_digest"] == one


async def test_upload_without_activation_serves_only_after_a_move(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any
) -> None:
    card = (await upload("red", b"1", activate="false")).json()
    assert (card["digest"], card["generation"]) == (None, 0)
    assert (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).status_code == 404
    assert (await admin.post(f"{DELTAS}/red/load")).status_code == 404
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["tiny-base"]
    digest = card["versions"][0]["digest"]
    await admin.put(f"{DELTAS}/red/alias", json={"digest": digest, "expected_generation": 0})
    assert (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).status_code == 200


async def test_r17_compare_and_swap_lets_one_of_two_win(admin: httpx.AsyncClient, upload: Any) -> None:
    one, two = (await upload("red", b"1")).json()["digest"], (await upload("red", b"2")).json()["digest"]
    moves = [
        admin.put(f"{DELTAS}/red/alias", json={"digest": one, "expected_generation": 2}),
        admin.put(f"{DELTAS}/red/alias", json={"digest": two, "expected_generation": 2}),
        admin.put(f"{DELTAS}/red/alias", json={"digest": one, "expected_generation": 2}),
    ]
    codes = sorted(response.status_code for response in await asyncio.gather(*moves))
    assert codes in ([200, 409, 409], [200, 200, 409])  # a move to where it points already changes no generation
    assert (await admin.get(f"{DELTAS}/red")).json()["generation"] == 3


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"digest": "0" * 64, "expected_generation": 1}, 404, "delta_not_found"),
        ({"digest": "0" * 64, "expected_generation": 9}, 409, "delta_generation_mismatch"),
        ({"digest": "zz", "expected_generation": 1}, 400, "invalid_value"),
        ({"digest": "0" * 64}, 400, "missing_parameter"),
        ({"digest": "0" * 64, "expected_generation": 1, "force": True}, 400, "invalid_value"),
    ],
)
async def test_bad_move_changes_nothing(
    admin: httpx.AsyncClient, upload: Any, body: dict[str, Any], status: int, code: str
) -> None:
    before = (await upload("red", b"1")).json()
    response = await admin.put(f"{DELTAS}/red/alias", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (await admin.get(f"{DELTAS}/red")).json() == before


async def test_load_and_unload(admin: httpx.AsyncClient, upload: Any, house: Any) -> None:
    await upload("red", b"1")
    loaded = (await admin.post(f"{DELTAS}/red/load")).json()["versions"][0]
    assert (loaded["state"], loaded["resident_bytes"]) == ("resident", 1000)
    status = (await admin.get("/v1/admin/status")).json()
    assert status["resident"] == [
        {"digest": loaded["digest"], "names": ["red"], "resident_bytes": 1000, "in_flight": 0, "pinned": False}
    ]
    assert (status["state"], status["resident_bytes"], status["max_resident_deltas"]) == ("ready", 1000, 2)
    assert (status["packed_bytes"], status["packed_deltas"], status["max_resident_delta_bytes"]) == (1, 1, None)
    unloaded = (await admin.post(f"{DELTAS}/red/unload")).json()["versions"][0]
    assert (unloaded["state"], unloaded["resident_bytes"]) == ("stored", None)
    assert house.engine.unloads == [loaded["digest"]]
    assert (await admin.get("/v1/admin/status")).json()["packed_bytes"] == 0


async def test_r6_failed_load_is_remembered_for_a_while(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    """A request does not try again, an order does, and an upload of the same bytes clears the memory."""

    async def ask() -> httpx.Response:
        response = await client.post("/v1/completions", json={"model": "red", "prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "delta_load_failed")
        return response

    await upload("red", b"unloadable")
    assert "retry-after" not in (await ask()).headers
    assert 1 <= int((await ask()).headers["retry-after"]) <= 5
    assert len(house.engine.loads) == 1
    assert (await admin.get(f"{DELTAS}/red")).json()["versions"][0]["state"] == "failed"
    assert (await admin.post(f"{DELTAS}/red/load")).status_code == 500
    assert len(house.engine.loads) == 2
    await upload("red", b"unloadable")
    await ask()
    assert len(house.engine.loads) == 3
    assert house.idle()
    assert house.context.pool.residents() == []


async def test_delete_forgets_name_bytes_and_memory(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    await upload("red", b"1")
    await upload("red", b"2")
    await upload("blue", b"2")
    await admin.post(f"{DELTAS}/red/load")
    assert (await admin.delete(f"{DELTAS}/red")).status_code == 204
    assert (await admin.get(f"{DELTAS}/red")).status_code == 404
    assert (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).status_code == 404
    assert house.store.objects() == [sha256(b"2")]  # blue still has it
    assert house.engine.unloads == []
    assert (await admin.delete(f"{DELTAS}/blue")).status_code == 204
    assert leftovers(house) == []
    assert house.engine.unloads == [sha256(b"2")]


async def test_names_outlive_a_restart_and_residency_does_not(
    admin: httpx.AsyncClient, upload: Any, house: Any, build: Callable[..., Any]
) -> None:
    await upload("red", b"1")
    await upload("red", b"2")
    await admin.post(f"{DELTAS}/red/load")
    before = (await admin.get(f"{DELTAS}/red")).json()
    reborn = build()
    await reborn.gateway.start()
    async with reborn.client({"authorization": "Bearer admin-key"}) as second:
        after = (await second.get(f"{DELTAS}/red")).json()
    assert [version.pop("state") for version in after["versions"]] == ["stored", "stored"]
    assert [version.pop("state") for version in before["versions"]] == ["stored", "resident"]
    for version in (*before["versions"], *after["versions"]):
        version.pop("resident_bytes")
    assert after == before


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/load"), ("POST", "/unload"), ("PUT", "/alias")],
)
async def test_unknown_name_is_404(admin: httpx.AsyncClient, method: str, path: str) -> None:
    body = {"digest": "0" * 64, "expected_generation": 0} if method == "PUT" else None
    response = await admin.request(method, f"{DELTAS}/nobody{path}", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "delta_not_found")


async def test_unknown_query_field_is_400_and_nothing_is_done(admin: httpx.AsyncClient, upload: Any) -> None:
    await upload("red", b"red")
    for method, path in (("DELETE", f"{DELTAS}/red?drian=true"), ("POST", f"{DELTAS}/red/load?force=1")):
        error = (await admin.request(method, path)).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", path.partition("?")[2].split("=")[0])
    assert "did you mean 'drain'?" in (await admin.delete(f"{DELTAS}/red?drian=true")).json()["error"]["message"]
    assert (await admin.get(f"{DELTAS}/red?{'x' * 900}=1")).json()["error"]["param"] == "x" * 64
    assert (await admin.get(f"{DELTAS}/red")).status_code == 200


async def test_bad_query_value_is_400(admin: httpx.AsyncClient, upload: Any) -> None:
    await upload("red", b"1")
    response = await admin.delete(f"{DELTAS}/red?drain=perhaps")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
