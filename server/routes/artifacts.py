"""The admin plane: upload, list, get, move and delete artifacts of every kind; load, unload and pin deltas; what is in memory."""

import time
from itertools import islice
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from starlette.responses import JSONResponse, Response

from compressors.errors import DeltaError
from server.answers import Told
from server.artifacts.cards import CARD, PAGE, VERSION_CARD, DeltaCard, ResidentDelta, Status, Verification
from server.core import ArtifactState, GatewayError
from server.errors import describe
from server.metrics.uploads import reason_of
from server.routes.body import ClientGone, JsonBody, check_length
from server.routes.context import Artifacts, Ctx, Serving
from server.routes.upload import FORM_OVERHEAD_BYTES, receive
from server.wire import WHOLE, AliasMove, Flag, UploadFields
from steering.errors import SteeringError

_MAX_PAGE = 1000

Card = Annotated[dict[str, Any], Told({200: CARD})]
LoadedCard = Annotated[dict[str, Any], Told({200: DeltaCard})]
Nothing = Annotated[Response, Told({204: None})]
Uploaded = Annotated[JSONResponse, Told({200: CARD, 201: CARD}, form=UploadFields, headers=("location", "etag"))]


async def upload(request: Request, context: Ctx, artifacts: Artifacts) -> Uploaded:
    """201 with a new version, 200 when the name has that digest already."""
    max_bytes = context.limits.max_upload_bytes
    started = time.perf_counter()
    try:
        check_length(request, max_bytes + FORM_OVERHEAD_BYTES)
        with artifacts.incoming(max_bytes) as incoming:
            received = await receive(request, incoming)
            async with artifacts.opened(received, incoming) as (fields, artifact):
                ref, created = await artifacts.upload(fields, artifact)
            artifacts.count_received(incoming.nbytes, time.perf_counter() - started)
    except ClientGone:
        artifacts.count_upload("aborted")
        raise
    except (GatewayError, DeltaError, SteeringError) as error:
        artifacts.count_upload("rejected", reason_of(describe(error).code, getattr(error, "fault", None)))
        raise
    headers = {"location": f"{request.url.path}/{ref.name}", "etag": f'"{fields.sha256}"'}
    return JSONResponse(artifacts.card(ref), 201 if created else 200, headers)


async def list_all(
    artifacts: Artifacts,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE), WHOLE] = _MAX_PAGE,
    after: str = "",
    state: ArtifactState | None = None,
) -> Annotated[dict[str, Any], Told({200: PAGE})]:
    """Names in order, from behind `after` on; with `state` those that have a version in it."""
    cards = (artifacts.card(ref) for ref in artifacts.refs() if ref.name > after)
    page = list(islice((card for card in cards if state is None or state in _states(card)), limit + 1))
    return {"object": "list", "data": page[:limit], "has_more": len(page) > limit}


def _states(card: dict[str, Any]) -> set[str]:
    return {version.get("state", "stored") for version in card["versions"]}


async def get(name: str, artifacts: Artifacts) -> Card:
    return artifacts.card(await artifacts.get(name))


async def get_version(
    name: str, digest: str, artifacts: Artifacts
) -> Annotated[dict[str, Any], Told({200: VERSION_CARD})]:
    return artifacts.version_card(await artifacts.version(name, digest))


async def delete_version(name: str, digest: str, artifacts: Artifacts, drain: Flag = False) -> Nothing:
    await artifacts.delete_version(name, digest, drain)
    return Response(status_code=204)


async def verify(name: str, artifacts: Artifacts) -> Verification:
    """Whether the stored bytes are still what was checked at the upload."""
    return await artifacts.verify(name)


async def move_alias(name: str, artifacts: Artifacts, move: Annotated[AliasMove, Depends(JsonBody(AliasMove))]) -> Card:
    return artifacts.card(await artifacts.move(name, move.digest, move.expected_generation))


async def delete(name: str, artifacts: Artifacts, drain: Flag = False) -> Nothing:
    await artifacts.delete(name, drain)
    return Response(status_code=204)


async def load(name: str, context: Serving) -> LoadedCard:
    return context.deltas.card(await context.deltas.load(name))


async def unload(name: str, context: Ctx) -> LoadedCard:
    return context.deltas.card(await context.deltas.unload(name))


async def pin(name: str, context: Serving) -> LoadedCard:
    return context.deltas.card(await context.deltas.pin(name))


async def unpin(name: str, context: Ctx) -> LoadedCard:
    return context.deltas.card(await context.deltas.unpin(name))


async def status(context: Ctx) -> Status:
    names: dict[str, list[str]] = {}
    for ref in context.registry.refs():
        for version in ref.versions:
            names.setdefault(version.digest, []).append(ref.name)
    residents: list[ResidentDelta] = [
        {
            "digest": resident.item.digest,
            "names": names.get(resident.item.digest, []),
            "resident_bytes": resident.nbytes,
            "in_flight": context.pool.leases(resident.item.digest),
            "pinned": context.pool.pinned(resident.item.digest),
        }
        for resident in context.pool.residents()
    ]
    return {
        "state": context.gateway.state,
        "base": {"id": context.registry.base_id, "fingerprint": context.gateway.base_fingerprint},
        "max_model_len": context.gateway.max_model_len,
        "max_resident_deltas": context.pool.max_resident,
        "resident_bytes": sum(resident.nbytes or 0 for resident in context.pool.residents()),
        "max_resident_delta_bytes": context.pool.max_bytes,
        "resident": residents,
        "resident_combinations": len(context.pool.combinations.residents()),
        "max_resident_combinations": context.pool.combinations.max_resident,
        "max_packed_delta_bytes": context.pool.packed.max_bytes,
        "packed_bytes": context.pool.packed.nbytes,
        "packed_deltas": len(context.pool.packed.digests()),
        "max_resident_edits": context.edits.max_resident,
        "resident_edits": len(context.edits.residents()),
        "rows_in_flight": context.admission.rows,
        "queued_tokens": context.admission.queued_tokens,
    }
