"""`echo` of a completion: every choice begins with its prompt."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from server.core import TokenEvent, TokenLogprob


@dataclass(frozen=True)
class PromptText:
    """A prompt as an answer repeats it."""

    text: str
    first: TokenLogprob  # the token that nothing comes before, so without a log-probability


async def echoed(
    events: AsyncGenerator[TokenEvent, None], prompts: Sequence[PromptText], n: int, alone: bool
) -> AsyncGenerator[TokenEvent, None]:
    """The same events, the first of every choice with its prompt before it; `alone`: with nothing else.

    Choice i of prompt p has the index p * n + i; a comparison's choices are of one prompt.
    """
    begun: set[int] = set()
    async with aclosing(events):
        async for event in events:
            if alone:
                event = replace(event, text="", token_ids=(), logprobs=None if event.logprobs is None else ())
            if event.index not in begun:
                begun.add(event.index)
                event = _with_prompt(event, prompts[event.index // n % len(prompts)])
            yield event


def _with_prompt(event: TokenEvent, prompt: PromptText) -> TokenEvent:
    text = prompt.text + event.text
    if event.logprobs is None:
        return replace(event, text=text)
    return replace(event, text=text, logprobs=(prompt.first, *event.prompt_logprobs, *event.logprobs))
