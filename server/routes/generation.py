"""POST /v1/chat/completions and /v1/completions: one path, streamed or folded."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated

from fastapi import Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server import deadline, sse
from server.answers import ChatCompletion, ChatCompletionChunk, TextCompletion, TextCompletionChunk, Told
from server.core import GenerationRequest, TokenEvent
from server.replies import ChatReply, CompletionReply, Reply
from server.routes.body import ClientGone, JsonBody, until_gone
from server.routes.context import Context, Ctx
from server.schemas import ChatRequest, CompletionRequest, SamplingFields
from server.telemetry import Exchange
from server.wire import UnsupportedParameter

# No parameter of the handlers: FastAPI takes its time to read a header, and this is asked of every request.
ASKED = {deadline.HEADER: Annotated[str, Field(pattern=deadline.MILLISECONDS)]}


async def chat(
    request: Request,
    context: Ctx,
    body: Annotated[ChatRequest, Depends(JsonBody(ChatRequest))],
) -> Annotated[Response, Told({200: ChatCompletion}, events=ChatCompletionChunk, asked=ASKED)]:
    _check_priority(body, context)
    generation = body.to_request(uuid.uuid4().hex, context.limits.default_max_tokens)
    decisions = Exchange.of(request.scope).decisions
    reply = ChatReply(
        body.request_id or generation.request_id, body.model, decisions, generation.sampling.logprobs is not None
    )
    return await _answer(request, context, body, generation, reply)


async def completions(
    request: Request,
    context: Ctx,
    body: Annotated[CompletionRequest, Depends(JsonBody(CompletionRequest))],
) -> Annotated[Response, Told({200: TextCompletion}, events=TextCompletionChunk, asked=ASKED)]:
    _check_priority(body, context)
    generation = body.to_request(uuid.uuid4().hex, context.limits.default_max_tokens)
    decisions = Exchange.of(request.scope).decisions
    reply = CompletionReply(
        body.request_id or generation.request_id, body.model, decisions, generation.sampling.logprobs is not None
    )
    return await _answer(request, context, body, generation, reply)


def _check_priority(body: SamplingFields, context: Context) -> None:
    """Raises UnsupportedParameter."""
    if body.priority and not context.limits.priorities:
        raise UnsupportedParameter('priority needs engine.scheduling_policy = "priority"', param="priority")


async def _answer(
    request: Request,
    context: Context,
    body: SamplingFields,
    generation: GenerationRequest,
    reply: Reply,
) -> Response:
    """The first event is awaited before anything is sent: what fails until then fails with a true status."""
    exchange = Exchange.of(request.scope)
    exchange.stream = bool(body.stream)
    decisions = exchange.decisions
    seconds = deadline.limit_s(request.headers.get(deadline.HEADER), context.limits.request_timeout_s)
    events = context.gateway.generate(generation, decisions, exchange.caller)
    if seconds is not None:
        events = deadline.within(events, seconds, time.perf_counter() - decisions.started)
    async with AsyncExitStack() as leaving:  # also when this handler is cancelled just as the first event comes
        await leaving.enter_async_context(aclosing(events))
        first = await until_gone(request.receive, anext(events))
        if body.stream:
            leaving.pop_all()
            frames = sse.stream(reply, _chain(first, events), body.streamed_usage, exchange)
            return EventStream(events, frames, exchange, context.limits.keep_alive_s)
        return JSONResponse(await until_gone(request.receive, reply.body(_chain(first, events))))


class EventStream(Response):
    """An SSE response that ends the generation as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(
        self,
        rest: AsyncGenerator[TokenEvent, None],
        frames: AsyncGenerator[bytes, None],
        exchange: Exchange,
        keep_alive_s: float,
    ) -> None:
        # x-accel-buffering: nginx would otherwise hold the tokens back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._rest = rest
        self._exchange = exchange
        self._frames = frames
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest), aclosing(self._frames):
            try:
                await until_gone(receive, self._send(send))
            except ClientGone as error:
                self._exchange.failed_status, self._exchange.error_code = 499, "client_gone"
                self._exchange.gone_at = error.at

    async def _send(self, send: Send) -> None:
        async def write(frame: bytes) -> None:
            await send({"type": "http.response.body", "body": frame, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        line = sse.Line(write, self._keep_alive_s)
        async with line.kept_alive():
            async for frame in self._frames:
                await line.say(frame)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chain(first: TokenEvent, rest: AsyncIterator[TokenEvent]) -> AsyncIterator[TokenEvent]:
    yield first
    async for event in rest:
        yield event
