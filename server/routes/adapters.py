"""vLLM's own calls for adapters, for the controllers that drive it: POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

import asyncio
from typing import Annotated

from fastapi import Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from server.artifacts.adapters import AdapterFolder
from server.routes.body import read_body
from server.routes.context import Context, Ctx
from server.wire import WireModel, parse


class LoadAdapter(WireModel):
    """`expected_generation` is ours (and mistral.rs's); `replace` is mistral.rs's word for `load_inplace`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    replace: bool = False
    expected_generation: Annotated[int, Field(ge=0)] | None = None


class UnloadAdapter(WireModel):
    lora_name: Annotated[str, Field(min_length=1, max_length=128)]


async def load(request: Request, context: Ctx) -> PlainTextResponse:
    """200 also where the name has that adapter already."""
    folder = _folder(context)
    body = parse(LoadAdapter, await read_body(request, context.limits.max_body_bytes))
    context.deltas.check_name(body.lora_name)
    with context.deltas.incoming(context.limits.max_upload_bytes) as incoming:
        await asyncio.to_thread(folder.read, body.lora_path, incoming)
        replace = body.load_inplace or body.replace
        await folder.publish(body.lora_name, incoming, replace, body.expected_generation)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(request: Request, context: Ctx) -> PlainTextResponse:
    """The name is gone at once; running requests keep their delta."""
    _folder(context)
    body = parse(UnloadAdapter, await read_body(request, context.limits.max_body_bytes))
    await context.deltas.delete(body.lora_name, drain=True)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _folder(context: Context) -> AdapterFolder:
    """Without the setting there are no such routes."""
    if context.adapters is None:
        raise HTTPException(404)
    return context.adapters
