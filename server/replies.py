"""TokenEvents -> OpenAI bodies and chunks, for chat and for legacy completions."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from server import gate_report
from server.core import CallDelta, FinishReason, TokenEvent, TokenLogprob
from server.decisions import Decisions, Steered

Json = dict[str, Any]

MAX_POSITIONS = 64


@dataclass(frozen=True)
class StreamedUsage:
    """Which chunks of a stream tell the usage: one of its own at the end, and every one that of so far."""

    at_end: bool = False
    always: bool = False


@dataclass
class Choice:
    """One choice while its events are folded."""

    text: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Reply(ABC):
    """The envelope of one answer; its two kinds know how a choice looks."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, request_id: str, model: str, decisions: Decisions, with_logprobs: bool) -> None:
        self._id = f"{self.id_prefix}-{request_id}"
        self._model = model
        self._created = int(time.time())
        self._decisions = decisions
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()
        self._text_length: dict[int, int] = {}

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> Json:
        """A finished choice of a body that is not streamed."""

    @abstractmethod
    def deltas(self, event: TokenEvent) -> Iterator[Json]:
        """The chunk choices that one event turns into."""

    async def body(self, events: AsyncIterator[TokenEvent]) -> Json:
        """Fold all events into the body of an answer that is not streamed."""
        choices: dict[int, Choice] = {}
        async for event in events:
            choice = choices.setdefault(event.index, Choice())
            choice.text += event.text
            choice.reasoning += event.reasoning
            _add_calls(choice.calls, event.calls)
            choice.logprobs += event.logprobs or ()
            choice.finish_reason = event.finish_reason or choice.finish_reason
        return {
            **self._envelope(self.object),
            "choices": [self.choice(index, choices[index]) | self._label(index) for index in sorted(choices)],
            "usage": self._usage(),
            "gateway": self._gateway(),
        }

    async def chunks(self, events: AsyncIterator[TokenEvent], usage: StreamedUsage) -> AsyncGenerator[Json, None]:
        """The chunks of a stream; the last one carries `gateway`, and the usage when it was asked for.

        What steering did and the tool gate decided is known with the first token, so the first chunk tells it too.
        """
        last: Json | None = None
        made = self._decisions
        first = self._steering() if made.steered else {}
        if made.gated is not None:
            first["tool_gate"] = gate_report.body(made.gated)
        async for event in events:
            for choice in self.deltas(event):
                if last is not None:
                    yield last
                last = {**self._envelope(self.chunk_object), "choices": [choice | self._label(event.index)]}
                if usage.at_end or usage.always:
                    last["usage"] = self._usage() if usage.always else None
                if first:
                    last["gateway"], first = first, {}
                if not choice["finish_reason"]:  # nothing can be known to be last before a choice is finished
                    yield last
                    last = None
        if last is not None and usage.at_end:
            yield last
            last = {**self._envelope(self.chunk_object), "choices": [], "usage": self._usage()}
        if last is not None:
            yield {**last, "gateway": self._gateway()}

    def _label(self, index: int) -> Json:
        """Which of a comparison's two choices this is."""
        steered = self._decisions.steered
        return {"steering": steered.choice_label(index)} if steered and steered.compare else {}

    def _envelope(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._decisions.system_fingerprint,
        }

    def _usage(self) -> Json:
        usage = self._decisions.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    def _gateway(self) -> Json:
        made = self._decisions
        return {
            "delta": made.delta if made.delta_digest else None,
            "delta_digest": made.delta_digest,
            "delta_version": made.delta_version,
            **({"deltas": [asdict(part) for part in made.parts]} if made.parts else {}),
            "base_fingerprint": made.base_fingerprint,
            "template_sha256": made.template_sha256,
            **self._steering(),
            "tool_gate": gate_report.body(made.gated),
            "timings": {
                "delta_wait_s": _rounded(made.delta_wait_s),
                "ttft_s": _rounded(made.ttft_s),
                "total_s": _rounded(made.total_s),
            },
        }

    def _steering(self) -> Json:
        made = self._decisions
        return {
            "steering": _edited(made.steered) if made.steered and made.steered.mode != "score" else None,
            "conflict": _conflict(made.steered) if made.steered and made.steered.score is not None else None,
            "warnings": [{"code": warning.code, "message": warning.message} for warning in made.warnings],
        }


class ChatReply(Reply):
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        if len(message) > 2:
            message["content"] = choice.text or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def deltas(self, event: TokenEvent) -> Iterator[Json]:
        if event.index not in self._begun:
            self._begun.add(event.index)
            yield self._delta(event.index, {"role": "assistant", "content": ""})
        logprobs = self._logprobs(event.logprobs) if event.logprobs else None
        for delta in _chat_deltas(event, logprobs is not None):
            yield {**self._delta(event.index, delta), "logprobs": logprobs}
            logprobs = None  # of the event's tokens, so once, however many chunks they make
        if event.finish_reason is not None:
            yield {**self._delta(event.index, {}), "finish_reason": event.finish_reason}

    def _delta(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
        return {"content": content}


class CompletionReply(Reply):
    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
        }

    def deltas(self, event: TokenEvent) -> Iterator[Json]:
        if event.text or event.logprobs or event.finish_reason is not None:
            offset = self._text_length.get(event.index, 0)
            # Where tokens are told their text counts: what may yet become a stop string comes later than its tokens.
            said = (token.text for token in event.logprobs) if event.logprobs else (event.text,)
            self._text_length[event.index] = offset + sum(map(len, said))
            yield {
                "index": event.index,
                "text": event.text,
                "logprobs": self._logprobs(event.logprobs or (), offset),
                "finish_reason": event.finish_reason,
            }

    def _logprobs(self, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> Json | None:
        if not self._with_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token) for token in tokens],
            # OpenAI: the sampled token is always among them, so there can be one more than asked for.
            "top_logprobs": [
                None if token.logprob is None else {other.text: _finite(other) for other in (*token.top, token)}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _chat_deltas(event: TokenEvent, at_least_one: bool) -> Iterator[Json]:
    """What the event adds to the message, each part as a delta of its own; an empty one where none but must be."""
    if event.reasoning:
        yield {"reasoning_content": event.reasoning}
    if event.text:
        yield {"content": event.text}
    for call in event.calls:
        function = {"name": call.name, "arguments": call.arguments} if call.id else {"arguments": call.arguments}
        begun = {"index": call.index, "id": call.id, "type": "function"} if call.id else {"index": call.index}
        yield {"tool_calls": [{**begun, "function": function}]}
    if at_least_one and not (event.reasoning or event.text or event.calls):
        yield {"content": ""}


def _add_calls(calls: list[Json], pieces: Sequence[CallDelta]) -> None:
    for piece in pieces:
        if piece.id is None:
            calls[piece.index]["function"]["arguments"] += piece.arguments
            continue
        function = {"name": piece.name, "arguments": piece.arguments}
        calls.append({"id": piece.id, "type": "function", "function": function})


def _edited(steered: Steered) -> Json:
    """What the worker reported of the request's (first) prompt; positions are absolute, and cut after MAX_POSITIONS."""
    report = {
        "positions": list(steered.positions[:MAX_POSITIONS]),
        "layers": [
            {
                "layer": layer.layer,
                "rows": layer.rows,
                "added": layer.raised,
                "removed": layer.lowered,
                "rel_norm": round(layer.rel_norm, 6),
            }
            for layer in steered.layers
        ],
    }
    return {
        "applied": steered.applied,
        "reason": steered.reason,
        "profile": steered.profile,
        "profile_digest": steered.profile_digest,
        "direction": steered.direction,
        "strength": steered.strength,
        "fingerprint": f"sha256:{steered.fingerprint}" if steered.fingerprint else None,
        **(report if steered.report else {}),
        # What the prefix cache shares with requests that are not edited the same way.
        "cache_key_scope": "from_edit" if steered.fingerprint else "shared",
    }


def _conflict(steered: Steered) -> Json:
    return {"score": steered.score, "layer": steered.probe_layer, "auroc": steered.probe_auroc}


def _token(token: TokenLogprob) -> Json:
    return {"token": token.text, "logprob": _finite(token), "bytes": list(token.text.encode())}


def _finite(token: TokenLogprob) -> float | None:
    return None if token.logprob is None else max(token.logprob, -9999.0)  # JSON has no -inf; the value is vLLM's


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
