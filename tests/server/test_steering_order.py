"""A conflict score is that of the unedited prompt: a probe behind the first edited layer is refused before anything runs."""

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


def steered(profile: str, **fields: Any) -> dict[str, Any]:
    """`use_context` edits the layers 12 and 13."""
    return {"profile": profile, "direction": "use_context", **fields}


def edits(**apply: Any) -> dict[str, Any]:
    """Edits of layer 13."""
    return {"edits": [{"sae": "l13", "features": [{"id": 1, "op": "ablate"}], "apply": apply}]}


@pytest.fixture
async def stocked(upload: Any) -> None:
    """Profiles "p11" to "p14", whose probes read these layers, and an SAE of layer 13."""
    for layer in range(11, 15):
        facts = {"probe": {"layer": layer, "threshold": 0.5, "auroc": 0.9}}
        assert (await upload(f"p{layer}", json.dumps(facts).encode(), "profiles")).status_code == 201
    assert (await upload("l13", b"{}", "saes")).status_code == 201


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"steering": steered("p11"), "conflict": {}}, None),
        ({"steering": steered("p12"), "conflict": {}}, None),  # read before the edit of the very layer
        ({"steering": steered("p13"), "conflict": {}}, (13, 12)),
        ({"steering": steered("p13"), "conflict": {"score": False}}, None),
        ({"steering": steered("p13", layers=[13]), "conflict": {}}, None),
        ({"steering": steered("p14", layers=[13]), "conflict": {}}, (14, 13)),
        ({"steering": steered("p14", strength=0), "conflict": {}}, None),
        ({"steering": steered("p11"), "conflict": {"profile": "p14"}}, (14, 12)),
        ({"steering": steered("p14"), "conflict": {"profile": "p12"}}, None),
        ({"steering": steered("p13", compare=True, on_unavailable="ignore"), "conflict": {}}, (13, 12)),
        ({"steering": edits(), "conflict": {"profile": "p13"}}, None),
        ({"steering": edits(), "conflict": {"profile": "p14"}}, (14, 13)),
        ({"steering": edits(prompt="all", generation="all"), "conflict": {"profile": "p14"}}, (14, 13)),
        ({"steering": edits(prompt=None), "conflict": {"profile": "p14"}}, None),
        ({"conflict": {"profile": "p14"}}, None),
    ],
)
async def test_score_is_of_the_unedited_prompt(
    client: httpx.AsyncClient, house: Any, stocked: None, fields: dict[str, Any], refused: tuple[int, int] | None
) -> None:
    response = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "abc", **fields})
    if refused is None:
        assert response.status_code == 200, response.text
        wanted = fields["conflict"].get("score", True)
        assert (response.json()["gateway"]["conflict"] is not None) is wanted
        return
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "conflict")
    probe, first = refused
    assert f"the probe reads layer {probe}, behind the first edited layer {first}" in error["message"]
    for fix in ('"steering": null', f"only layers from {probe} on", f"a layer up to {first}"):
        assert fix in error["message"]
    assert (house.engine.calls, house.engine.edit_loads) == ([], [])
    assert house.idle()


@pytest.mark.parametrize(("profile", "status"), [("p11", 200), ("p12", 400), ("p13", 400)])
async def test_policy_is_resolved_before_the_first_edited_layer(
    client: httpx.AsyncClient, house: Any, stocked: None, profile: str, status: int
) -> None:
    conflict = {"profile": profile, "policy": {"if_at_least": 0.4, "then": steered("p11")}}
    response = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "abc", "conflict": conflict})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "conflict.policy.then"
