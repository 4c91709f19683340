"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import Request

from server.artifacts.registry import ModelNotFound
from server.artifacts.versions import DeltaVersion, Ref
from server.routes.context import Context, Ctx
from server.telemetry import Exchange


async def list_models(request: Request, context: Ctx) -> dict[str, Any]:
    """What the caller may use."""
    deltas = [_delta_card(context, ref) for ref in _usable(request, context)]
    return {"object": "list", "data": [_base_card(context), *deltas]}


async def get_model(model_id: str, request: Request, context: Ctx) -> dict[str, Any]:
    """Raises ModelNotFound."""
    if model_id == context.registry.base_id:
        return _base_card(context)
    for ref in _usable(request, context):
        if ref.name == model_id:
            return _delta_card(context, ref)
    raise ModelNotFound("the model does not exist, or you have no access to it", param="model")


def _usable(request: Request, context: Context) -> list[Ref[DeltaVersion]]:
    caller = Exchange.of(request.scope).caller
    return [ref for ref in context.registry.refs() if ref.digest is not None and caller.may_use(ref.name)]


def _card(context: Context, name: str, parent: str | None, created: int, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "deltaworks",
        "root": context.registry.base_id,
        "parent": parent,
        "max_model_len": context.gateway.max_model_len,
        "metadata": metadata,
    }


def _base_card(context: Context) -> dict[str, Any]:
    metadata = {"kind": "base", "fingerprint": context.gateway.base_fingerprint}
    return _card(context, context.registry.base_id, None, context.gateway.created, metadata)


def _delta_card(context: Context, ref: Ref[DeltaVersion]) -> dict[str, Any]:
    version = ref.active()
    assert version is not None  # the alias only ever points to one of the versions
    state, _ = context.pool.state(version.digest)
    metadata = {"kind": "delta", "digest": version.digest, "state": state, "nbytes": version.nbytes}
    return _card(context, ref.name, context.registry.base_id, version.created, metadata)
