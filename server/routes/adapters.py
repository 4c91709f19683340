"""vLLM's own calls for adapters, for the controllers that drive it: POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

import asyncio
from typing import Annotated

from fastapi import Depends
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from server.answers import Text, Told
from server.artifacts.adapters import AdapterFolder
from server.routes.body import JsonBody
from server.routes.context import Ctx
from server.wire import ArtifactName, WireModel

Plain = Annotated[PlainTextResponse, Told({200: Text()})]


class LoadAdapter(WireModel):
    """`expected_generation` is ours (and mistral.rs's); `replace` is mistral.rs's word for `load_inplace`."""

    lora_name: Annotated[ArtifactName, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    replace: bool = False
    expected_generation: Annotated[int, Field(ge=0)] | None = None


class UnloadAdapter(WireModel):
    lora_name: Annotated[str, Field(min_length=1, max_length=128)]


async def _folder(context: Ctx) -> AdapterFolder:
    """Without the setting there are no such routes."""
    if context.adapters is None:
        raise HTTPException(404)
    return context.adapters


Folder = Annotated[AdapterFolder, Depends(_folder)]


async def load(folder: Folder, context: Ctx, body: Annotated[LoadAdapter, Depends(JsonBody(LoadAdapter))]) -> Plain:
    """200 also where the name has that adapter already."""
    context.deltas.check_name(body.lora_name)
    with context.deltas.incoming(context.limits.max_upload_bytes) as incoming:
        await asyncio.to_thread(folder.read, body.lora_path, incoming)
        replace = body.load_inplace or body.replace
        await folder.publish(body.lora_name, incoming, replace, body.expected_generation)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(
    folder: Folder, context: Ctx, body: Annotated[UnloadAdapter, Depends(JsonBody(UnloadAdapter))]
) -> Plain:
    """The name is gone at once; running requests keep their delta."""
    await context.deltas.delete(body.lora_name, drain=True)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
