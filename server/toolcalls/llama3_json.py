"""Llama 3: objects with name and arguments (or parameters), bare, one after another, ";" or a line break between them.

As vLLM's `llama3_json`: objects are looked for anywhere, text around them is dropped, and one object that is no call makes
the whole text content. So nothing can go out before the text has ended, but for a text whose first brace cannot open an
object: that is content at once.
"""

import json
import re

from server.toolcalls.deltas import Call, Delta, attempt, content, to_call

PYTHON_TAG = "<|python_tag|>"
_NO_OBJECT = re.compile(r"\{[ \t\n\r]*[^ \t\n\r\"}]")
_DECODER = json.JSONDecoder()


class Llama3Json:
    def __init__(self) -> None:
        self.malformed = False
        self._held: list[str] = []
        self._brace = ""  # the first brace and the white space after it
        self._decided = False  # whether the first brace may open an object
        self._through = False

    def feed(self, text: str) -> list[Delta]:
        if self._through:
            return content(text)
        self._held.append(text)
        if not self._decided:
            self._look_at_first_brace(text)
        if not self._through:
            return []
        return content("".join(self._held))

    def finish(self) -> list[Delta]:
        if self._through:
            return []
        text = "".join(self._held)
        calls = attempt(_read, text)
        if calls is None:
            self.malformed = text.lstrip().startswith(("{", PYTHON_TAG))
            return content(text)
        return [*calls]

    def _look_at_first_brace(self, text: str) -> None:
        seen = self._brace + text if self._brace else text[text.find("{") :] if "{" in text else ""
        self._through = _NO_OBJECT.match(seen) is not None
        self._decided = self._through or bool(seen[1:].strip(" \t\n\r"))
        self._brace = "" if self._decided else seen


def _read(text: str) -> list[Call]:
    calls: list[Call] = []
    end = -1
    for match in re.finditer(r"\{", text):
        start = match.start()
        if start <= end:  # vLLM: an object that touches the last one is not looked at, only what is inside it
            continue
        found, end = _DECODER.raw_decode(text, start)
        calls.append(to_call(found, ("arguments", "parameters"), text[start:end]))
    return calls
