"""How a suppression is carried out: tools dropped, kept but not to be called, or the draft as the answer."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import Said
from tests.server.gate_bed import CALL, EASY, HARD, STATIC, SURE, Bed, chunks_of, head, message_of, text_of

pytestmark = pytest.mark.anyio

DRAFT = {"suppress_mode": "answer_from_draft"}
NONE = {**STATIC, "suppress_mode": "tool_choice_none"}
SAID = Said(("80", "2", "35"), -0.01, (("80", -0.01), ("x", -5.0)))


async def calls_counted(bed: Bed) -> dict[str, float]:
    families = text_string_to_metric_families((await bed.client.get("/metrics")).text)
    found = [s for f in families for s in f.samples if s.name == "deltaworks_tool_calls_total"]
    return {sample.labels["outcome"]: sample.value for sample in found}


async def test_dropped_tools_leave_an_answer_of_text(bed: Bed) -> None:
    await bed.policy(**STATIC)
    bed.say(main=Said(("plain ", CALL)))
    response = await bed.ask()
    assert message_of(response) == {"role": "assistant", "content": f"plain {CALL}"}  # nothing reads calls of no tools
    assert bed.house.engine.calls[0][1].skip_special_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_draft_is_the_answer(bed: Bed, stream: bool) -> None:
    await bed.policy(**DRAFT)
    bed.say(draft=SAID)
    response = await bed.ask(HARD, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    assert head(response) == ("suppress", "confident_without_tool")
    assert bed.kinds == ["draft"]
    chunks = chunks_of(response) if stream else [response.json()]
    if stream:
        assert text_of(chunks) == "80235"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        assert response.json()["choices"][0]["message"]["content"] == "80235"
        assert response.json()["choices"][0]["logprobs"] is None
    last = chunks[-1]
    usage = {key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    prompt_tokens = len(f"u:{HARD}\n")
    assert usage == {"prompt_tokens": prompt_tokens, "completion_tokens": 3, "total_tokens": prompt_tokens + 3}
    told = last["gateway"]["tool_gate"]
    assert told["probe_usage"] == {"prompt_tokens": 0, "completion_tokens": 0}  # paid for once
    assert (told["tool_choice_out"], told["tools_removed"]) == (None, ["calculator"])
    assert last["gateway"]["timings"]["ttft_s"] > 0


async def test_a_draft_tells_the_log_probabilities_that_were_asked_for(bed: Bed) -> None:
    await bed.policy(**DRAFT)
    bed.say(draft=SAID)
    for wanted in (0, 1):
        response = await bed.ask(HARD, logprobs=True, top_logprobs=wanted)
        tokens = response.json()["choices"][0]["logprobs"]["content"]
        assert [(token["token"], len(token["top_logprobs"])) for token in tokens] == [
            (word, wanted) for word in SAID.words
        ]
        assert bed.kinds == ["draft"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 2},
        {"n": 2},
        {"stop": "02"},
        {"min_tokens": 4},
        {"ignore_eos": True},
        {"presence_penalty": 0.5},
        {"logprobs": True, "top_logprobs": 6},
    ],
)
async def test_a_draft_that_is_another_answer_is_none(bed: Bed, fields: dict[str, Any]) -> None:
    await bed.policy(**DRAFT)
    bed.say(draft=SAID, main=Said(("new",)))
    response = await bed.ask(HARD, **fields)
    assert bed.kinds == ["draft", "0"]
    assert bed.prompt(1) == f"u:{HARD}\n"
    assert message_of(response)["content"] == "new"
    assert response.json()["gateway"]["tool_gate"]["probe_usage"]["completion_tokens"] == 3


async def test_a_cut_draft_or_other_tools_or_a_score_take_an_answer_of_their_own(bed: Bed) -> None:
    await bed.policy(**DRAFT)
    await bed.upload("knowledge", b"{}", "profiles")
    bed.say(draft=Said(("long ",) * 9, -0.01), main=Said(("new",)))
    assert head(await bed.ask(HARD)) == ("suppress", "confident_without_tool")
    assert bed.kinds == ["draft", "0"]
    bed.say(draft=SAID, main=Said(("new",)))
    assert head(await bed.ask(HARD, ("calculator", "send_mail")))[0] == "narrow"
    assert bed.kinds == ["draft", "0"]
    assert (await bed.ask(HARD, conflict={"profile": "knowledge"})).json()["gateway"]["conflict"]["score"] == 0.5
    assert bed.kinds == ["draft", "0"]


async def test_choice_none_keeps_the_prompt(bed: Bed) -> None:
    await bed.policy(**NONE)
    bed.say(main=Said(("It is", " 5.")))
    response = await bed.ask()
    assert head(response) == ("suppress", "confident_without_tool")
    assert bed.prompt(0) == f"calculator;||u:{EASY}\n"
    assert not bed.house.engine.calls[0][1].skip_special_tokens  # a mark can be one
    assert message_of(response) == {"role": "assistant", "content": "It is 5."}
    told = response.json()["gateway"]["tool_gate"]
    assert (told["tool_choice_out"], told["leak"], bed.kinds) == ("none", False, ["0"])
    assert head(await bed.ask(EASY, ("calculator", "send_mail")))[0] == "narrow"
    assert bed.prompt(0).startswith("send_mail;|")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("It is 5. ", CALL), "It is 5. "),
        (("It is 5. ", CALL[:20], CALL[20:], " more"), "It is 5. "),
        (("It is 5.\n<tool_", "call>{broken", " and more"), "It is 5.\n"),
    ],
)
async def test_a_leaked_call_is_cut_out(bed: Bed, words: tuple[str, ...], text: str, stream: bool) -> None:
    await bed.policy(**NONE)
    bed.say(main=Said(words))
    response = await bed.ask(stream=stream)
    chunks = chunks_of(response) if stream else []
    body = chunks[-1] if stream else response.json()
    choice = body["choices"][0]
    assert (text_of(chunks) if stream else choice["message"]["content"]) == text
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in response.text
    assert (body["gateway"]["tool_gate"]["leak"], bed.kinds) == (True, ["0"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leaked", [(" \n", CALL), ("<tool_call>{broken",), (CALL[:9], CALL[9:], "tail")])
async def test_where_only_a_call_is_left_it_is_asked_again(bed: Bed, leaked: tuple[str, ...], stream: bool) -> None:
    await bed.policy(**NONE)
    bed.say(main=Said(leaked), **{"again1-0": Said(("It is", " 5."))})
    response = await bed.ask(stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    assert bed.kinds == ["0", "again1-0"]
    assert bed.prompt(1) == f"u:{EASY}\n"
    chunks = chunks_of(response) if stream else [response.json()]
    text = text_of(chunks) if stream else chunks[0]["choices"][0]["message"]["content"]
    assert text == "It is 5."
    body = chunks[-1]
    told = body["gateway"]["tool_gate"]
    first = len(f"calculator;||u:{EASY}\n")
    assert told["probe_usage"] == {"prompt_tokens": first, "completion_tokens": len(leaked)}
    assert told["leak"]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(f"u:{EASY}\n"), 2)
    counted = await calls_counted(bed)
    assert (counted["parsed"], counted["suppressed"]) == (0, 0 if "broken" in leaked[0] else 1)


async def test_of_several_choices_the_empty_ones_are_asked_again(bed: Bed) -> None:
    await bed.policy(**NONE)
    bed.house.engine.texts = {0: (CALL,), 1: ("fine",), 2: (CALL, "x"), 3: ("ok ", CALL)}
    bed.say(**{"again1-0": Said(("new",))})
    response = await bed.ask(n=4)
    choices = response.json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["new", "fine", "new", "ok "]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert bed.house.engine.calls[1][1].n == 2
    body = response.json()
    told = body["gateway"]["tool_gate"]
    assert told["probe_usage"] == {"prompt_tokens": len(f"u:{EASY}\n"), "completion_tokens": 3}
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(bed.prompt(0)), 1 + 2 + 2)
    assert (await calls_counted(bed))["suppressed"] == 3


async def test_an_empty_answer_is_no_leak(bed: Bed) -> None:
    await bed.policy(**NONE)
    bed.say(main=Said(("",)))
    response = await bed.ask()
    assert (message_of(response)["content"], bed.kinds) == ("", ["0"])
    assert not response.json()["gateway"]["tool_gate"]["leak"]


async def test_a_draft_counts_as_a_draft_where_it_allows(bed: Bed) -> None:
    await bed.policy(**DRAFT)
    bed.say(draft=Said(SAID.words, -0.3), main=SURE)
    told = await bed.told(HARD)
    assert (told["decision"], told["probe_usage"]["completion_tokens"], bed.kinds) == ("allow", 3, ["draft", "0"])
