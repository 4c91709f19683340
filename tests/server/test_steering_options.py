"""How an edit is served: what goes out where it cannot be made, the comparison with the plain answer, the short report."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.engine.base import EditReport, EditUnavailableError, EngineDeadError, EngineLoadError

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = {"profile": "knowledge", "direction": "use_context"}
IGNORE = {**GOOD, "on_unavailable": "ignore"}
COMPARE = {**GOOD, "compare": True}
EDITS = {
    "edits": [{"sae": "l13", "features": [{"id": 7, "op": "ablate"}], "apply": {"prompt": None, "generation": "all"}}]
}


def text(prompt: Any = "abcdef", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "prompt": prompt, "temperature": 0, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], **fields}


def frames(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def unapplied(report: EditReport) -> EditReport:
    return replace(report, applied=False, positions=(), layers=())


async def rows_running(house: Any, count: int) -> None:
    async with asyncio.timeout(5):
        while len(house.engine.running) < count:
            await asyncio.sleep(0.005)


@pytest.fixture
async def stocked(upload: Any) -> None:
    assert (await upload("knowledge", b'{"model_name": "p"}', "profiles")).status_code == 201
    assert (await upload("l13", b"{}", "saes")).status_code == 201


# on_unavailable

ENGINE_ERRORS = [
    (EditUnavailableError("the model has no decoder layers that can be edited"), "no decoder layers"),
    (EngineLoadError("a path that nobody should see"), "could not load"),
]


@pytest.mark.parametrize(("error", "reason"), ENGINE_ERRORS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_edit_that_cannot_be_loaded_gives_the_plain_answer_where_the_client_allows_it(
    client: httpx.AsyncClient, house: Any, stocked: None, error: Exception, reason: str, stream: bool
) -> None:
    plain = (await client.post(CHAT, json=chat())).json()
    house.engine.edit_error = error
    response = await client.post(CHAT, json=chat(steering=IGNORE, conflict={}, stream=stream))
    assert response.status_code == 200, response.text
    body = frames(response)[-2] if stream else response.json()
    shown = body["gateway"]
    assert house.engine.asked == [None, None]
    assert body["system_fingerprint"] == plain["system_fingerprint"]
    steering = shown["steering"]
    assert (steering["applied"], steering["fingerprint"], steering["cache_key_scope"]) == (False, None, "shared")
    assert (steering["positions"], steering["layers"], shown["conflict"]) == ([], [], None)
    assert reason in steering["reason"]
    assert [warning["code"] for warning in shown["warnings"]] == ["not_steered", "not_scored"]
    assert reason in shown["warnings"][0]["message"]
    assert "nobody should see" not in response.text
    if stream:
        assert frames(response)[0]["gateway"]["steering"] == steering
    else:
        assert body["choices"] == plain["choices"]
    assert house.idle()


async def test_no_room_for_an_edit_gives_the_plain_answer_after_the_wait(
    client: httpx.AsyncClient, house: Any, stocked: None, admin: httpx.AsyncClient
) -> None:
    house.engine.block_at = 1
    strengths = [{**GOOD, "strength": strength} for strength in (2, 3)]
    running = [asyncio.create_task(client.post(COMPLETIONS, json=text(steering=one))) for one in strengths]
    await rows_running(house, 2)
    async with asyncio.timeout(5):
        refused = await client.post(COMPLETIONS, json=text(steering={**GOOD, "strength": 1}))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "edit_capacity")
    house.engine.block_at = None
    found = await client.post(COMPLETIONS, json=text(steering={**IGNORE, "strength": 1}))
    assert found.status_code == 200, found.text
    assert "no room for the edit" in found.json()["gateway"]["steering"]["reason"]
    house.engine.block_at = 1
    waiting = asyncio.create_task(client.post(COMPLETIONS, json=text(steering={**IGNORE, "strength": 1})))
    await rows_running(house, 3)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert (await admin.delete("/v1/admin/profiles/knowledge")).status_code == 204  # a plain answer holds no profile
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert house.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_edit_that_the_engine_leaves_out_is_answered_plainly_by_other_rows(
    client: httpx.AsyncClient, house: Any, stocked: None, stream: bool
) -> None:
    """Also where the first of several prompts was edited: nothing of its report is shown."""
    strong = lambda report: replace(report, layers=(replace(report.layers[0], rel_norm=2.0),))  # noqa: E731
    house.engine.spoil = lambda report: strong(report) if report.positions == (2,) else unapplied(report)
    response = await client.post(COMPLETIONS, json=text(["abc", "abcdef"], steering=IGNORE, stream=stream))
    assert response.status_code == 200, response.text
    assert [edit is None for edit in house.engine.asked] == [False, False, True, True]
    assert len(set(house.engine.rows)) == 4
    shown = (frames(response)[-2] if stream else response.json())["gateway"]
    assert (shown["steering"]["applied"], shown["steering"]["layers"]) == (False, [])
    assert [warning["code"] for warning in shown["warnings"]] == ["not_steered"]
    if not stream:
        assert [choice["text"] for choice in response.json()["choices"]] == ["base one two"] * 2
        usage = response.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 6)
    assert house.idle()


async def test_what_is_found_out_too_late_or_has_no_edit_stays_an_error(
    client: httpx.AsyncClient, house: Any, stocked: None
) -> None:
    house.engine.spoil = unapplied
    late = await client.post(COMPLETIONS, json=text(steering={**EDITS, "on_unavailable": "ignore"}))
    assert (late.status_code, late.json()["error"]["code"]) == (409, "edit_not_applied")
    house.engine.edit_error = EngineLoadError("no")
    only_scored = text(steering={**IGNORE, "strength": 0}, conflict={})
    found = await client.post(COMPLETIONS, json=only_scored)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "edit_load_failed")
    for steering, status in (
        ({**IGNORE, "direction": "up"}, 400),
        ({**IGNORE, "profile": "nobody"}, 404),
        ({**IGNORE, "strength": 9}, 400),
        ({"edits": EDITS["edits"], "on_unavailable": "maybe"}, 400),
        ({**EDITS["edits"][0], "on_unavailable": "ignore"}, 400),
    ):
        assert (await client.post(COMPLETIONS, json=text(steering=steering))).status_code == status
    outside = {"edits": [{**EDITS["edits"][0], "apply": {"prompt": {"positions": [99]}}}], "on_unavailable": "ignore"}
    assert (await client.post(COMPLETIONS, json=text(steering=outside))).status_code == 400
    house.engine.edit_error = EngineDeadError("gone")
    dead = await client.post(COMPLETIONS, json=text(steering=IGNORE))
    assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_dead")


async def test_by_default_and_by_null_it_is_an_error(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    house.engine.edit_error = EngineLoadError("no")
    for value in ("error", None):
        found = await client.post(COMPLETIONS, json=text(steering={**GOOD, "on_unavailable": value}))
        assert found.status_code == 500


async def test_it_is_counted_apart(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    house.engine.edit_error = EngineLoadError("no")
    await client.post(COMPLETIONS, json=text(steering=IGNORE))
    counted = 'deltaworks_steering_requests_total{mode="profile",outcome="unavailable"} 1.0'
    assert counted in (await client.get("/metrics")).text


# compare


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_comparison_is_the_steered_and_the_plain_request(
    client: httpx.AsyncClient, house: Any, stocked: None, path: str
) -> None:
    make = chat if path == CHAT else text
    options = {"temperature": 0.5, "seed": 3, "cache_salt": "mine", "max_tokens": 2}
    steered = (await client.post(path, json=make(**options, steering=GOOD))).json()
    plain = (await client.post(path, json=make(**options))).json()
    both = (await client.post(path, json=make(**options, steering=COMPARE, n=1))).json()
    assert [(choice["index"], choice.pop("steering")) for choice in both["choices"]] == [(0, "applied"), (1, "default")]
    assert both["choices"] == [steered["choices"][0], {**plain["choices"][0], "index": 1}]
    assert house.engine.calls[2:] == house.engine.calls[:2]
    assert house.engine.asked[2:] == house.engine.asked[:2]
    assert house.engine.asked[1] is None
    for key, count in both["usage"].items():
        if key != "prompt_tokens_details":
            assert count == steered["usage"][key] + plain["usage"][key]
    assert both["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert both["gateway"]["steering"] == steered["gateway"]["steering"]
    assert "steering" not in steered["choices"][0]
    assert house.idle()


@pytest.mark.parametrize("make", [chat, text])
async def test_streamed_comparison_interleaves_two_labelled_choices(
    client: httpx.AsyncClient, house: Any, stocked: None, make: Any
) -> None:
    path = CHAT if make is chat else COMPLETIONS
    body = make(steering=COMPARE, stream=True, stream_options={"include_usage": True})
    *chunks, done = frames(await client.post(path, json=body))
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert {(choice["index"], choice["steering"]) for choice in choices} == {(0, "applied"), (1, "default")}
    texts = dict.fromkeys((0, 1), "")
    for choice in choices:
        texts[choice["index"]] += choice["delta"].get("content", "") if make is chat else choice["text"]
    assert texts == dict.fromkeys((0, 1), "base one two")
    order = [choice["index"] for choice in choices]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)
    assert [choice["index"] for choice in choices if choice["finish_reason"]] in ([0, 1], [1, 0])
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert [index for index, chunk in enumerate(chunks) if "gateway" in chunk] == [0, len(chunks) - 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_comparison_with_an_edit_that_was_not_made_is_an_error_before_the_first_token(
    client: httpx.AsyncClient, house: Any, stocked: None, stream: bool
) -> None:
    house.engine.spoil = unapplied
    response = await client.post(COMPLETIONS, json=text(steering=COMPARE, stream=stream))
    assert (response.status_code, response.json()["error"]["code"]) == (409, "edit_not_applied")
    assert house.idle()


async def test_labels_say_what_was_not_edited(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    async def labels(**steering: Any) -> list[Any]:
        body = (await client.post(COMPLETIONS, json=text(steering=steering))).json()
        return [choice["steering"] for choice in body["choices"]]

    assert await labels(**COMPARE, strength=0) == ["not_applied", "default"]
    assert await labels(**EDITS, compare=True) == ["applied", "default"]
    house.engine.edit_error = EngineLoadError("no")
    assert await labels(**IGNORE, strength=1, compare=True) == ["not_applied", "default"]
    house.engine.edit_error = None
    streamed = frames(await client.post(COMPLETIONS, json=text(steering={**EDITS, "compare": True}, stream=True)))
    labelled = [choice for chunk in streamed[:-1] for choice in chunk["choices"]]
    assert {(choice["index"], choice["steering"]) for choice in labelled} == {(0, None), (1, "default")}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steering": COMPARE, "n": 2}, "n"),
        ({"steering": {**COMPARE, "compare": 1}}, "steering.compare"),
        ({"steering": COMPARE, "conflict": {"policy": {"if_at_least": 0.5, "then": GOOD}}}, "conflict.policy"),
    ],
)
async def test_what_cannot_be_compared_is_400(
    client: httpx.AsyncClient, house: Any, stocked: None, fields: dict[str, Any], param: str
) -> None:
    for path, body in ((CHAT, chat(**fields)), (COMPLETIONS, text(**fields))):
        error = (await client.post(path, json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", param)
    assert house.engine.calls == []


async def test_comparison_needs_one_prompt(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    for prompt, status in ((["abc", "abc"], 400), ([[1, 2], [3]], 400), (["abc"], 200), ([1, 2], 200)):
        response = await client.post(COMPLETIONS, json=text(prompt, steering=COMPARE))
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["param"] == "prompt"


async def test_comparison_takes_two_permits(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    house.engine.block_at = 1
    running = asyncio.create_task(client.post(COMPLETIONS, json=text(steering=COMPARE)))
    await rows_running(house, 2)
    assert house.context.admission.rows == 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert house.idle()


# return


async def test_the_report_can_be_left_out(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    async def shown(returned: Any, stream: bool = False) -> dict[str, Any]:
        response = await client.post(CHAT, json=chat(steering={**GOOD, "return": returned}, stream=stream))
        assert response.status_code == 200, response.text
        body = frames(response)[0] if stream else response.json()
        steering: dict[str, Any] = body["gateway"]["steering"]
        return steering

    full = await shown({"report": True})
    assert full == await shown({}) == await shown(None)
    assert full["positions"]
    assert full["layers"]
    expected = {key: value for key, value in full.items() if key not in ("positions", "layers")}
    assert await shown({"report": False}) == await shown({"report": False}, stream=True) == expected
    for wrong, param in (({"rapport": True}, "return.rapport"), ({"report": "no"}, "return.report"), (True, "return")):
        error = (await client.post(CHAT, json=chat(steering={**GOOD, "return": wrong}))).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", f"steering.{param}")
    error = (await client.post(CHAT, json=chat(steering={**GOOD, "returned": {"report": True}}))).json()["error"]
    assert error["param"] == "steering.returned"
