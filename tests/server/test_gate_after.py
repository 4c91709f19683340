"""Placement post: the answer is held back, its calls are judged, and it is asked again where they are not needed."""

import json
from typing import Any

import pytest

from tests.server.fake_engine import Said
from tests.server.gate_bed import CALL, EASY, HARD, STATIC, SURE, UNSURE, Bed, chunks_of, head, message_of, text_of
from tests.steering.gate_world import called

pytestmark = pytest.mark.anyio

POST = {"placement": "post"}
NEW = Said(("It is", " 5."))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_needless_call_is_asked_again_without_tools(bed: Bed, stream: bool) -> None:
    await bed.policy(**POST)
    bed.say(main=Said(("Well, ", CALL)), draft=SURE, **{"again1-0": NEW})
    response = await bed.ask(HARD, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    assert head(response) == ("suppress", "confident_without_tool")
    assert bed.kinds == ["0", "draft", "again1-0"]
    assert [bed.prompt(place) for place in (0, 2)] == [f"calculator;||u:{HARD}\n", f"u:{HARD}\n"]
    chunks = chunks_of(response) if stream else [response.json()]
    assert (text_of(chunks) if stream else message_of(response)["content"]) == "It is 5."
    assert "tool_calls" not in json.dumps(chunks).replace("x-tool", "")
    body = chunks[-1]
    told = body["gateway"]["tool_gate"]
    assert told["placement"] == "post"
    plain = len(f"u:{HARD}\n")
    assert told["probe_usage"] == {
        "prompt_tokens": len(f"calculator;||u:{HARD}\n") + plain,
        "completion_tokens": 2 + 1,
    }
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (plain, 2)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_needed_call_goes_out(bed: Bed, stream: bool) -> None:
    await bed.policy(**POST)
    bed.say(main=Said((CALL,)), draft=UNSURE)
    response = await bed.ask(HARD, stream=stream)
    assert head(response) == ("allow", "uncertain")
    assert bed.kinds == ["0", "draft"]
    if stream:
        deltas = [choice["delta"] for chunk in chunks_of(response) for choice in chunk["choices"]]
        assert [delta["tool_calls"][0]["function"]["name"] for delta in deltas if "tool_calls" in delta] == [
            "calculator"
        ]
    else:
        assert message_of(response)["tool_calls"][0]["function"]["name"] == "calculator"
        assert response.json()["gateway"]["tool_gate"]["probe_usage"]["completion_tokens"] == 1


async def test_an_answer_without_a_gateable_call_asks_no_probe(bed: Bed) -> None:
    await bed.policy(**POST)
    bed.say(main=Said(("It is 5.",)))
    assert head(await bed.ask(HARD)) == ("allow", "not_gateable")
    assert bed.kinds == ["0"]
    bed.say(main=Said((CALL.replace("calculator", "send_mail"),)))
    response = await bed.ask(HARD, ("calculator", "send_mail"))
    assert (head(response), bed.kinds) == (("allow", "not_gateable"), ["0"])
    assert message_of(response)["tool_calls"]


async def test_a_call_that_was_made_before(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST)
    bed.say(main=Said((CALL,)), **{"again1-0": NEW})
    history = [{"role": "user", "content": HARD}, *called(("calculator", '{"expression": "1+1"}'))]
    response = await bed.ask(messages=history)
    assert head(response) == ("suppress", "repeated_call")
    assert message_of(response)["content"] == "It is 5."
    history[1]["tool_calls"][0]["function"]["arguments"] = "{}"
    response = await bed.ask(messages=history)
    assert (head(response), bed.kinds) == (("allow", "uncertain"), ["0"])
    assert message_of(response)["tool_calls"]


async def test_other_tools_stay_in_what_is_asked_again(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST)
    bed.say(main=Said((CALL,)), **{"again1-0": NEW})
    response = await bed.ask(EASY, ("calculator", "send_mail"))
    assert head(response)[0] == "narrow"
    assert bed.prompt(1).startswith("send_mail;|")
    assert message_of(response)["content"] == "It is 5."


async def test_only_choices_that_call_are_asked_again(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST)
    bed.house.engine.texts = {0: ("a",), 1: (CALL,), 2: ("c",)}
    bed.say(**{"again1-0": NEW})
    body = (await bed.ask(n=3)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "It is 5.", "c"]
    assert bed.house.engine.calls[1][1].n == 1
    assert body["usage"]["completion_tokens"] == 1 + 2 + 1
    assert body["usage"]["prompt_tokens"] == len(bed.prompt(0))
    assert body["gateway"]["tool_gate"]["probe_usage"] == {
        "prompt_tokens": len(bed.prompt(1)),
        "completion_tokens": 1,
    }


async def test_a_draft_takes_the_place_of_the_call(bed: Bed) -> None:
    await bed.policy(**POST, suppress_mode="answer_from_draft")
    bed.say(main=Said((CALL,)), draft=SURE)
    body = (await bed.ask(HARD)).json()
    assert (body["choices"][0]["message"]["content"], bed.kinds) == ("80235", ["0", "draft"])
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(f"u:{HARD}\n"), 1)
    first = {"prompt_tokens": len(f"calculator;||u:{HARD}\n"), "completion_tokens": 1}
    assert body["gateway"]["tool_gate"]["probe_usage"] == first


async def test_a_queue_that_filled_up_meanwhile_refuses_no_half_answered_request(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST)
    admission = bed.house.context.admission

    def script(row: str) -> Said:
        if "-again" in row:
            return NEW
        admission.server.queued_tokens += 99
        return Said((CALL,))

    bed.house.engine.script = script
    response = await bed.client.post("/v1/chat/completions", json=bed.body())
    assert (response.status_code, head(response)) == (200, ("suppress", "confident_without_tool"))
    assert admission.queued_tokens == 99


async def test_a_leak_in_what_is_asked_again(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST, suppress_mode="tool_choice_none")
    bed.say(main=Said((CALL,)), **{"again1-0": Said((CALL,)), "again2-0": NEW})
    response = await bed.ask()
    assert message_of(response)["content"] == "It is 5."
    assert (bed.kinds, response.json()["gateway"]["tool_gate"]["leak"]) == (["0", "again1-0", "again2-0"], True)
    with_tools = len(f"calculator;||u:{EASY}\n")
    told = response.json()["gateway"]["tool_gate"]
    assert told["probe_usage"] == {"prompt_tokens": 2 * with_tools, "completion_tokens": 2}
    assert response.json()["usage"]["prompt_tokens"] == len(f"u:{EASY}\n")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_choice": "none"}, "caller_forced"),
        ({"tool_choice": "none", "tool_gate": {"mode": "enforce", "policy": "gate"}}, "caller_forced"),
        ({"tool_gate": {"mode": "off"}}, "off"),
        ({"model": "red"}, "no_policy"),
        ({"tools": ("send_mail",)}, "not_gateable"),
    ],
)
async def test_what_is_settled_is_not_held_back(bed: Bed, fields: dict[str, Any], reason: str) -> None:
    await bed.upload("red", b"1")
    await bed.policy(**STATIC, **POST)
    bed.say(main=Said(("first ", "second ", "third")))
    bed.house.engine.fail_at = 2  # what was not held back is out by then
    response = await bed.ask(**fields, stream=True)
    assert head(response) == ("allow", reason)
    assert "second" in response.text
    assert "engine_error" in response.text
    assert bed.kinds == ["0"]


async def test_observing_after_the_answer_changes_nothing(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST)
    bed.say(main=Said((CALL,)))
    response = await bed.ask(tool_gate={"mode": "observe"})
    assert (head(response), bed.kinds) == (("suppress", "confident_without_tool"), ["0"])
    assert message_of(response)["tool_calls"]


async def test_what_would_be_required_is_there_already(bed: Bed) -> None:
    await bed.policy(**STATIC, **POST, thresholds={"suppress": 0.8, "require": 0.5})
    bed.say(main=Said((CALL,)))
    response = await bed.ask(HARD, tool_gate={"mode": "enforce", "allow_require": True})
    assert (head(response), bed.kinds) == (("require", "likely_underuse"), ["0"])
    assert message_of(response)["tool_calls"]
