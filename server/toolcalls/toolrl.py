"""ToolRL (2504.13958): `<think>`, then `<tool_call>` with one JSON object a line, then `<response>`.

Thoughts are reasoning, the response is content, and so is text outside of all tags; white space at the edges of each is
dropped. The arguments' key is `parameters`, or `arguments`. A block that holds a line which is no call is content as it
stands, and so is every block after the first: the format has one. A tag that is never closed ends with the text.
"""

import json

from server.toolcalls.deltas import Call, Content, Delta, Reasoning, attempt, partial_tag, to_call

_SECTIONS = {"<think>": "</think>", "<tool_call>": "</tool_call>", "<response>": "</response>"}
CALLS = "<tool_call>"


class ToolRL:
    def __init__(self) -> None:
        self.malformed = False
        self._held = ""
        self._open: str | None = None  # the tag that we are inside of
        self._block: list[str] = []  # of an open block of calls: all of it but what is held
        self._called = False
        self._content, self._reasoning = _Trimmed(), _Trimmed()

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        found: list[Delta] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[Delta]:
        found: list[Delta] = []
        self._pass_on(self._held, found)
        self._held = ""
        if self._open == CALLS:
            self._close_block(found)
        return found

    def _step(self, found: list[Delta]) -> bool:
        """Consume up to the next tag. False when there is none, and only what may begin one is left."""
        awaited = [_SECTIONS[self._open]] if self._open else list(_SECTIONS)
        places = {tag: place for tag in awaited if (place := self._held.find(tag)) >= 0}
        if not places:
            safe = len(self._held) - partial_tag(self._held, awaited)
            self._pass_on(self._held[:safe], found)
            self._held = self._held[safe:]
            return False
        tag = min(places, key=lambda tag: places[tag])
        before, self._held = self._held[: places[tag]], self._held[places[tag] + len(tag) :]
        self._pass_on(before, found)
        if self._open == CALLS:
            self._block.append(tag)
            self._close_block(found)
        self._content.end()
        self._reasoning.end()
        self._open = None if self._open else tag
        if self._open == CALLS:
            self._block = [tag]
        return True

    def _pass_on(self, text: str, found: list[Delta]) -> None:
        if self._open == CALLS:
            self._block.append(text)
        elif self._open == "<think>":
            found += [Reasoning(ready)] if (ready := self._reasoning.add(text)) else []
        else:
            found += [Content(ready)] if (ready := self._content.add(text)) else []

    def _close_block(self, found: list[Delta]) -> None:
        text = "".join(self._block)
        calls = None if self._called else attempt(_read, text)
        self._called = True
        if calls:
            found += calls
        else:
            self.malformed = True
            found.append(Content(self._content.add(text)))


def _read(block: str) -> list[Call]:
    body = block.removeprefix(CALLS).removesuffix(_SECTIONS[CALLS])
    lines = [line for line in body.split("\n") if line.strip()]
    return [to_call(json.loads(line), ("parameters", "arguments"), line.strip()) for line in lines]


class _Trimmed:
    """Text of several sections as it comes: each without white space at its edges, a line break between them."""

    def __init__(self) -> None:
        self._begun = False  # anything at all went out
        self._inside = False  # something of this section did
        self._space = ""

    def add(self, text: str) -> str:
        if not self._inside:
            text = text.lstrip()
        if not text:
            return ""
        joint = "\n" if self._begun and not self._inside else ""
        whole = self._space + text
        ready = whole.rstrip()
        self._space = whole[len(ready) :]
        if ready:
            self._begun = self._inside = True
        return joint + ready if ready else ""

    def end(self) -> None:
        self._inside, self._space = False, ""
