"""The gate is fail-open: whatever goes wrong, the request is answered as it came, and the reason is told and counted."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.engine.base import EngineDeadError, EngineError, EngineLoadError, GrammarError
from tests.server.fake_engine import Said
from tests.server.gate_bed import CALL, EASY, HARD, STATIC, SURE, Bed, head, message_of
from tests.server.test_disconnect import post_chat
from tests.steering.gate_world import document, stage, tool

pytestmark = pytest.mark.anyio

EXPLAINED = {"mode": "enforce", "explain": True}
NAN = float("nan")


def fail_open(bed: Bed, reason: str) -> float | None:
    found: float | None = bed.house.context.telemetry.registry.get_sample_value(
        "deltaworks_tool_gate_fail_open_total", {"reason": reason}
    )
    return found


async def left_alone(bed: Bed, reason: str, kinds: list[str], **fields: Any) -> dict[str, Any]:
    """The request is answered with its tools; what the gate tells."""
    before = fail_open(bed, reason)
    response = await bed.ask(HARD, **{"tool_gate": EXPLAINED, **fields})
    assert head(response) == ("allow", reason)
    assert bed.kinds == kinds
    assert bed.prompt(-1) == f"calculator;||u:{HARD}\n"
    told: dict[str, Any] = response.json()["gateway"]["tool_gate"]
    assert (told["tools_removed"], told["tool_choice_out"]) == ([], "auto")
    assert fail_open(bed, reason) == (before or 0) + 1
    return told


@pytest.mark.parametrize(
    "said",
    [
        Said((), error=EngineError("it cannot")),
        Said((), error=GrammarError("it cannot", param="tools")),
        Said((), error=TypeError("a fault of ours: canary")),
        Said((), error=KeyError("canary")),
        Said(("a",), NAN),
        Said(("a",), float("inf")),
        Said(("a",), -0.1, (("a", NAN),)),
    ],
)
async def test_a_probe_that_fails(bed: Bed, said: Said) -> None:
    await bed.policy()
    bed.say(draft=said)
    told = await left_alone(bed, "gate_error", ["draft", "0"])
    assert told["problem"]
    assert "canary" not in told["problem"]


async def test_a_probe_of_minus_infinity_is_unsure(bed: Bed) -> None:
    """As the wire spells it, so that labels and serving agree."""
    await bed.policy()
    bed.say(draft=Said(("a",), float("-inf")))
    told = await bed.told(HARD, tool_gate=EXPLAINED)
    assert (told["reason"], told["signals"]["draft.mean_logprob"]) == ("needs_tool", -9999.0)


async def test_an_engine_that_ends_a_probe_early(bed: Bed) -> None:
    await bed.policy(stages=[stage("static", -1, 2, 0.1, 0.9), stage("samples")], probes={"order": ["samples"], "k": 2})
    bed.house.engine.texts = {0: ("a",), 1: ()}
    bed.say(main=Said(("x",)))
    assert "before it was finished" in (await left_alone(bed, "gate_error", ["samples", "0"]))["problem"]


@pytest.mark.parametrize("of_the_policy", [True, False])
async def test_a_probe_that_is_late_is_aborted(
    bed: Bed, build: Callable[..., Any], settings: Any, of_the_policy: bool
) -> None:
    """The policy's own limit, and this server's where that is less."""
    gate = settings.gate.model_copy(update={"timeout_ms": 60_000 if of_the_policy else 400})
    await bed.policy(probes={"order": ["draft"], "timeout_ms": 400 if of_the_policy else 60_000})
    house = build(settings=settings.model_copy(update={"gate": gate}))  # reads the policy that is stored now
    await house.gateway.start()
    async with house.client() as client:
        slow = Bed(house, client, bed.upload)
        house.engine.max_model_len = 4000
        slow.say(draft=Said(("a", "b"), block=True))
        started = time.monotonic()
        told = await left_alone(slow, "timeout", ["draft", "0"])
        assert time.monotonic() - started < 30
        assert told["latency_ms"] >= 390
        assert told["probe_usage"] == {"prompt_tokens": len(f"u:{HARD}\n"), "completion_tokens": 0}
        assert not house.engine.running


async def test_a_policy_for_another_template_is_told_loudly_once(bed: Bed, caplog: Any) -> None:
    await bed.policy(model={"template_sha256": "0" * 64}, **STATIC)
    with caplog.at_level(logging.WARNING, logger="deltaworks.gate"):
        for _ in range(3):
            assert "template" in (await left_alone(bed, "policy_mismatch", ["0"]))["problem"]
    assert len([record for record in caplog.records if record.name == "deltaworks.gate"]) == 1


async def test_a_policy_of_another_base_after_a_restart(bed: Bed, build: Callable[..., Any]) -> None:
    await bed.policy(**STATIC)
    reborn = build(fingerprint="sha256:01d")
    await reborn.gateway.start()
    async with reborn.client() as client:
        other = Bed(reborn, client, bed.upload)
        reborn.engine.max_model_len = 4000
        assert "base" in (await left_alone(other, "policy_mismatch", ["0"]))["problem"]


@pytest.mark.parametrize("damage", [None, b"{}", b"\xff"])
async def test_a_policy_whose_file_is_no_longer_good(bed: Bed, damage: bytes | None) -> None:
    path = bed.house.store.object_path(await bed.policy(**STATIC))
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert (await left_alone(bed, "gate_error", ["0"]))["problem"] == "PolicyError"
    assert (await left_alone(bed, "gate_error", ["0"], tool_gate={**EXPLAINED, "policy": "gate"}))["policy"] == "gate"


def hidden_stage() -> list[dict[str, Any]]:
    scored = {**stage("draft"), "name": "hidden", "features": [{"name": "hidden.score", "mean": 0, "std": 1}]}
    return [stage("static", -1, 2, 0.1, 0.9), scored]


async def test_a_hidden_probe_that_cannot_be_asked(bed: Bed, admin: httpx.AsyncClient) -> None:
    order = {"order": ["hidden"]}
    await bed.policy("none", stages=hidden_stage(), probes=order)
    assert "names no profile" in (await left_alone(bed, "gate_error", ["0"]))["problem"]
    await admin.delete("/v1/admin/policies/none")
    for facts, problem in (
        ({"probe": None}, "InvalidRequest"),
        ({"base_fingerprint": "sha256:01d"}, "BaseMismatch"),
        (None, "NameNotFound"),
    ):
        digest = "0" * 64
        if facts is not None:
            content = json.dumps(facts).encode()
            digest = (await bed.upload("knows", content, "profiles")).json()["digest"]
        await bed.policy("one", stages=hidden_stage(), probes={**order, "hidden_profile": digest})
        assert (await left_alone(bed, "gate_error", ["0"]))["problem"] == f"hidden: {problem}"
    digest = (await bed.upload("knows", b"{}", "profiles")).json()["digest"]
    await bed.policy("one", stages=hidden_stage(), probes={**order, "hidden_profile": digest})
    bed.house.engine.score = None
    assert "without a score" in (await left_alone(bed, "gate_error", ["hidden", "0"]))["problem"]
    digest = (await bed.upload("knows", b'{"model_name": "new"}', "profiles")).json()["digest"]
    await bed.policy("one", stages=hidden_stage(), probes={**order, "hidden_profile": digest})
    bed.house.engine.edit_error = EngineLoadError("no")
    assert (await left_alone(bed, "gate_error", ["0"]))["problem"] == "hidden: EditLoadFailed"


async def test_a_full_server_runs_no_samples(bed: Bed) -> None:
    """Probes of many rows need permits as requests do."""
    samples = stage("samples", 1, 9)
    await bed.policy(
        stages=[stage("static", -1, 2, 0.1, 0.9), samples], probes={"order": ["samples"], "k": 9, "max_tokens": 8}
    )
    with bed.house.context.admission.permit(10):  # of 16; the request takes one more
        body = bed.body(HARD, tool_gate=EXPLAINED)
        bed.forget()
        response = await bed.client.post("/v1/chat/completions", json=body)
        assert head(response) == ("allow", "gate_error")
        assert response.json()["gateway"]["tool_gate"]["problem"] == "samples: ServerOverloaded"
        assert bed.kinds == ["0"]
    assert bed.house.idle()


async def test_a_full_server_still_refuses(bed: Bed) -> None:
    """What a withheld tool must not get around."""
    await bed.policy(**STATIC)
    with bed.house.context.admission.permit(1) as permit:
        permit.queue(99)
        response = await bed.client.post("/v1/chat/completions", json=bed.body())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "server_overloaded")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_changed_request_that_fails_is_asked_as_it_came(bed: Bed, stream: bool) -> None:
    await bed.policy(**STATIC)
    bed.say(main=Said((), error=EngineError("no")), **{"again1-0": Said(("fine",))})
    response = await bed.ask(stream=stream)
    assert head(response) == ("allow", "gate_error")
    assert [bed.prompt(place)[:2] for place in (0, 1)] == ["u:", "ca"]
    assert "fine" in response.text
    assert fail_open(bed, "gate_error") == 1


async def test_a_grammar_that_the_gate_asked_for_is_no_fault_of_the_request(bed: Bed) -> None:
    await bed.policy(**STATIC, thresholds={"suppress": 0.8, "require": 0.5})
    bed.say(main=Said((), error=GrammarError("uniqueItems", param="tools")), **{"again1-0": Said((CALL,))})
    response = await bed.ask(HARD, tool_gate={"mode": "enforce", "allow_require": True})
    assert (head(response), bed.kinds) == (("allow", "gate_error"), ["0", "again1-0"])
    assert message_of(response)["tool_calls"]
    assert response.json()["gateway"]["tool_gate"]["tool_choice_out"] == "auto"


async def test_an_answer_held_back_is_not_lost(bed: Bed) -> None:
    await bed.policy(**STATIC, placement="post")
    bed.say(main=Said((CALL,)), **{"again1-0": Said((), error=EngineError("no"))})
    response = await bed.ask()
    assert (head(response), bed.kinds) == (("allow", "gate_error"), ["0", "again1-0"])
    assert message_of(response)["tool_calls"]
    told = response.json()["gateway"]["tool_gate"]
    assert told["probe_usage"] == {"prompt_tokens": 0, "completion_tokens": 0}
    assert response.json()["usage"]["prompt_tokens"] == len(f"calculator;||u:{EASY}\n")


async def test_a_leak_that_cannot_be_asked_again_goes_out_as_it_came(bed: Bed) -> None:
    await bed.policy(**STATIC, suppress_mode="tool_choice_none")
    again = {"again1-0": Said((), error=EngineError("no")), "again2-0": Said((CALL,))}
    bed.say(main=Said((CALL,)), **again)
    response = await bed.ask()
    assert (head(response), bed.kinds) == (("allow", "gate_error"), ["0", "again1-0", "again2-0"])
    assert message_of(response)["tool_calls"]


async def test_an_engine_that_fails_on_everything_still_fails(bed: Bed) -> None:
    await bed.policy()
    bed.house.engine.generate_error = EngineError("no")
    response = await bed.client.post("/v1/chat/completions", json=bed.body(HARD))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    assert head(response) == ("allow", "gate_error")
    assert bed.house.idle()


@pytest.mark.parametrize("where", ["draft", "main"])
async def test_a_dead_engine_fails_the_request(bed: Bed, where: str) -> None:
    await bed.policy(suppress_mode="drop_tools")
    bed.say(**{"draft": SURE, where: Said((), error=EngineDeadError("gone"))})
    bed.forget()
    response = await bed.client.post("/v1/chat/completions", json=bed.body(HARD))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert bed.kinds == (["draft"] if where == "draft" else ["draft", "0"])
    assert bed.house.idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_client_that_goes_away_during_a_probe(live: Any, stream: bool, placement: str) -> None:
    """Over a real socket: the probe's rows are aborted, permit and leases are back, and nothing else is asked."""
    engine = live.house.engine
    engine.max_model_len = 4000
    body = {"tools": [tool("calculator")], "messages": [{"role": "user", "content": HARD}]}
    url = f"{live.url}/v1/chat/completions"
    sent = {"model": "red", "tool_gate": {"mode": "enforce"}, **body}
    with httpx.Client(headers={"authorization": "Bearer admin-key"}) as admin:
        red = admin.post(f"{live.url}/v1/admin/deltas", **form("red", b"1")).json()["digest"]
        template = admin.post(url, json=sent).json()["gateway"]["template_sha256"]
        bound = {"base_fingerprint": "sha256:ba5e", "delta_digest": red, "template_sha256": template}
        policy = document(model=bound, placement=placement)
        policy["probes"]["timeout_ms"] = 60_000
        assert admin.post(f"{live.url}/v1/admin/policies", **form("gate", json.dumps(policy).encode())).is_success
    engine.script = lambda row: Said(("a",), block=True) if row.endswith("-draft") else Said((CALL,))
    engine.rows.clear()
    connection = post_chat(live.url, stream=stream, **sent)
    live.wait_running()
    while not engine.rows[-1].endswith("-draft"):
        time.sleep(0.01)
    assert not live.house.idle()
    connection.close()
    assert live.wait_idle(2)
    assert [row.split("-", 1)[1] for row in engine.rows] == (["draft"] if placement == "pre" else ["0", "draft"])


def form(name: str, content: bytes) -> dict[str, Any]:
    fields = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    return {"data": fields, "files": {"file": ("one", content)}}
