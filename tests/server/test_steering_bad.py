"""Every wrong steering or conflict object is refused with the dotted field, before anything runs."""

import json
from typing import Any

import httpx
import pytest

from server.engine.base import EditUnavailableError, EngineDeadError, EngineLoadError

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = {"profile": "knowledge", "direction": "use_context"}


def edits(*features: Any, sae: Any = "l13", **apply: Any) -> dict[str, Any]:
    return {"edits": [{"sae": sae, "features": list(features), "apply": apply}]}


def feature(**fields: Any) -> dict[str, Any]:
    return {"id": 1, "op": "raise", "value": 1.0, **fields}


INVALID, MISSING = "invalid_value", "missing_parameter"
BAD_STEERING = [
    ([], INVALID, "steering"),
    ("knowledge", INVALID, "steering"),
    ({}, MISSING, "steering.profile"),
    ({"profile": "knowledge"}, MISSING, "steering.direction"),
    ({"direction": "use_context"}, MISSING, "steering.profile"),
    ({**GOOD, "profile": ["knowledge", "other"]}, INVALID, "steering.profile"),
    ({**GOOD, "profile": ""}, INVALID, "steering.profile"),
    ({**GOOD, "profil": "x"}, INVALID, "steering.profil"),
    ({**GOOD, "edits": []}, INVALID, "steering.profile"),
    ({"edits": [], "strength": 1}, INVALID, "steering.strength"),
    ({"edits": [], "layers": [1]}, INVALID, "steering.layers"),
    ({**GOOD, "strength": -0.1}, INVALID, "steering.strength"),
    ({**GOOD, "strength": 4.01}, INVALID, "steering.strength"),
    ({**GOOD, "strength": "2"}, INVALID, "steering.strength"),
    ({**GOOD, "strength": True}, INVALID, "steering.strength"),
    ({**GOOD, "strength_mode": "both"}, INVALID, "steering.strength_mode"),
    ({**GOOD, "direction": "use_magic"}, INVALID, "steering.direction"),
    ({**GOOD, "layers": []}, INVALID, "steering.layers"),
    ({**GOOD, "layers": [12, 12]}, INVALID, "steering.layers"),
    ({**GOOD, "layers": [12, 14]}, INVALID, "steering.layers"),
    ({**GOOD, "layers": [-1]}, INVALID, "steering.layers.0"),
    ({**GOOD, "layers": [12.0]}, INVALID, "steering.layers.0"),
    ({"edits": [{}]}, MISSING, "steering.edits.0.sae"),
    ({"edits": [{"sae": "l13"}]}, MISSING, "steering.edits.0.features"),
    ({"edits": [{"sae": "l13", "features": [], "layer": 3}]}, INVALID, "steering.edits.0.layer"),
    ({"edits": [{"sae": "l13", "features": []}] * 17}, INVALID, "steering.edits"),
    (edits(feature(id=-1)), INVALID, "steering.edits.0.features.0.id"),
    (edits(feature(id=64)), INVALID, "steering.edits.0.features.0.id"),
    (edits(feature(id=1.0)), INVALID, "steering.edits.0.features.0.id"),
    (edits(feature(), feature(value=2)), INVALID, "steering.edits.0.features.1.id"),
    (edits(feature(op="boost")), INVALID, "steering.edits.0.features.0.op"),
    (edits(feature(value=None)), MISSING, "steering.edits.0.features.0.value"),
    (edits(feature(value=1e7)), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value=-1)), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(op="ablate")), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(op="ablate", value={"x_max": 1})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(op="scale", value={"x_max": 1})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_max": -1})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_max": 100.5})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_max": "2"})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_max": True})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_max": 1, "raw": 1})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value={"x_min": 1})), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(), feature(id=2, value={"x_max": 1})), INVALID, "steering.edits.0.features.1.value"),  # no maxima
    (edits(feature(value=True)), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(value="1")), INVALID, "steering.edits.0.features.0.value"),
    (edits(feature(vector=[1])), INVALID, "steering.edits.0.features.0.vector"),
    (edits(*(feature(id=n) for n in range(257))), INVALID, "steering.edits.0.features"),
    (edits(feature(), prompt="first"), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"positions": []}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"positions": [True]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"window": [1]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"window": [0, 1], "positions": [1]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"positions": [5]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"positions": [-6]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"window": [5, None]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), prompt={"window": [3, 3]}), INVALID, "steering.edits.0.apply.prompt"),
    (edits(feature(), generation="last"), INVALID, "steering.edits.0.apply.generation"),
    (edits(feature(), generation={"window": [-1, 2]}), INVALID, "steering.edits.0.apply.generation"),
    (edits(feature(), generation={"window": [2, 2]}), INVALID, "steering.edits.0.apply.generation"),
    (edits(feature(), decode="all"), INVALID, "steering.edits.0.apply.decode"),
    (
        {"edits": [*edits(feature())["edits"], *edits(feature(id=2), prompt="all")["edits"]]},
        INVALID,
        "steering.edits.1.apply",
    ),
    (
        {"edits": [*edits(feature())["edits"], *edits(feature(), sae="twin")["edits"]]},
        INVALID,
        "steering.edits.1.features.0.id",
    ),
]
THEN = {"policy": {"if_at_least": 0.5, "then": GOOD}}
BAD_CONFLICT = [
    ({"conflict": True}, INVALID, "conflict"),
    ({"conflict": {"scores": True}}, INVALID, "conflict.scores"),
    ({"conflict": {"score": 1}}, INVALID, "conflict.score"),
    ({"conflict": {}}, MISSING, "conflict.profile"),
    ({"conflict": {}, "steering": edits(feature())}, MISSING, "conflict.profile"),
    ({"conflict": {"profile": "blind"}}, INVALID, "conflict.profile"),
    ({"conflict": {}, "steering": {**GOOD, "profile": "blind"}}, INVALID, "steering.profile"),
    ({"conflict": {"policy": {"then": GOOD}}}, MISSING, "conflict.policy.if_at_least"),
    ({"conflict": {"policy": {"if_at_least": 1.5, "then": GOOD}}}, INVALID, "conflict.policy.if_at_least"),
    ({"conflict": {"policy": {"if_at_least": 0.5}}}, MISSING, "conflict.policy.then"),
    (
        {"conflict": {"policy": {"if_at_least": 0.5, "then": {"profile": "knowledge"}}}},
        MISSING,
        "conflict.policy.then.direction",
    ),
    (
        {"conflict": {"policy": {"if_at_least": 0.5, "then": {**GOOD, "strength": 9}}}},
        INVALID,
        "conflict.policy.then.strength",
    ),
    (
        {"conflict": {"policy": {"if_at_least": 0.5, "then": {**GOOD, "direction": "up"}}}},
        INVALID,
        "conflict.policy.then.direction",
    ),
    (
        {"conflict": {"policy": {"if_at_least": 0.5, "then": {**GOOD, "edits": []}}}},
        INVALID,
        "conflict.policy.then.edits",
    ),
    ({"conflict": {**THEN, "profile": "late"}}, INVALID, "conflict.policy.then"),
    ({"conflict": THEN, "steering": GOOD}, INVALID, "conflict.policy"),
    ({"extra_body": {"steering": GOOD}}, "unsupported_parameter", "extra_body"),
]


@pytest.fixture
async def stocked(upload: Any) -> None:
    late = {"probe": {"layer": 12, "threshold": 0.5, "auroc": 0.9}}
    profiles: list[tuple[str, dict[str, Any]]] = [("knowledge", {}), ("blind", {"probe": None}), ("late", late)]
    for name, facts in profiles:
        assert (await upload(name, json.dumps(facts).encode(), "profiles")).status_code == 201
    for name in ("l13", "twin"):  # two names of one file
        assert (await upload(name, b'{"layer": 13}', "saes")).status_code == 201


async def refused(client: httpx.AsyncClient, house: Any, fields: dict[str, Any], stream: bool = False) -> Any:
    """The error of a chat and of a completion, which must be the same; nothing may have run."""
    messages = [{"role": "user", "content": "hi"}]
    chat = await client.post(CHAT, json={"model": "tiny-base", "messages": messages, "stream": stream, **fields})
    completion = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "abcde", **fields})
    assert (completion.status_code, completion.json()) == (chat.status_code, chat.json())
    assert house.engine.calls == []
    assert house.idle()
    return (
        chat.status_code,
        chat.json()["error"]["code"],
        chat.json()["error"]["param"],
        chat.json()["error"]["message"],
    )


@pytest.mark.parametrize(("steering", "code", "param"), BAD_STEERING)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_steering_is_400(
    client: httpx.AsyncClient, house: Any, stocked: None, steering: Any, code: str, param: str, stream: bool
) -> None:
    assert (await refused(client, house, {"steering": steering}, stream))[:3] == (400, code, param)


@pytest.mark.parametrize(("fields", "code", "param"), BAD_CONFLICT)
async def test_bad_conflict_is_400(
    client: httpx.AsyncClient, house: Any, stocked: None, fields: dict[str, Any], code: str, param: str
) -> None:
    assert (await refused(client, house, fields))[:3] == (400, code, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["strength", "value", "factor", "if_at_least"])
async def test_numbers_that_are_none_are_400(
    client: httpx.AsyncClient, house: Any, stocked: None, number: str, field: str
) -> None:
    objects = {
        "strength": {"steering": {**GOOD, "strength": "HERE"}},
        "value": {"steering": edits(feature(value="HERE"))},
        "factor": {"steering": edits(feature(value={"x_max": "HERE"}))},
        "if_at_least": {"conflict": {"policy": {"if_at_least": "HERE", "then": GOOD}}},
    }
    body = json.dumps({"model": "tiny-base", "prompt": "a", **objects[field]}).replace('"HERE"', number)
    response = await client.post(COMPLETIONS, content=body.encode())
    assert response.status_code == 400
    named = {"factor": "value"}.get(field, field)
    assert response.json()["error"]["param"] is None or response.json()["error"]["param"].endswith(named)
    assert house.engine.calls == []


async def test_unknown_names_are_404_and_list_nothing(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    for fields, code, param in (
        ({"steering": {**GOOD, "profile": "nobody"}}, "profile_not_found", "steering.profile"),
        ({"steering": {**GOOD, "profile": "nobody", "strength": 0}}, "profile_not_found", "steering.profile"),
        ({"steering": {**GOOD, "profile": "l13"}}, "profile_not_found", "steering.profile"),
        ({"steering": {**GOOD, "profile": "../../etc/passwd"}}, "profile_not_found", "steering.profile"),
        ({"steering": edits(feature(), sae="nobody")}, "sae_not_found", "steering.edits.0.sae"),
        ({"steering": edits(sae="nobody")}, "sae_not_found", "steering.edits.0.sae"),
        ({"conflict": {"profile": "nobody"}}, "profile_not_found", "conflict.profile"),
        (
            {"conflict": {"policy": {"if_at_least": 0.5, "then": {**GOOD, "profile": "nobody"}}}},
            "profile_not_found",
            "conflict.policy.then.profile",
        ),
    ):
        *found, message = await refused(client, house, fields)
        assert found == [404, code, param]
        assert "knowledge" not in message


async def test_messages_help(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    for steering, words in (
        ({**GOOD, "direction": "up"}, "it has: use_context, use_parameter"),
        ({**GOOD, "strength": 5}, "limit of 4"),
        ({**GOOD, "layers": [14]}, r"layer 14 is none of the direction's layers [12, 13]"),
        (edits(feature(id=64)), "features 0 to 63"),
        ({**GOOD, "edits": []}, "not both"),
        (
            edits(feature(value={"x_max": 1})),
            "records no maxima of its latents: give a plain number, or upload it packed",
        ),
        (edits(feature(op="scale", value={"x_max": 1})), "plain factor"),
        (edits(feature(), prompt={"positions": [9]}), "outside the prompt of 5 tokens"),
    ):
        assert words in (await refused(client, house, {"steering": steering}))[3]


async def test_error_stays_small_whatever_is_sent(client: httpx.AsyncClient, stocked: None) -> None:
    for steering in ({"x" * 9000: 1}, {**GOOD, "direction": "x" * 9000}, edits(*[{"x" * 20: 1}] * 200)):
        response = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "a", "steering": steering})
        assert response.status_code == 400
        assert len(response.content) < 4000


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EditUnavailableError("the model has no decoder layers that can be edited"), 409, "edit_unavailable"),
        (EngineLoadError("a path that nobody should see"), 500, "edit_load_failed"),
        (EngineDeadError("gone"), 503, "engine_dead"),
    ],
)
async def test_what_the_engine_refuses(
    client: httpx.AsyncClient, house: Any, stocked: None, error: Exception, status: int, code: str
) -> None:
    house.engine.edit_error = error
    assert (await refused(client, house, {"steering": GOOD}))[:2] == (status, code)
    house.engine.edit_error = None
    body = {"model": "tiny-base", "prompt": "a", "steering": GOOD}
    assert (await client.post(COMPLETIONS, json=body)).status_code == 200  # a failure is not remembered


async def test_artifacts_of_an_earlier_base_are_409(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    """The store may outlive the base that its artifacts were checked against."""
    await upload("knowledge", b'{"base_fingerprint": "sha256:01d"}', "profiles")
    await upload("l13", b'{"base_fingerprint": "sha256:01d"}', "saes")
    found = await refused(client, house, {"steering": GOOD})
    assert found[:3] == (409, "profile_base_mismatch", "steering.profile")
    found = await refused(client, house, {"steering": edits(feature())})
    assert found[:3] == (409, "sae_base_mismatch", "steering.edits.0.sae")
