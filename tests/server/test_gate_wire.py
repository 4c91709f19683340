"""What `tool_gate` may say, and what the server's settings let it ask for."""

from collections.abc import Callable
from typing import Any

import pytest

from server.config import GateSettings
from tests.server.gate_bed import CHAT, EASY, STATIC, Bed, head

pytestmark = pytest.mark.anyio

INVALID = "invalid_value"


@pytest.mark.parametrize(
    ("gate", "param"),
    [
        ("enforce", "tool_gate"),
        ([], "tool_gate"),
        (True, "tool_gate"),
        ({"modes": "off"}, "tool_gate.modes"),
        ({"mode": "on"}, "tool_gate.mode"),
        ({"mode": True}, "tool_gate.mode"),
        ({"threshold": -0.01}, "tool_gate.threshold"),
        ({"threshold": 1.01}, "tool_gate.threshold"),
        ({"threshold": "0.5"}, "tool_gate.threshold"),
        ({"threshold": True}, "tool_gate.threshold"),
        ({"budget": -1}, "tool_gate.budget"),
        ({"budget": 1.5}, "tool_gate.budget"),
        ({"budget": True}, "tool_gate.budget"),
        ({"budget": 1 << 31}, "tool_gate.budget"),
        ({"explain": 1}, "tool_gate.explain"),
        ({"explain": "yes"}, "tool_gate.explain"),
        ({"policy": ""}, "tool_gate.policy"),
        ({"policy": "a" * 129}, "tool_gate.policy"),
        ({"policy": 5}, "tool_gate.policy"),
        ({"allow_require": "true"}, "tool_gate.allow_require"),
    ],
)
async def test_a_bad_body_is_refused_by_its_field(bed: Bed, gate: Any, param: str) -> None:
    for tools in (("calculator",), ()):
        response = await bed.client.post(CHAT, json=bed.body(EASY, tools, tool_gate=gate))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, INVALID, param)
    assert bed.kinds == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(bed: Bed, number: str) -> None:
    body = '{"model": "tiny-base", "messages": [{"role": "user", "content": "a"}], "tool_gate": {"threshold": %s}}'
    response = await bed.client.post(CHAT, content=body % number)
    assert (response.status_code, response.json()["error"]["param"]) in [
        (400, "tool_gate.threshold"),
        (400, None),  # no JSON at all
    ]


async def test_null_is_as_good_as_absent(bed: Bed) -> None:
    await bed.policy(**STATIC)
    fields = ("threshold", "budget", "explain", "policy", "allow_require")
    assert head(await bed.ask(tool_gate={"mode": "enforce", **dict.fromkeys(fields)}))[0] == "suppress"
    assert head(await bed.ask(tool_gate={"mode": None})) == ("allow", "off")
    assert head(await bed.ask(tool_gate={})) == ("allow", "off")


async def test_an_unknown_policy_is_404_where_it_is_named(bed: Bed) -> None:
    for gate in ({"policy": "nobody"}, {"policy": "nobody", "mode": "off"}, {"policy": "nobody", "mode": "enforce"}):
        for fields in ({}, {"tool_choice": "none"}, {"stream": True}):
            response = await bed.client.post(CHAT, json=bed.body(tool_gate=gate, **fields))
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (
                404,
                "policy_not_found",
                "tool_gate.policy",
            )
    assert bed.house.idle()
    assert bed.kinds == []
    assert (await bed.ask(tools=(), tool_gate={"policy": "nobody"})).status_code == 200  # no tools, no gate


@pytest.mark.parametrize(
    ("suppress", "threshold", "status"), [(0.8, 0.79, 400), (0.8, 0.8, 200), (0.8, 1.0, 200), (None, 1.0, 400)]
)
async def test_a_threshold_may_only_rise(bed: Bed, suppress: float | None, threshold: float, status: int) -> None:
    await bed.policy(**STATIC, thresholds={"suppress": suppress})
    gate = {"mode": "enforce", "threshold": threshold}
    response = await bed.client.post(CHAT, json=bed.body(tool_gate=gate))
    assert response.status_code == status
    if status == 400:
        error = response.json()["error"]
        assert (error["code"], error["param"]) == (INVALID, "tool_gate.threshold")
        assert (await bed.ask(tool_gate={**gate, "mode": "off"})).status_code == 200


async def other(build: Callable[..., Any], settings: Any, bed: Bed, **gate: Any) -> Bed:
    """The same policies behind other settings."""
    house = build(settings=settings.model_copy(update={"gate": GateSettings(**gate)}))
    await house.gateway.start()
    house.engine.max_model_len = 4000
    return Bed(house, house.client(), bed.upload)


async def test_the_operator_may_allow_less_evidence(bed: Bed, build: Any, settings: Any) -> None:
    stages = [{**STATIC["stages"][0], "hi": 0.97}]
    await bed.policy("gate", stages=stages, probes={}, thresholds={"suppress": 0.95})
    await bed.policy("never", stages=stages, probes={}, thresholds={"suppress": None})
    loose = await other(build, settings, bed, allow_lower_threshold=True)
    for name in ("gate", "never"):
        gate = {"mode": "enforce", "policy": name}
        assert head(await loose.ask(tool_gate=gate)) == ("allow", "uncertain")
        told = await loose.told(tool_gate={**gate, "threshold": 0.5})
        assert (told["decision"], told["threshold"]) == ("suppress", 0.5)


@pytest.mark.parametrize("ours", ["off", "observe", "enforce"])
@pytest.mark.parametrize("wanted", [None, "off", "observe", "enforce"])
@pytest.mark.parametrize(("opt_in", "opt_out"), [(True, True), (False, True), (True, False), (False, False)])
async def test_opting_in_and_out(
    bed: Bed, build: Any, settings: Any, ours: str, wanted: str | None, opt_in: bool, opt_out: bool
) -> None:
    await bed.policy(**STATIC)
    served = await other(build, settings, bed, mode=ours, allow_opt_in=opt_in, allow_opt_out=opt_out)
    order = ("off", "observe", "enforce")
    more = order.index(wanted or ours) - order.index(ours)
    response = await served.client.post(CHAT, json=bed.body(tool_gate={"mode": wanted}))
    if (more > 0 and not opt_in) or (more < 0 and not opt_out):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, INVALID, "tool_gate.mode")
        assert not served.kinds
        return
    assert response.status_code == 200
    told = response.json()["gateway"]["tool_gate"]
    assert told["mode"] == (wanted or ours)
    assert told["decision"] == ("allow" if told["mode"] == "off" else "suppress")
    assert served.prompt(0).startswith("u:") == (told["mode"] == "enforce")
