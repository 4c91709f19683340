"""Policies live the life of other artifacts: upload, versions, alias, deletion, restart; wrong files leave nothing."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.artifacts.backing import StoreError
from tests.server.conftest import ADMIN
from tests.server.gate_bed import STATIC, Bed, head
from tests.steering.gate_world import stage

pytestmark = pytest.mark.anyio

POLICIES = "/v1/admin/policies"


def leftovers(bed: Bed) -> list[Path]:
    return [path for path in bed.house.store.root.rglob("*") if path.is_file() and path.name != "lock"]


async def test_upload_list_get_move_delete(bed: Bed, admin: httpx.AsyncClient) -> None:
    content = json.dumps(bed.document(**STATIC, model={"name": "tiny"}), indent=2).encode()
    first = await bed.upload("gate", content, "policies")
    assert (first.status_code, first.headers["location"]) == (201, f"{POLICIES}/gate")
    card = first.json()
    assert (card["object"], card["name"], card["generation"]) == ("policy", "gate", 1)
    (version,) = card["versions"]
    assert version.pop("created") > 0
    assert version == {
        "digest": hashlib.sha256(content).hexdigest(),
        "nbytes": len(content),
        "policy_id": (await bed.ask()).headers["x-tool-gate-policy"],
        "model_name": "tiny",
        "base_fingerprint": "sha256:ba5e",
        "delta_digest": None,
        "template_sha256": bed.template,
        "stages": ["static"],
        "threshold": 0.8,
        "suppress_mode": "drop_tools",
        "placement": "pre",
        "explore": 0.0,
        "hidden_profile": None,
    }
    assert (await bed.upload("gate", content, "policies")).status_code == 200
    await bed.policy("gate", **STATIC, thresholds={"suppress": 0.9})
    assert head(await bed.ask()) == ("allow", "uncertain")
    move = {"digest": version["digest"], "expected_generation": 2}
    moved = await admin.put(f"{POLICIES}/gate/alias", json=move)
    assert (moved.status_code, moved.json()["generation"]) == (200, 3)
    assert head(await bed.ask())[0] == "suppress"
    again = await admin.put(f"{POLICIES}/gate/alias", json=move)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "policy_generation_mismatch")
    assert (await admin.get(POLICIES)).json()["data"] == [moved.json()]
    assert (await admin.get(f"{POLICIES}/gate")).json() == moved.json()
    assert (await admin.delete(f"{POLICIES}/gate")).status_code == 204
    assert head(await bed.ask()) == ("allow", "no_policy")
    assert leftovers(bed) == []


async def test_a_version_that_is_not_activated_decides_nothing(bed: Bed) -> None:
    content = json.dumps(bed.document(**STATIC)).encode()
    assert (await bed.upload("gate", content, "policies", activate="false")).status_code == 201
    assert head(await bed.ask()) == ("allow", "no_policy")
    named = bed.body(tool_gate={"mode": "enforce", "policy": "gate"})
    response = await bed.client.post("/v1/chat/completions", json=named)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "policy_not_found")


def wrong(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, **changes}


def scored(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, "stages": [{**stage("static", -1, 2), **changes}], "probes": {}}


def feature(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "mean": 0, "std": 1}]


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (wrong(extra=1), "extra"),
    (wrong(schema_version=2), "schema_version"),
    (wrong(stages=[]), "stages"),
    (wrong(thresholds={"suppress": 1.5}), "thresholds.suppress"),
    (wrong(thresholds={"suppress": float("nan")}), "thresholds.suppress"),
    (wrong(thresholds={"suppress": "0.5"}), "thresholds.suppress"),
    (wrong(thresholds={"suppress": 0.5, "require": 0.6}), "require must be below suppress"),
    (scored(features=feature("text.dgits")), "did you mean 'text.digits'"),
    (scored(features=feature("draft.mean_logprob")), "not known yet"),
    (scored(features=[]), "stages.0.features"),
    (scored(logistic={"weights": [], "bias": 0}), "weights"),
    (scored(logistic={"weights": [float("nan")], "bias": 0}), "stages.0.logistic.weights"),
    (scored(logistic={"weights": [1.0], "bias": float("inf")}), "stages.0.logistic.bias"),
    (scored(features=[{"name": "text.digits", "mean": 0, "std": 0}]), "stages.0.features.0.std"),
    (scored(isotonic={"x": [0, 1], "y": [1, 0]}), "y must not fall"),
    (wrong(probes={"order": ["samples"]}), "stages"),
    (wrong(probes={"order": ["draft"], "hidden_profile": "knows"}), "probes.hidden_profile"),
    (wrong(tool_kinds=[{"match": "ask", "kind": "clarify", "gateable": True}]), "gateable"),
    (lambda document: {**document, "model": {**document["model"], "base_fingerprint": "sha256:01d"}}, "sha256:01d"),
    (lambda document: {key: value for key, value in document.items() if key != "model"}, "model"),
    (lambda document: [document], "policy"),
]


@pytest.mark.parametrize(("change", "word"), BAD)
async def test_a_wrong_policy_leaves_nothing(bed: Bed, change: Callable[[Any], Any], word: str) -> None:
    response = await bed.upload("gate", json.dumps(change(bed.document())).encode(), "policies")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "policy_invalid")
    assert word in error["message"]
    assert str(bed.house.store.root) not in error["message"]
    assert leftovers(bed) == []


async def test_what_is_no_policy_at_all(bed: Bed) -> None:
    counted = bed.house.context.telemetry.registry.get_sample_value
    for number, content in enumerate((b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * 3_000_001), 1):
        response = await bed.upload("gate", content, "policies")
        code = "body_too_large" if len(content) > 3_000_000 else "policy_invalid"
        assert response.json()["error"]["code"] == code
        assert leftovers(bed) == []
        rejected = [
            counted("deltaworks_policy_uploads_total", {"outcome": "rejected", "reason": reason})
            for reason in ("format", "too_large")
        ]
        assert sum(rejected) == number
    bad = await bed.upload("gate", json.dumps(bed.document()).encode(), "policies", sha256="0" * 64)
    assert bad.json()["error"]["code"] == "digest_mismatch"


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("PUT", "/alias")])
async def test_unknown_name_is_404(admin: httpx.AsyncClient, method: str, path: str) -> None:
    sent = {"digest": "0" * 64, "expected_generation": 0} if method == "PUT" else None
    response = await admin.request(method, f"{POLICIES}/nobody{path}", json=sent)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "policy_not_found")


async def test_policies_take_an_admin_key(bed: Bed) -> None:
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/a"), ("DELETE", "/a"), ("PUT", "/a/alias")):
        assert (await bed.client.request(method, f"{POLICIES}{path}")).status_code == 403


async def test_deletion_waits_for_no_request_and_costs_none(bed: Bed, admin: httpx.AsyncClient) -> None:
    """A request that waits for its delta has not read its policy yet, and goes on without."""
    red = (await bed.upload("red", b"1")).json()["digest"]
    await bed.policy(**STATIC, model={"delta_digest": red})
    bed.house.engine.hold_loads = True
    running = asyncio.create_task(bed.client.post("/v1/chat/completions", json=bed.body(model="red")))
    while not bed.house.engine.loads:
        await asyncio.sleep(0.005)
    assert (await admin.delete(f"{POLICIES}/gate")).status_code == 204
    assert bed.house.store.objects() == [red]
    bed.house.engine.hold_loads = False
    response = await running
    assert (response.status_code, head(response)) == (200, ("allow", "gate_error"))


async def test_a_profile_that_a_policy_reads_stays_as_long_as_it(bed: Bed, admin: httpx.AsyncClient) -> None:
    digest = (await bed.upload("knows", b"{}", "profiles")).json()["digest"]
    await bed.upload("twin", b"{}", "profiles")
    scored = {**stage("draft"), "name": "hidden", "features": [{"name": "hidden.score", "mean": 0, "std": 1}]}
    await bed.policy("gate", stages=[scored], probes={"order": ["hidden"], "hidden_profile": digest})
    assert (await admin.delete("/v1/admin/profiles/twin")).status_code == 204  # the other name keeps the bytes
    refused = await admin.delete("/v1/admin/profiles/knows")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "profile_in_use")
    assert "policy 'gate'" in refused.json()["error"]["message"]
    assert (await admin.delete(f"{POLICIES}/gate")).status_code == 204
    assert (await admin.delete("/v1/admin/profiles/knows")).status_code == 204


async def test_names_outlive_a_restart(bed: Bed, admin: httpx.AsyncClient, build: Callable[..., Any]) -> None:
    await bed.policy("gate", **STATIC)
    await bed.policy("gate", **STATIC, explore=1.0)
    before = (await admin.get(POLICIES)).json()
    reborn = build()
    await reborn.gateway.start()
    async with reborn.client(ADMIN) as second:
        assert (await second.get(POLICIES)).json() == before
        response = await second.post("/v1/chat/completions", json=bed.body())
        assert head(response) == ("allow", "explored")


async def test_a_damaged_name_stops_the_start(bed: Bed, build: Callable[..., Any]) -> None:
    digest = await bed.policy(**STATIC)
    ref = bed.house.store.root / "refs" / "policy" / "gate.json"
    good = ref.read_bytes()
    ref.write_bytes(good[:-9])
    with pytest.raises(StoreError, match=r"gate\.json is damaged"):
        build()
    ref.write_bytes(good)
    bed.house.store.object_path(digest).unlink()
    with pytest.raises(StoreError, match="which policy 'gate' refers to"):
        build()


async def test_bytes_shared_with_another_kind_stay(bed: Bed, admin: httpx.AsyncClient) -> None:
    content = json.dumps(bed.document(**STATIC)).encode()
    for plural in ("policies", "deltas"):
        assert (await bed.upload("one", content, plural)).status_code == 201
    assert (await admin.delete("/v1/admin/deltas/one")).status_code == 204
    assert head(await bed.ask())[0] == "suppress"
    assert (await admin.delete(f"{POLICIES}/one")).status_code == 204
    assert leftovers(bed) == []
