"""The API's document: valid, of the routes that are there, and said by the server and by the command."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from server.app import ADMIN, PUBLIC, ROUTES, SplitApp
from server.cli import main
from server.errors import TABLE, codes
from server.routes.failures import OF_HANDLER
from server.routes.openapi import rendered
from server.schemas import ChatRequest
from tests.server import contract

DOCUMENT = contract.DOCUMENT


def operations(document: Any = DOCUMENT) -> dict[tuple[str, str], Any]:
    return {(method.upper(), path): how for path, found in document["paths"].items() for method, how in found.items()}


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["openapi"] == "3.1.0"


def test_it_has_the_routes_and_who_may_ask_them() -> None:
    found = operations()
    assert {(method, path.replace(":path}", "}")) for _, method, path, _ in ROUTES} == set(found)
    for access, method, path, _ in ROUTES:
        how = found[method, path.replace(":path}", "}")]
        assert how.get("security", []) == ([] if access == PUBLIC else [{access: []}])
        assert ("401" in how["responses"]) == (access != PUBLIC)
        assert {"500"} < set(how["responses"])
    names = [how["operationId"] for how in found.values()]
    assert len(set(names)) == len(names)


def test_bodies_are_the_wire_models() -> None:
    fields = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(fields) == set(ChatRequest.model_fields)
    asked = operations()["POST", "/v1/chat/completions"]
    assert asked["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    content = asked["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    done, told = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert (done, told["contentSchema"]["anyOf"][0]) == (
        {"const": "[DONE]"},
        {"$ref": "#/components/schemas/ChatCompletionChunk"},
    )
    upload = operations()["POST", "/v1/admin/saes"]
    form = upload["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "name", "sha256"]
    assert form["properties"]["expected_generation"] == {"type": "integer", "minimum": 0}
    assert {"name": "limit", "in": "query", "required": False} | {
        "schema": {"type": "integer", "minimum": 1, "maximum": 1000}
    } in operations()["GET", "/v1/admin/deltas"]["parameters"]


def test_errors_are_those_of_the_table() -> None:
    """Of every class that some handler answers with there is a code; all codes are the table's, beside their status."""
    said = {}
    for name, answer in DOCUMENT["components"]["responses"].items():
        named = re.fullmatch(r"Problem(\d{3})(_\d+)?", name)
        assert named is not None
        status = int(named[1])
        schema = answer["content"]["application/json"]["schema"]["allOf"][1]
        said |= dict.fromkeys(schema["properties"]["error"]["properties"]["code"]["enum"], status)
    assert set(said) <= codes()
    by_code = {mapping.code.format(kind="delta"): mapping.status for mapping in TABLE.values()}
    assert {said[code] - by_code[code] for code in said.keys() & by_code.keys()} == {0}
    handlers = {handler for _, _, _, handler in ROUTES}
    assert set(OF_HANDLER) <= handlers


@pytest.mark.anyio
async def test_each_port_tells_its_own_routes(build: Callable[..., Any]) -> None:
    house = build()
    app: Any = SplitApp(house.context, house.app.state.keys, 9001)

    async def paths(port: int) -> set[str]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://gateway:{port}") as client:
            return {path for _, path in operations((await client.get("/openapi.json")).json())}

    of_admins = {path for access, _, path, _ in ROUTES if access == ADMIN and path.startswith("/v1/admin/")}
    shared = {path for access, _, path, _ in ROUTES if access == PUBLIC}
    assert await paths(9001) == of_admins | shared
    assert of_admins.isdisjoint(await paths(8000))
    assert {"/v1/models/{model_id}", "/v1/load_lora_adapter", *shared} < await paths(8000)


@pytest.mark.anyio
async def test_the_server_and_the_command_say_the_same(
    client: httpx.AsyncClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = await client.get("/openapi.json", headers={"authorization": ""})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.content == rendered(ROUTES)
    assert main(["openapi"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT
    assert main(["openapi", "-o", str(tmp_path / "api.json")]) == 0
    assert json.loads((tmp_path / "api.json").read_text()) == DOCUMENT
    assert main(["openapi", "-o", str(tmp_path / "none" / "api.json")]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/admin/deltas", "GET, POST"),
        ("/v1/admin/saes/x", "DELETE, GET"),
        ("/v1/admin/deltas/x/versions/y", "DELETE, GET"),
        ("/ping", "GET, POST"),
        ("/v1/models/a/b", "GET"),
    ],
)
async def test_405_names_all_methods_of_the_path(client: httpx.AsyncClient, path: str, allowed: str) -> None:
    answer = await client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.anyio
@pytest.mark.parametrize("query", ["drain=1", "drain=yes", "drain=True", "drain=", "drain=on", "drain=truefalse"])
async def test_a_flag_of_a_query_is_true_or_false(admin: httpx.AsyncClient, query: str) -> None:
    answer = await admin.delete(f"/v1/admin/deltas/red?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "drain")
    assert (await admin.delete("/v1/admin/deltas/red?drain=true")).status_code == 404


@pytest.mark.anyio
@pytest.mark.parametrize("limit", ["1.0", "+5", "%205", "1_0", "%D9%A3", "1e2", ""])
async def test_a_number_of_a_query_is_in_decimal_digits(admin: httpx.AsyncClient, limit: str) -> None:
    answer = await admin.get(f"/v1/admin/deltas?limit={limit}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


@pytest.mark.anyio
async def test_a_form_and_a_query_are_not_mixed(admin: httpx.AsyncClient) -> None:
    """What the query said beside a form would not be heard."""
    form = {"name": "red", "sha256": hashlib.sha256(b"1").hexdigest()}
    answer = await admin.post("/v1/admin/deltas?activate=false", data=form, files={"file": ("a", b"1")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert (await admin.get("/v1/admin/deltas/red")).status_code == 404


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("field", "value"), [("activate", "1"), ("activate", "yes"), ("expected_generation", "1_0"), ("activate", "")]
)
async def test_fields_of_an_upload_are_read_strictly(upload: Any, field: str, value: str) -> None:
    answer = await upload("red", b"1", **{field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
