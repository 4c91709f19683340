"""/tokenize, /detokenize and /tokenizer_info, as vLLM's servers answer them."""

from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from server.answers import Detokenized, Tokenized
from server.engine.base import EngineDelta
from server.routes.body import JsonBody
from server.routes.context import Ctx, Serving
from server.telemetry import Exchange
from server.token_schema import DetokenizeBody, TokenizeBody


async def tokenize(
    request: Request, context: Serving, body: Annotated[TokenizeBody, Depends(JsonBody(TokenizeBody))]
) -> Tokenized:
    delta = _delta(request, context, body.model)
    ids = await context.gateway.tokenize(delta, body.to_prompt(), body.to_tool_use())
    return {
        "count": len(ids),
        "max_model_len": context.gateway.max_model_len,
        "tokens": ids,
        "token_strs": await context.prompts.token_texts(ids, delta) if body.return_token_strs else None,
    }


async def detokenize(
    request: Request, context: Ctx, body: Annotated[DetokenizeBody, Depends(JsonBody(DetokenizeBody))]
) -> Detokenized:
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
