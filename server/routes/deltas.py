"""The admin plane: upload, list, get, move, load, unload, delete; and what is in memory now."""

from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from compressors.errors import DeltaError
from server.core import GatewayError
from server.routes.body import check_length, read_body
from server.routes.context import Ctx
from server.routes.upload import receive
from server.schemas import AliasMove, parse

_FORM_OVERHEAD_BYTES = 64 << 10  # what multipart adds to the file at most


async def upload(request: Request, context: Ctx) -> JSONResponse:
    """201 with a new version, 200 when the name has that digest already."""
    max_bytes = context.limits.max_upload_bytes
    try:
        check_length(request, max_bytes + _FORM_OVERHEAD_BYTES)
        with context.deltas.incoming(max_bytes) as incoming:
            fields = await receive(request, incoming)
            ref, created = await context.deltas.upload(fields, incoming)
    except (GatewayError, DeltaError):
        context.telemetry.uploads.labels("rejected").inc()
        raise
    headers = {"location": f"/v1/admin/deltas/{ref.name}", "etag": f'"{fields.sha256}"'}
    return JSONResponse(context.deltas.card(ref), 201 if created else 200, headers)


async def list_deltas(context: Ctx) -> dict[str, Any]:
    return {"object": "list", "data": [context.deltas.card(ref) for ref in context.registry.refs()], "has_more": False}


async def get_delta(name: str, context: Ctx) -> dict[str, Any]:
    return context.deltas.card(context.registry.get(name))


async def move_alias(name: str, request: Request, context: Ctx) -> dict[str, Any]:
    move = parse(AliasMove, await read_body(request, context.limits.max_body_bytes))
    return context.deltas.card(await context.deltas.move(name, move.digest, move.expected_generation))


async def load(name: str, context: Ctx) -> dict[str, Any]:
    context.gateway.require_ready()
    return context.deltas.card(await context.deltas.load(name))


async def unload(name: str, context: Ctx) -> dict[str, Any]:
    return context.deltas.card(await context.deltas.unload(name))


async def delete(name: str, context: Ctx, drain: bool = False) -> Response:
    await context.deltas.delete(name, drain)
    return Response(status_code=204)


async def status(context: Ctx) -> dict[str, Any]:
    names: dict[str, list[str]] = {}
    for ref in context.registry.refs():
        for version in ref.versions:
            names.setdefault(version.digest, []).append(ref.name)
    residents = [
        {
            "digest": resident.delta.digest,
            "names": names.get(resident.delta.digest, []),
            "resident_bytes": resident.nbytes,
            "in_flight": context.pool.leases(resident.delta.digest),
        }
        for resident in context.pool.residents()
    ]
    return {
        "state": context.gateway.state,
        "base": {"id": context.registry.base_id, "fingerprint": context.gateway.base_fingerprint},
        "max_model_len": context.gateway.max_model_len,
        "max_resident_deltas": context.pool.max_resident,
        "resident_bytes": sum(resident.nbytes or 0 for resident in context.pool.residents()),
        "resident": residents,
        "rows_in_flight": context.admission.rows,
        "queued_tokens": context.admission.queued_tokens,
    }
