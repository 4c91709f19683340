"""What a request may call a delta: its name, behind the base's, at one version; and what /v1/models shows of it."""

import json
from typing import Any

import httpx
import pytest

from server.artifacts.versions import DeltaVersion, Ref

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


async def versions(upload: Any, *contents: bytes) -> list[str]:
    """Uploads of "red", each active when it comes; their digests."""
    return [(await upload("red", content)).json()["digest"] for content in contents]


async def answered(client: httpx.AsyncClient, model: str) -> tuple[str, str | None, str | None]:
    """Digest, version, and the version in the header."""
    response = await client.post(COMPLETIONS, json={"model": model, "prompt": "a"})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["model"] == model
    told = body["gateway"]
    assert response.headers["x-delta-id"] == told["delta"] == "red"
    return told["delta_digest"], told["delta_version"], response.headers["x-delta-version"]


async def test_a_version_goes_on_meaning_the_same(client: httpx.AsyncClient, upload: Any, admin: Any) -> None:
    one, two = await versions(upload, b"one", b"two")
    for model in ("red", "tiny-base:red", "red@2", f"red@{two[:12]}", f"tiny-base:red@{two}"):
        assert await answered(client, model) == (two, "2", "2")
    for model in ("red@1", f"red@{one[:12]}", f"tiny-base:red@{one[:40]}"):
        assert await answered(client, model) == (one, "1", "1")
    moved = await admin.put("/v1/admin/deltas/red/alias", json={"digest": one, "expected_generation": 2})
    assert moved.status_code == 200
    assert await answered(client, "red") == (one, "3", "3")
    assert await answered(client, "red@2") == (two, "2", "2")


async def test_a_version_that_is_not_active_can_be_asked(client: httpx.AsyncClient, upload: Any) -> None:
    await versions(upload, b"one")
    canary = (await upload("red", b"canary", activate="false")).json()["versions"][-1]["digest"]
    assert await answered(client, f"red@{canary[:12]}") == (canary, canary[:12], canary[:12])
    assert (await answered(client, "red"))[0] != canary


@pytest.mark.parametrize(
    "model",
    [
        "red@",
        "red@0",
        "red@2",
        "red@-1",
        "red@1.0",
        "red@01x",
        "red@" + "0" * 12,
        "red@" + "9" * 5000,
        "red@1@1",
        "@1",
        "tiny-base:",
        "tiny-base:tiny-base",
        "tiny-base@1",
        "other:red",
        "tiny-base:tiny-base:red",
        "Red",
        "red ",
        "../red",
        "",
        "r" * 10_000,
    ],
)
async def test_what_names_nothing_is_404(client: httpx.AsyncClient, upload: Any, house: Any, model: str) -> None:
    await versions(upload, b"one")
    response = await client.post(COMPLETIONS, json={"model": model, "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "x-delta-id" not in response.headers
    assert house.idle()


async def test_eleven_digits_of_a_digest_are_too_few(client: httpx.AsyncClient, upload: Any) -> None:
    (digest,) = await versions(upload, b"one")
    response = await client.post(COMPLETIONS, json={"model": f"red@{digest[:11]}", "prompt": "a"})
    assert response.status_code == 404


async def test_parts_of_a_combination_can_name_versions(client: httpx.AsyncClient, upload: Any) -> None:
    one, two = await versions(upload, b"one", b"two")
    parts = [{"name": "red@1", "weight": 0.5}, {"name": "tiny-base:red", "weight": 0.25}]
    body = {"model": "tiny-base", "prompt": "a", "delta": parts}
    told = (await client.post(COMPLETIONS, json=body)).json()["gateway"]
    assert [part["digest"] for part in told["deltas"]] == [one, two]
    alone = (await client.post(COMPLETIONS, json={**body, "delta": [{"name": "red@1"}]})).json()["gateway"]
    assert (alone["delta"], alone["delta_digest"], alone["delta_version"]) == ("red", one, "1")


async def test_a_base_whose_id_looks_like_more(build: Any, store: Any) -> None:
    house = build()
    house.context.registry.base_id = "hub/base:7b@1"
    await house.gateway.start()
    async with house.client() as client:
        for model, status in (("hub/base:7b@1", 200), ("hub/base:7b", 404), ("7b@1", 404)):
            response = await client.post(COMPLETIONS, json={"model": model, "prompt": "a"})
            assert response.status_code == status, model
        assert (await client.get("/v1/models/hub/base:7b@1")).json()["id"] == "hub/base:7b@1"


async def test_cards(client: httpx.AsyncClient, upload: Any, admin: Any) -> None:
    one, two = await versions(upload, b"one", b"two")
    listed = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["tiny-base", "red"]
    assert all(card["permission"] == [] for card in listed)
    assert listed[1]["metadata"] == {
        "kind": "delta",
        "name": "red",
        "version": "2",
        "digest": two,
        "state": "stored",
        "nbytes": 3,
        "pinned": False,
    }
    await admin.post("/v1/admin/deltas/red/pin")
    card = (await client.get(f"/v1/models/tiny-base:red@{one[:12]}")).json()
    assert (card["id"], card["parent"]) == (f"tiny-base:red@{one[:12]}", "tiny-base")
    assert (card["metadata"]["digest"], card["metadata"]["version"], card["metadata"]["pinned"]) == (one, "1", True)
    missing = await client.get("/v1/models/red@7")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_history_of_names() -> None:
    """Also of a name that was written before histories were kept."""

    def version(digest: str) -> DeltaVersion:
        facts = {"nbytes": 1, "created": 1, "method": "m", "base_fingerprint": "f", "ratio": None, "checks": ()}
        return DeltaVersion(digest=digest, **facts)  # type: ignore[arg-type]

    digests = [letter * 64 for letter in "abc"]
    old = {"name": "n", "digest": digests[1], "generation": 7, "versions": [version(d).model_dump() for d in digests]}
    ref = Ref[DeltaVersion].model_validate_json(json.dumps(old))
    assert "history" not in ref.model_dump()
    moved = ref.pointing_to(digests[0]).pointing_to(digests[1])
    assert [(found and found.digest[0]) for found in map(moved.at, ("6", "7", "8", "9", "10"))] == [
        *(None, "b", "a", "b", None)
    ]
    assert [moved.label(digest) for digest in digests] == ["8", "9", "c" * 12]
    assert moved.at("c" * 12) == moved.versions[2]
    for _ in range(600):
        moved = moved.pointing_to(digests[2]).pointing_to(digests[0])
    assert len(moved.history) == 1000
    assert moved.at("9") is None
    assert moved.at("1209") == moved.versions[0]
