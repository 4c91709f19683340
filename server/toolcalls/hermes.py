"""Hermes and Qwen2.5: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, one object per pair of tags.

As vLLM's `hermes`: the text before the first tag is content as it stands, what follows the last pair is dropped, the last
pair may be open, and one block that is no call makes the whole text content. That verdict falls with the text's end, so
that is when calls go out.
"""

import json

from server.toolcalls.deltas import Call, Delta, attempt, content, partial_tag, to_call

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    def __init__(self) -> None:
        self.malformed = False
        self._held: list[str] = []  # from the first tag on; before one is seen: what may be its beginning
        self._inside = False

    def feed(self, text: str) -> list[Delta]:
        if self._inside:
            self._held.append(text)
            return []
        text = "".join(self._held) + text
        start = text.find(OPEN)
        self._inside = start >= 0
        if start < 0:
            start = len(text) - partial_tag(text, (OPEN,))
        self._held = [text[start:]]
        return content(text[:start])

    def finish(self) -> list[Delta]:
        text = "".join(self._held)
        calls = attempt(_read, text) if self._inside else None
        self.malformed = self._inside and calls is None
        return [*calls] if calls else content(text)


def _read(text: str) -> list[Call]:
    calls = []
    end = 0
    while (start := text.find(OPEN, end)) >= 0:
        inside = start + len(OPEN)
        close = text.find(CLOSE, inside)
        end = len(text) if close < 0 else close + len(CLOSE)
        found = json.loads(text[inside : close if close >= 0 else end])
        calls.append(to_call(found, ("arguments",), text[start:end]))
    return calls
