"""What the gate leaves in the metrics and in the log line: closed sets of labels, numbers, and no text."""

import json
import logging
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.core import GateMode
from server.logs import JsonFormatter
from steering.toolgate import Action, Reason
from tests.server.fake_engine import Said
from tests.server.gate_bed import CALL, EASY, HARD, STATIC, SURE, UNSURE, Bed
from tests.steering.gate_world import stage

pytestmark = pytest.mark.anyio


async def scrape(bed: Bed) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, the labels by name."""
    families = text_string_to_metric_families((await bed.client.get("/metrics")).text)
    return {
        (s.name.removeprefix("deltaworks_tool_gate_"), *(value for _, value in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("deltaworks_tool_gate_")
    }


async def test_decisions_scores_tokens_and_latencies(bed: Bed) -> None:
    before = await scrape(bed)  # the house was asked once, with the gate off and no `tool_gate`
    assert before["decisions_total", "allow", "off", "off"] == 1
    assert before["latency_seconds_count",] == 0
    assert {key[1:] for key in before if key[0] == "fail_open_total"} == {
        ("gate_error",),
        ("timeout",),
        ("policy_mismatch",),
    }
    await bed.policy()
    bed.say(draft=SURE)
    await bed.ask(HARD)
    await bed.ask(HARD, tool_gate={"mode": "observe"})
    bed.say(draft=UNSURE)
    await bed.ask(HARD)
    await bed.ask(HARD, tool_choice="none")
    await bed.ask(tools=())
    found = await scrape(bed)
    decided = {key[1:]: value for key, value in found.items() if key[0] == "decisions_total"}
    assert decided == {
        ("allow", "off", "off"): 1,
        ("suppress", "enforce", "confident_without_tool"): 1,
        ("suppress", "observe", "confident_without_tool"): 1,
        ("allow", "enforce", "uncertain"): 1,
        ("allow", "enforce", "caller_forced"): 1,
    }
    assert found["latency_seconds_count",] == 4
    assert found["latency_seconds_sum",] > 0
    assert found["score_count",] == 3
    assert found["score_sum",] == pytest.approx(0.948 * 2 + 0.5, abs=1e-2)
    assert found["probe_tokens_total", "prompt"] == 3 * len(f"u:{HARD}\n")
    assert found["probe_tokens_total", "completion"] == 3
    assert found["leaks_total",] == 0


async def test_leaks_and_calls_that_are_kept_back(bed: Bed) -> None:
    await bed.policy(**STATIC, suppress_mode="tool_choice_none")
    bed.say(main=Said(("It is 5. ", CALL)))
    await bed.ask()
    await bed.ask(tool_gate={"mode": "observe"})
    found = await scrape(bed)
    assert found["leaks_total",] == 1
    counted = bed.house.context.telemetry.registry.get_sample_value
    assert counted("deltaworks_tool_calls_total", {"outcome": "suppressed"}) == 1
    assert counted("deltaworks_tool_calls_total", {"outcome": "parsed"}) == 1


async def test_names_make_no_series(bed: Bed) -> None:
    async def flood(tag: str) -> int:
        for number in range(5):
            kinds = [{"match": f"{tag}{number}", "kind": "compute"}]
            await bed.policy(f"{tag}{number}", **STATIC, tool_kinds=kinds)
            gate = {"mode": "enforce", "policy": f"{tag}{number}", "threshold": 0.9 + number / 100}
            await bed.ask(EASY, (f"{tag}{number}",), tool_gate=gate)
        return len(await scrape(bed))

    await flood("a")
    assert await flood("b") == await flood("c")
    labels = {key[1:] for key in await scrape(bed) if key[0] == "decisions_total"}
    for action, mode, reason in labels:
        assert action in get_args(Action)
        assert mode in get_args(GateMode)
        assert reason in get_args(Reason)


async def logged(bed: Bed, caplog: Any, *args: Any, **fields: Any) -> tuple[dict[str, Any], str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="deltaworks.request"):
        await bed.ask(*args, **fields)
    (record,) = [record for record in caplog.records if record.name == "deltaworks.request"]
    text = JsonFormatter().format(record)
    return json.loads(text), text


async def test_a_record_has_numbers_and_no_text(bed: Bed, caplog: Any) -> None:
    await bed.policy(tool_kinds=[{"match": "canary*", "kind": "compute"}])
    bed.say(draft=Said(("canary-draft",), -0.01), main=Said(("canary-answer",)))
    question = f"{HARD} canary-question"
    line, text = await logged(bed, caplog, question, ("canary_tool",))
    assert "canary" not in text
    told = line["tool_gate"]
    assert told.pop("latency_s") > 0
    signals = told.pop("signals")
    assert signals["draft.mean_logprob"] == -0.01
    assert signals["text.numbers"] > 0
    assert all(isinstance(value, float) for value in signals.values())
    assert told.pop("score") == pytest.approx(0.948, abs=1e-3)
    assert len(told.pop("policy_id")) == 64
    assert told == {
        "mode": "enforce",
        "decision": "suppress",
        "reason": "confident_without_tool",
        "placement": "pre",
        "stage": "draft",
        "threshold": 0.8,
        "propensity": 1.0,
        "explored": False,
        "stopped": False,
        "tools_removed": 1,
        "probe_prompt_tokens": len(f"u:{question}\n"),
        "probe_completion_tokens": 1,
        "leak": False,
        "problem": None,
    }


async def test_no_record_of_a_gate_that_is_off(bed: Bed, caplog: Any) -> None:
    await bed.policy(**STATIC)
    for fields in ({"tool_gate": None}, {"tools": ()}):
        line, _ = await logged(bed, caplog, **fields)
        assert "tool_gate" not in line


async def test_records_can_be_switched_off(bed: Bed, build: Any, settings: Any, caplog: Any) -> None:
    await bed.policy(**STATIC)
    gate = settings.gate.model_copy(update={"log_records": False})
    house = build(settings=settings.model_copy(update={"gate": gate}))
    await house.gateway.start()
    house.engine.max_model_len = 4000
    async with house.client() as client:
        quiet = Bed(house, client, bed.upload)
        line, _ = await logged(quiet, caplog)
        assert (await scrape(quiet))["decisions_total", "suppress", "enforce", "confident_without_tool"] == 1
    assert "tool_gate" not in line


async def test_what_explains_is_shown_to_who_asks(bed: Bed) -> None:
    await bed.policy(stages=[stage("static", -1, 2, 0.1, 0.9)], probes={})
    shown = await bed.told(tool_gate={"mode": "enforce", "explain": True})
    assert shown["stage"] == "static"
    assert shown["signals"]["tools.compute"] == pytest.approx(0.693147)
    assert "signals" not in await bed.told()
