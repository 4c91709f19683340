"""GET /v1/models and /v1/models/{id}."""

from fastapi import Request

from server.answers import BaseMetadata, DeltaMetadata, ModelCard, ModelList
from server.artifacts.versions import DeltaVersion, Ref
from server.routes.context import Context, Ctx
from server.telemetry import Exchange


async def list_models(request: Request, context: Ctx) -> ModelList:
    """What the caller may use."""
    caller = Exchange.of(request.scope).caller
    deltas = [
        _delta_card(context, ref.name, ref, version)
        for ref in context.registry.refs()
        if (version := ref.active()) and caller.may_use(ref.name)
    ]
    return {"object": "list", "data": [_base_card(context), *deltas]}


async def get_model(model_id: str, request: Request, context: Ctx) -> ModelCard:
    """By any name that the caller's requests may use. Raises ModelNotFound."""
    if model_id == context.registry.base_id:
        return _base_card(context)
    may_use = Exchange.of(request.scope).caller.may_use
    return _delta_card(context, model_id, *context.registry.lookup(model_id, "model", may_use))


def _card(
    context: Context, name: str, parent: str | None, created: int, metadata: BaseMetadata | DeltaMetadata
) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "deltaworks",
        "root": context.registry.base_id,
        "parent": parent,
        "max_model_len": context.gateway.max_model_len,
        "permission": [],
        "metadata": metadata,
    }


def _base_card(context: Context) -> ModelCard:
    metadata: BaseMetadata = {"kind": "base", "fingerprint": context.gateway.base_fingerprint}
    return _card(context, context.registry.base_id, None, context.gateway.created, metadata)


def _delta_card(context: Context, name: str, ref: Ref[DeltaVersion], version: DeltaVersion) -> ModelCard:
    state, _ = context.pool.state(version.digest)
    metadata: DeltaMetadata = {
        "kind": "delta",
        "name": ref.name,
        "version": ref.label(version.digest),
        "digest": version.digest,
        "state": state,
        "nbytes": version.nbytes,
        "pinned": ref.pinned,
    }
    return _card(context, name, context.registry.base_id, version.created, metadata)
