"""The tool gate in the request path: which policy decides, what is asked for it, and what the caller is told."""

import json
from typing import Any

import httpx
import pytest

from steering.gate.signals import ptrue_messages
from tests.server.fake_engine import Said
from tests.server.gate_bed import (
    CALL,
    EASY,
    HARD,
    HOPELESS,
    STATIC,
    SURE,
    UNSURE,
    Bed,
    chunks_of,
    head,
    message_of,
    text_of,
)
from tests.steering.gate_world import called, stage

pytestmark = pytest.mark.anyio


async def test_a_request_without_tools_knows_no_gate(bed: Bed) -> None:
    await bed.policy(**STATIC)
    response = await bed.ask(tools=())
    assert not [name for name in response.headers if name.startswith("x-tool-gate")]
    assert response.json()["gateway"]["tool_gate"] is None
    assert bed.kinds == ["0"]


async def test_it_is_off_by_default(bed: Bed) -> None:
    await bed.policy(**STATIC)
    response = await bed.ask(tool_gate=None)
    assert head(response) == ("allow", "off")
    assert response.headers["x-tool-gate-policy"] == "none"
    told = response.json()["gateway"]["tool_gate"]
    assert (told["mode"], told["decision"], told["reason"], told["policy"]) == ("off", "allow", "off", None)
    assert bed.prompt(0) == f"calculator;||u:{EASY}\n"
    assert bed.kinds == ["0"]


async def test_no_policy_allows(bed: Bed) -> None:
    assert head(await bed.ask()) == ("allow", "no_policy")
    await bed.policy(model={"delta_digest": "d" * 64}, **STATIC)  # for another model
    response = await bed.ask()
    assert head(response) == ("allow", "no_policy")
    assert response.headers["x-tool-gate-policy"] == "none"


async def test_a_static_policy_decides_without_the_engine(bed: Bed) -> None:
    await bed.policy("mine", **STATIC)
    response = await bed.ask()
    assert head(response) == ("suppress", "confident_without_tool")
    assert bed.kinds == ["0"]
    assert bed.prompt(0) == f"u:{EASY}\n"
    told = response.json()["gateway"]["tool_gate"]
    assert told.pop("latency_ms") > 0
    assert told.pop("score") == pytest.approx(0.8808, abs=1e-4)
    assert told == {
        "mode": "enforce",
        "decision": "suppress",
        "reason": "confident_without_tool",
        "threshold": 0.8,
        "policy": "mine",
        "policy_id": response.headers["x-tool-gate-policy"],
        "placement": "pre",
        "tool_choice_in": "auto",
        "tool_choice_out": None,
        "tools_removed": ["calculator"],
        "budget": None,
        "probe_usage": {"prompt_tokens": 0, "completion_tokens": 0},
        "leak": False,
        "explored": False,
        "propensity": 1.0,
    }
    assert len(told["policy_id"]) == 64


async def test_what_is_not_sure_keeps_its_tools(bed: Bed) -> None:
    await bed.policy(**STATIC)
    bed.house.engine.texts[0] = (CALL,)
    response = await bed.ask(HARD)
    assert head(response) == ("allow", "uncertain")
    assert message_of(response)["tool_calls"][0]["function"]["name"] == "calculator"
    told = response.json()["gateway"]["tool_gate"]
    assert (told["tool_choice_out"], told["tools_removed"]) == ("auto", [])
    assert bed.kinds == ["0"]
    assert bed.prompt(0) == f"calculator;||u:{HARD}\n"


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (SURE, ("suppress", "confident_without_tool")),
        (UNSURE, ("allow", "uncertain")),
        (HOPELESS, ("allow", "needs_tool")),
    ],
)
async def test_a_draft_decides(bed: Bed, said: Said, outcome: tuple[str, str]) -> None:
    await bed.policy()
    bed.say(draft=said)
    response = await bed.ask(HARD)
    assert head(response) == outcome
    assert bed.kinds == ["draft", "0"]
    (ids, sampling, delta, salt), main = bed.house.engine.calls
    assert bytes(ids).decode() == f"u:{HARD}\n"
    assert (sampling.max_tokens, sampling.temperature, sampling.logprobs, sampling.n) == (8, 0, 5, 1)
    assert (delta, salt) == (None, None)
    assert bytes(main[0]).decode().startswith("u:" if outcome[0] == "suppress" else "calculator;")
    body = response.json()
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
    assert body["gateway"]["tool_gate"]["probe_usage"] == usage
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(main[0]), 3)


async def test_a_draft_is_left_when_it_can_decide_nothing_any_more(bed: Bed) -> None:
    await bed.policy()
    bed.say(draft=Said(("I", " guess", " 80235"), -1.0))  # the mean of 8 tokens can still rise, up to -0.125
    told = await bed.told(HARD, tool_gate={"mode": "enforce", "explain": True})
    assert (told["decision"], told["stopped"]) == ("allow", True)
    assert told["score"] < told["threshold"]
    assert told["probe_usage"]["completion_tokens"] == 2  # after two, -0.25 is the best that can come
    assert (bed.kinds, bed.house.engine.running) == (["draft", "0"], set())
    bed.say(draft=Said(("80", "2", "35"), -0.01))
    told = await bed.told(HARD, tool_gate={"mode": "enforce", "explain": True})
    assert (told["decision"], told["stopped"], told["probe_usage"]["completion_tokens"]) == ("suppress", False, 3)


async def test_every_probe_is_asked_in_its_own_words(bed: Bed) -> None:
    order = ["peek", "hidden", "draft", "ptrue", "samples"]
    profile = (await bed.upload("knows", b"{}", "profiles")).json()["digest"]
    probes = {"order": order, "k": 3, "temperature": 0.9, "max_tokens": 8, "max_probe_tokens": 99}
    await bed.policy(stages=[stage("samples", 1, 0)], probes={**probes, "hidden_profile": profile})
    bed.house.engine.score = 0.75
    bed.say(
        peek=Said(("<",), top=(("<tool", -1.0), ("The", -2.0))),
        ptrue=Said(("Yes",), top=(("Yes", -0.5), (" no", -1.5), ("x", float("-inf")))),
        samples=Said(("so",)),
        draft=SURE,
        main=Said(("x", "y")),
    )
    told = await bed.told(HARD, tool_gate={"mode": "enforce", "explain": True}, seed=7, cache_salt="s")
    assert bed.kinds == [*order, "0"]
    peek, hidden, draft, ptrue, samples, _ = bed.house.engine.calls
    assert bed.prompt(0) == f"calculator;||u:{HARD}\n"
    assert [bed.prompt(place) for place in (1, 2, 4)] == [f"u:{HARD}\n"] * 3
    words = "".join(f"{one['role'][0]}:{one['content']}\n" for one in ptrue_messages([], "80235"))
    assert bed.prompt(3) == f"u:{HARD}\n{words}"
    assert [(one[1].max_tokens, one[1].temperature, one[1].logprobs) for one in (peek, hidden, draft, ptrue)] == [
        *((1, 0, 20), (1, 0, None), (8, 0, 5), (1, 0, 20))
    ]
    assert (samples[1].n, samples[1].temperature, samples[1].max_tokens, samples[1].seed) == (3, 0.9, 8, 7)
    assert {one[3] for one in bed.house.engine.calls} == {"s"}
    signals = told["signals"]
    assert signals["peek.p_call"] == pytest.approx(0.367879, abs=1e-6)
    assert signals["ptrue.p_true"] == pytest.approx(0.731059, abs=1e-6)
    assert (signals["hidden.score"], signals["samples.clusters"]) == (0.75, 1)
    assert signals["draft.mean_logprob"] == -0.01
    edit = json.loads(bed.house.engine.asked[1].spec)
    assert (edit["tables"], edit["probe"]["digest"]) == ([], profile)
    assert [edit is None for edit in bed.house.engine.asked] == [True, False, True, True, True, True]
    assert told["probe_usage"] == {
        "prompt_tokens": sum(len(one[0]) for one in bed.house.engine.calls[:-1]),
        "completion_tokens": 1 + 1 + 1 + 1 + 3,
    }


async def test_probes_ask_the_delta_of_the_request(bed: Bed) -> None:
    red = (await bed.upload("red", b"1")).json()["digest"]
    await bed.policy("for-base", **STATIC)
    await bed.policy("for-red", model={"delta_digest": red})
    bed.say(draft=SURE)
    told = await bed.told(HARD, model="red")
    assert (told["policy"], told["decision"]) == ("for-red", "suppress")
    assert [one[2].digest for one in bed.house.engine.calls] == [red, red]
    assert (await bed.told(HARD))["policy"] == "for-base"


async def test_of_several_policies_the_first_by_name_holds(bed: Bed, admin: httpx.AsyncClient) -> None:
    await bed.policy("b", **STATIC)
    await bed.policy("c", **STATIC, explore=1.0)
    await bed.policy("a", **STATIC, model={"template_sha256": "0" * 64})
    assert (await bed.told())["policy"] == "b"
    await admin.delete("/v1/admin/policies/b")
    told = await bed.told()
    assert (told["policy"], told["reason"]) == ("c", "explored")
    await admin.delete("/v1/admin/policies/c")
    assert ((await bed.told())["policy"], (await bed.told())["reason"]) == ("a", "policy_mismatch")


async def test_a_policy_can_be_named(bed: Bed) -> None:
    await bed.policy("a", **STATIC)
    await bed.policy("b", **STATIC, explore=1.0)
    assert (await bed.told(tool_gate={"mode": "enforce", "policy": "b"}))["policy"] == "b"
    await bed.policy("other", model={"delta_digest": "d" * 64}, **STATIC)
    told = await bed.told(tool_gate={"mode": "enforce", "policy": "other", "explain": True})
    assert (told["decision"], told["reason"], told["policy"]) == ("allow", "policy_mismatch", "other")
    assert "delta" in told["problem"]


async def test_observing_changes_nothing(bed: Bed) -> None:
    await bed.policy()
    bed.say(draft=SURE)
    off = (await bed.ask(HARD, tool_gate=None)).json()
    response = await bed.ask(HARD, tool_gate={"mode": "observe"})
    assert head(response) == ("suppress", "confident_without_tool")
    told = response.json()["gateway"]["tool_gate"]
    assert (told["mode"], told["tool_choice_out"], told["tools_removed"]) == ("observe", "auto", ["calculator"])
    assert (response.json()["choices"], response.json()["usage"]) == (off["choices"], off["usage"])
    assert bed.kinds == ["draft", "0"]
    assert bed.prompt(1).startswith("calculator;")


async def test_mixed_tools_are_narrowed(bed: Bed) -> None:
    await bed.policy(**STATIC)
    response = await bed.ask(EASY, ("calculator", "send_mail", "search"))
    assert head(response) == ("narrow", "confident_without_tool")
    told = response.json()["gateway"]["tool_gate"]
    assert (told["tools_removed"], told["tool_choice_out"]) == (["calculator", "search"], "auto")
    assert bed.prompt(0) == f"send_mail;||u:{EASY}\n"
    assert head(await bed.ask(EASY, ("send_mail", "ask_user"))) == ("allow", "not_gateable")


@pytest.mark.parametrize("choice", ["none", "required", {"type": "function", "function": {"name": "calculator"}}])
async def test_what_is_forced_stays(bed: Bed, choice: Any) -> None:
    await bed.policy()
    for gate in ({"mode": "enforce"}, {"mode": "enforce", "policy": "gate", "budget": 0}):
        response = await bed.ask(EASY, tool_choice=choice, tool_gate=gate)
        assert head(response) == ("allow", "caller_forced")
        told = response.json()["gateway"]["tool_gate"]
        assert told["tool_choice_in"] == told["tool_choice_out"] == choice
        assert bed.kinds == ["0"]
        assert bed.prompt(0).startswith("calculator;")
        assert (bed.house.engine.calls[0][1].structure is None) == (choice == "none")


async def test_allowed_tools_are_those_in_play(bed: Bed) -> None:
    await bed.policy(**STATIC)
    listed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "send_mail"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": listed}
    assert head(await bed.ask(EASY, ("calculator", "send_mail"), tool_choice=choice)) == ("allow", "not_gateable")


async def test_a_stream_tells_before_its_first_chunk(bed: Bed) -> None:
    await bed.policy()
    bed.say(draft=SURE, main=Said(("a", "b")))
    response = await bed.ask(HARD, stream=True, stream_options={"include_usage": True})
    assert head(response) == ("suppress", "confident_without_tool")
    chunks = chunks_of(response)
    assert text_of(chunks) == "ab"
    assert [place for place, chunk in enumerate(chunks) if "gateway" in chunk] == [0, len(chunks) - 1]
    first, last = chunks[0]["gateway"], chunks[-1]["gateway"]
    assert set(first) == {"tool_gate"}
    assert first["tool_gate"] == last["tool_gate"]
    assert last["tool_gate"]["probe_usage"]["completion_tokens"] == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_budgets(bed: Bed) -> None:
    await bed.policy(**STATIC, budgets={"compute": 2})
    once, twice = called(("calculator", '{"a": 1}')), called(("calculator", '{"a": 1}'), ("calculator", '{"a": 2}'))
    user = {"role": "user", "content": EASY}
    told = await bed.told(messages=[user, *once])
    assert (told["decision"], told["reason"], told["budget"]) == ("allow", "uncertain", {"limit": 2, "used": 1})
    told = await bed.told(messages=[user, *twice])
    assert (told["decision"], told["reason"], told["budget"]) == (
        *("suppress", "budget_exhausted"),
        {"limit": 2, "used": 2},
    )
    assert "calculator;|" not in bed.prompt(0)
    told = await bed.told(messages=[user, *once], tool_gate={"mode": "enforce", "budget": 1})
    assert (told["reason"], told["budget"]) == ("budget_exhausted", {"limit": 1, "used": 1})
    told = await bed.told(messages=[user, *twice, user])  # a new question has a new budget
    assert (told["reason"], told["budget"]) == ("confident_without_tool", {"limit": 2, "used": 0})


async def test_a_repeated_call_and_a_loop_ask_no_probe(bed: Bed) -> None:
    await bed.policy()
    same = ("calculator", '{"a": 1}')
    messages = [{"role": "user", "content": HARD}, *called(same, same)]
    messages[3:] = json.loads(json.dumps(messages[3:]).replace("call_0", "call_1"))
    told = await bed.told(messages=messages)
    assert (told["decision"], told["reason"]) == ("suppress", "repeated_call")
    assert bed.kinds == ["0"]
    told = await bed.told(messages=messages[:3])
    assert (told["decision"], told["reason"], bed.kinds) == ("allow", "uncertain", ["0"])


async def test_exploration_lets_pass_and_says_so(bed: Bed) -> None:
    await bed.policy(**STATIC, explore=1.0)
    response = await bed.ask()
    told = response.json()["gateway"]["tool_gate"]
    assert head(response) == ("allow", "explored")
    assert (told["explored"], told["propensity"], told["tools_removed"]) == (True, 1.0, [])
    assert bed.prompt(0).startswith("calculator;")
    await bed.policy(**STATIC, explore=0.0)
    assert (await bed.told())["propensity"] == 1.0


async def test_a_call_can_be_required(bed: Bed) -> None:
    await bed.policy(**STATIC, thresholds={"suppress": 0.8, "require": 0.5})
    bed.house.engine.texts[0] = ('[{"name": "calculator", "parameters": {}}]',)
    response = await bed.ask(HARD, tool_gate={"mode": "enforce", "allow_require": True})
    assert head(response) == ("require", "likely_underuse")
    assert response.json()["gateway"]["tool_gate"]["tool_choice_out"] == "required"
    assert message_of(response)["tool_calls"][0]["function"]["name"] == "calculator"
    assert json.loads(bed.house.engine.calls[0][1].structure.rule)["minItems"] == 1
    assert head(await bed.ask(HARD)) == ("allow", "uncertain")


async def test_a_request_may_ask_for_more_evidence(bed: Bed) -> None:
    await bed.policy(**STATIC)
    told = await bed.told(tool_gate={"mode": "enforce", "threshold": 0.9})
    assert (told["decision"], told["reason"], told["threshold"]) == ("allow", "uncertain", 0.9)
    assert told["policy_id"] == (await bed.told())["policy_id"]


async def test_a_steered_request_is_left_alone(bed: Bed) -> None:
    await bed.upload("knowledge", b"{}", "profiles")
    await bed.policy()
    steering = {"profile": "knowledge", "direction": "use_context"}
    told = await bed.told(HARD, steering=steering, tool_gate={"mode": "enforce", "explain": True})
    assert (told["decision"], told["reason"]) == ("allow", "policy_mismatch")
    assert "steered" in told["problem"]
    assert bed.kinds == ["0"]
    bed.say(draft=SURE)
    assert (await bed.told(HARD, conflict={"profile": "knowledge"}))["decision"] == "suppress"  # only scored


async def test_a_comparison_keeps_its_tools_and_both_answers(bed: Bed) -> None:
    await bed.upload("knowledge", b"{}", "profiles")
    await bed.policy(**STATIC)
    steering = {"profile": "knowledge", "direction": "use_context", "strength": 0, "compare": True}  # edits nothing
    response = await bed.ask(steering=steering)
    assert head(response) == ("allow", "policy_mismatch")
    assert len(response.json()["choices"]) == 2
    assert head(await bed.ask(steering={**steering, "compare": False})) == ("suppress", "confident_without_tool")


async def test_what_a_label_reads(bed: Bed) -> None:
    red = (await bed.upload("red", b"1")).json()["digest"]
    shown = (await bed.ask(model="red")).json()["gateway"]
    assert (shown["base_fingerprint"], shown["delta_digest"]) == ("sha256:ba5e", red)
    plain = (await bed.ask(tools=())).json()["gateway"]
    assert shown["template_sha256"] == bed.template != plain["template_sha256"]
    assert len(plain["template_sha256"]) == 64
    text = await bed.client.post("/v1/completions", json={"model": "tiny-base", "prompt": "a"})
    assert text.json()["gateway"]["template_sha256"] is None
