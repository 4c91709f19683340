"""/tokenize, /detokenize and /tokenizer_info, as vLLM's servers answer them."""

from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from server.engine.base import EngineDelta
from server.routes.body import read_body
from server.routes.context import Ctx
from server.telemetry import Exchange
from server.token_schema import DetokenizeBody, TokenizeBody
from server.wire import parse


async def tokenize(request: Request, context: Ctx) -> dict[str, Any]:
    context.gateway.require_ready()
    body = parse(TokenizeBody, await read_body(request, context.limits.max_body_bytes))
    delta = _delta(request, context, body.model)
    ids = await context.gateway.tokenize(delta, body.to_prompt(), body.to_tool_use())
    return {
        "count": len(ids),
        "max_model_len": context.gateway.max_model_len,
        "tokens": ids,
        "token_strs": await context.prompts.token_texts(ids, delta) if body.return_token_strs else None,
    }


async def detokenize(request: Request, context: Ctx) -> dict[str, Any]:
    body = parse(DetokenizeBody, await read_body(request, context.limits.max_body_bytes))
    return {"prompt": await context.prompts.detokenize(body.tokens, _delta(request, context, body.model))}


def _delta(request: Request, context: Ctx, model: str | None) -> EngineDelta | None:
    """The delta whose tokenizer is meant; None for the base's, also where no model is named. Raises ModelNotFound."""
    if model is None:
        return None
    return context.registry.resolve(model, Exchange.of(request.scope).caller.may_use).delta


async def tokenizer_info(context: Ctx) -> dict[str, Any]:
    """Only where the settings say so: a chat template can hold what its owner shows to nobody."""
    if not context.limits.tokenizer_info:
        raise HTTPException(404)
    return context.prompts.tokenizer_facts()
