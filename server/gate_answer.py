"""What the gate's decision makes of an answer: other tools, no tools, a draft, and the repair of calls that leak.

All of it works on events and on `Ask`, the rest of the request path as a function: the request's own prompt with these
tools, as events. Tokens of answers that are not sent are booked as the gate's.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from server.core import FinishReason, Sampling, TokenEvent, ToolUse
from server.decisions import Decisions, Gated

Events = AsyncGenerator[TokenEvent, None]
Json = dict[str, Any]

CALL_MARK = "<tool_call>"  # opens a call in the formats that can have text around one


class Ask(Protocol):
    """`n` replaces the request's number of choices."""

    def __call__(self, use: ToolUse | None, n: int | None = None) -> Events: ...


def draft_as_answer(draft: Sequence[TokenEvent], sampling: Sampling, alternatives: int) -> list[TokenEvent] | None:
    """The events of a finished draft as those of the answer; None where the request asks for another answer than it is."""
    tokens = sum(len(event.token_ids) for event in draft)
    text = "".join(event.text for event in draft)
    differs = (
        sampling.n > 1
        or not sampling.min_tokens <= tokens <= sampling.max_tokens
        or sampling.ignore_eos
        or any(stop in text for stop in sampling.stop)
        or bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias or sampling.structure)
        or sampling.repetition_penalty != 1
        or any(stop in event.token_ids for event in draft for stop in sampling.stop_token_ids)
        or (sampling.logprobs or 0) > alternatives
    )
    return None if differs else [_with_logprobs(event, sampling.logprobs) for event in draft]


def _with_logprobs(event: TokenEvent, wanted: int | None) -> TokenEvent:
    if wanted is None or event.logprobs is None:
        return replace(event, logprobs=None)
    return replace(event, logprobs=tuple(replace(token, top=token.top[:wanted]) for token in event.logprobs))


async def replayed(draft: Sequence[TokenEvent], gated: Gated, decisions: Decisions) -> Events:
    """The draft is the answer: its tokens are the request's, no longer the gate's."""
    decisions.prompt_tokens = draft[0].prompt_tokens
    gated.prompt_tokens -= draft[0].prompt_tokens
    gated.completion_tokens -= sum(len(event.token_ids) for event in draft)
    for event in draft:
        yield event


@dataclass
class Discarded:
    """Choices that are not sent but asked again: which of `n`, their events, and the tokens of their prompt."""

    n: int
    prompt_tokens: int
    events: dict[int, list[TokenEvent]] = field(default_factory=dict)

    async def replace_by(self, again: Events, gated: Gated, decisions: Decisions) -> Events:
        """The new choices under the numbers of the discarded ones. Costs are booked when the first of their events is there."""
        numbers = sorted(self.events)
        booked = False
        async with aclosing(again) as events:
            async for event in events:
                if not booked:
                    self._book(gated, decisions)
                    booked = True
                yield replace(event, index=numbers[event.index])

    def _book(self, gated: Gated, decisions: Decisions) -> None:
        gone = [event for events in self.events.values() for event in events]
        gated.completion_tokens += sum(len(event.token_ids) for event in gone)
        if len(self.events) == self.n:
            gated.prompt_tokens += self.prompt_tokens
            return
        gated.prompt_tokens += decisions.prompt_tokens
        decisions.prompt_tokens = self.prompt_tokens


async def without_calls(ask: Ask, use: ToolUse, n: int, gated: Gated, decisions: Decisions) -> Events:
    """Choice "none", which models do not always heed: calls are taken out of the text, and where nothing else is left
    the choice is asked again without tools.
    """
    watched = replace(use, choice="none", named=None, watched=True)
    cleaning = [_Cleaned() for _ in range(n)]
    empty = Discarded(n, 0)
    async with aclosing(ask(watched, n)) as events:
        async for event in events:
            choice = cleaning[event.index]
            for clean in choice.feed(event):
                yield clean
            if event.finish_reason is not None and choice.leaked:
                gated.leak = True
            if event.finish_reason is not None and not choice.begun:
                empty.events[event.index] = choice.held
    if decisions.tool_calls is not None:
        decisions.tool_calls.suppress(sum(choice.calls for choice in cleaning))
    if empty.events:
        empty.prompt_tokens = decisions.prompt_tokens
        async with aclosing(empty.replace_by(ask(None, len(empty.events)), gated, decisions)) as events:
            async for event in events:
                yield event


class _Cleaned:
    """One choice without its calls. It is held back until it has a letter of text, or has ended without a call."""

    def __init__(self) -> None:
        self.held: list[TokenEvent] = []
        self.begun = False
        self.leaked = False
        self.calls = 0

    def feed(self, event: TokenEvent) -> list[TokenEvent]:
        self.calls += sum(call.id is not None for call in event.calls)
        text, mark, _ = event.text.partition(CALL_MARK)
        if self.leaked and not self.calls:
            text = ""  # behind a mark that opened no call
        self.leaked = self.leaked or bool(mark or event.calls)
        reason = FinishReason.STOP if event.finish_reason is FinishReason.TOOL_CALLS else event.finish_reason
        self.held.append(replace(event, text=text, calls=(), finish_reason=reason))
        self.begun = self.begun or bool(text.strip()) or (reason is not None and not self.leaked)
        if not self.begun:
            return []
        ready, self.held = self.held, []
        return ready


def calls_of(events: Sequence[TokenEvent]) -> dict[int, list[Json]]:
    """The finished calls of every choice that has some, as OpenAI's `tool_calls`."""
    found: dict[int, list[Json]] = {}
    for event in events:
        for piece in event.calls:
            calls = found.setdefault(event.index, [])
            if piece.id is not None:
                function = {"name": piece.name, "arguments": piece.arguments}
                calls.append({"id": piece.id, "type": "function", "function": function})
            else:
                calls[piece.index]["function"]["arguments"] += piece.arguments
    return found


def to_discard(
    events: Sequence[TokenEvent], calls: dict[int, list[Json]], tools: Collection[str], n: int, prompt_tokens: int
) -> Discarded:
    """The choices that call one of the tools."""
    numbers = {index for index, made in calls.items() if any(call["function"]["name"] in tools for call in made)}
    return Discarded(
        n, prompt_tokens, {number: [event for event in events if event.index == number] for number in numbers}
    )
