"""Texts that a JSON schema has shaped: of `tool_choice` "required" and of a named function.

A grammar made these texts, but they can end early, by the token limit or by a stop string of the request.
"""

import json

from server.toolcalls.deltas import Call, Delta, MoreArguments, attempt, content, to_call


class Named:
    """The whole text is the arguments of a call whose name is known. As vLLM's, also when the text was cut off."""

    def __init__(self, name: str) -> None:
        self.malformed = False
        self._name = name
        self._begun = False
        self._text: list[str] = []

    def feed(self, text: str) -> list[Delta]:
        self._text.append(text)
        if self._begun:
            return [MoreArguments(text)] if text else []
        begun = "".join(self._text)
        if not begun.strip():
            return []
        self._begun = True
        return [Call(self._name, begun)]

    def finish(self) -> list[Delta]:
        try:
            json.loads("".join(self._text))
        except (ValueError, RecursionError):
            self.malformed = True
        return []


class Required:
    """A JSON array of calls. Each goes out when its object is closed; what never becomes a call is content."""

    def __init__(self) -> None:
        self.malformed = False
        self._depth = 0  # of brackets and braces; 1 is between the calls
        self._in_string = self._escaped = False
        self._object: list[str] = []
        self._frame: list[str] = []  # what stands before the first call
        self._closed = self._called = self._through = False

    def feed(self, text: str) -> list[Delta]:
        if self._through:
            return content(text)
        found: list[Delta] = []
        for letter in text:
            found += self._read(letter)
        return found

    def finish(self) -> list[Delta]:
        self.malformed = self._through or not self._closed or not self._called
        return content("".join([*self._frame, *self._object]))

    def _read(self, letter: str) -> list[Delta]:
        if self._through:
            return content(letter)
        if self._depth >= 2:
            self._object.append(letter)
            self._follow(letter)
            return self._close() if self._depth == 1 else []
        if letter == "{" and self._depth == 1:
            self._object, self._depth = [letter], 2
            return []
        if letter == "[" and self._depth == 0 and not self._closed:
            self._depth = 1
        elif letter == "]" and self._depth == 1:
            self._depth, self._closed = 0, True
        elif letter not in " \t\n\r" and (letter != "," or self._depth == 0):
            return self._give_up(letter)
        self._frame += [] if self._called else [letter]
        return []

    def _follow(self, letter: str) -> None:
        """Keep count of what is open; brackets inside strings are letters."""
        if self._in_string:
            self._in_string = letter != '"' or self._escaped
            self._escaped = letter == "\\" and not self._escaped
        elif letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1

    def _close(self) -> list[Delta]:
        text, self._object = "".join(self._object), []
        calls = attempt(_read, text)
        if calls is None:
            return self._give_up(text)
        self._called, self._frame = True, []
        return [*calls]

    def _give_up(self, text: str) -> list[Delta]:
        before, self._frame = "".join(self._frame), []
        self._through = True
        return content(before + text)


def _read(text: str) -> list[Call]:
    return [to_call(json.loads(text), ("parameters",), text)]
