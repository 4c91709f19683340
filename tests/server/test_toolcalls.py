"""The parsers of tool calls: what each reads, and that no way of cutting a text changes what it holds."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.toolcalls import PARSERS, Parsed, fold, parse
from server.toolcalls.deltas import Call, Content, Delta, Parser
from server.toolcalls.forced import Named, Required
from tests.server.tool_texts import texts

TEXTS = [text for text in texts() if len(text) < 4000]
PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<response>",
        "</response>",
        "<|python_tag|>",
        "[",
        "]",
        "{",
        "}",
    ),
    *(
        '{"name": "a", "arguments": {"x": 1}}',
        '{"name": "b", "parameters": {}}',
        "f(x=1)",
        "g()",
        ", ",
        ";",
        "\n",
        " ",
        "ж🌊",
    ),
]
MAKERS: dict[str, Callable[[], Parser]] = {**PARSERS, "named": lambda: Named("f"), "required": Required}


def read(parser: Parser, pieces: list[str]) -> tuple[list[Delta], Parsed]:
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    deltas += parser.finish()
    return deltas, fold(deltas, parser.malformed)


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


pieced = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
written = st.one_of(st.sampled_from(TEXTS), pieced, st.text(alphabet="<>/tool_cal{}[]()\"'a=1,: \n", max_size=60))


@pytest.mark.parametrize("maker", MAKERS)
@given(text=written, places=st.lists(st.integers(0, 10_000), max_size=25))
@settings(max_examples=400, deadline=None)
def test_any_split_is_the_whole(maker: str, text: str, places: list[int]) -> None:
    _, whole = read(MAKERS[maker](), [text])
    deltas, split = read(MAKERS[maker](), cut(text, places))
    assert split == whole
    assert not any(isinstance(delta, Content) and not delta.text for delta in deltas)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_text_letter_by_letter(maker: str) -> None:
    for text in TEXTS[:400]:
        assert read(MAKERS[maker](), list(text))[1] == read(MAKERS[maker](), [text])[1]


@pytest.mark.parametrize("parser", PARSERS)
@given(text=written)
@settings(max_examples=300, deadline=None)
def test_text_is_lost_only_around_calls(parser: str, text: str) -> None:
    """Without calls, a text is content to the last letter; toolrl alone drops tags and white space at edges."""
    found = parse(parser, text)
    assert all(call.source in text for call in found.calls)
    if parser != "toolrl" and not found.calls:
        assert found.content == text
    if found.calls:
        assert not found.malformed or parser == "toolrl"


@pytest.mark.parametrize(
    ("parser", "text", "calls"),
    [
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', [("a", '{"x": 1}')]),
        ("llama3_json", '{"name": "a", "parameters": {"x": "é"}}', [("a", '{"x": "é"}')]),
        ("pythonic", "[a(x=1), b(y=[true, None])]", [("a", '{"x": 1}'), ("b", '{"y": [true, null]}')]),
        (
            "toolrl",
            '<tool_call>\n{"name": "a", "parameters": {}}\n{"name": "b", "arguments": {}}\n</tool_call>',
            [("a", "{}"), ("b", "{}")],
        ),
    ],
)
def test_calls_of_each_format(parser: str, text: str, calls: list[tuple[str, str]]) -> None:
    found = parse(parser, text)
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.content is None
    assert not found.malformed


def test_content_before_a_hermes_call_streams_at_once_and_no_half_tag_with_it() -> None:
    parser = PARSERS["hermes"]()
    seen = [parser.feed(piece) for piece in ("Let me", " see <", "b> <tool", '_call>{"name": "a", "argu')]
    assert seen == [[Content("Let me")], [Content(" see ")], [Content("<b> ")], []]
    assert parser.feed('ments": {}}</tool_call>') == []
    assert [delta.name for delta in parser.finish() if isinstance(delta, Call)] == ["a"]


@pytest.mark.parametrize(
    ("parser", "text", "at_once"),
    [
        ("pythonic", "The answer", True),
        ("pythonic", "[1] says", True),
        ("pythonic", "[note", False),
        ("pythonic", "[note] says", True),
        ("pythonic", "[f(", False),
        ("llama3_json", "if (x) { return", True),
        ("llama3_json", "no brace yet", False),
        ("llama3_json", '{"name', False),
        ("toolrl", "The answer", True),
        ("toolrl", "<thin", False),
    ],
)
def test_when_text_is_surely_content(parser: str, text: str, at_once: bool) -> None:
    assert (PARSERS[parser]().feed(text) == [Content(text)]) is at_once


TOOLRL_CALL = '{"name": "a", "parameters": {"x": 1}}'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls", "malformed"),
    [
        ("<think> why </think>\n<response> so </response>\n", "why", "so", 0, False),
        (f"<think>\nw\n</think>\n<tool_call>\n{TOOLRL_CALL}\n</tool_call>", "w", None, 1, False),
        (f"<tool_call>\n{TOOLRL_CALL}\n\n{TOOLRL_CALL}\n</tool_call>\n<response>r</response>", None, "r", 2, False),
        (f"<tool_call>{TOOLRL_CALL}", None, None, 1, False),
        (
            f"<tool_call>\n{TOOLRL_CALL}\nno\n</tool_call>",
            None,
            f"<tool_call>\n{TOOLRL_CALL}\nno\n</tool_call>",
            0,
            True,
        ),
        ("<tool_call>\n</tool_call>", None, "<tool_call>\n</tool_call>", 0, True),
        (
            f"<think><tool_call>{TOOLRL_CALL}</tool_call></think>",
            f"<tool_call>{TOOLRL_CALL}</tool_call>",
            None,
            0,
            False,
        ),
        ("<think>open", "open", None, 0, False),
        ("<think>a </think> <think> b</think>", "a\nb", None, 0, False),
        ("<response>open ", None, "open", 0, False),
        ("bare text ", None, "bare text", 0, False),
        ("a <response>b</response> c", None, "a\nb\nc", 0, False),
        ("", None, "", 0, False),
    ],
)
def test_toolrl(text: str, reasoning: str | None, content: str | None, calls: int, malformed: bool) -> None:
    found = parse("toolrl", text)
    assert (found.reasoning, found.content, len(found.calls), found.malformed) == (reasoning, content, calls, malformed)


def test_toolrl_reads_one_block_only() -> None:
    block = f"<tool_call>\n{TOOLRL_CALL}\n</tool_call>"
    found = parse("toolrl", f"{block}\n{block}")
    assert (len(found.calls), found.content, found.malformed) == (1, block, True)


@pytest.mark.parametrize(
    ("text", "names", "content", "malformed"),
    [
        ('[{"name": "a", "parameters": {"x": "]}\\""}}, {"name":"b","parameters":{}}]', ["a", "b"], None, False),
        ('[{"name": "a", "parameters": {}}, {"name": "b", "par', ["a"], '{"name": "b", "par', True),
        ('[{"name": "a", "parameters": {}}', ["a"], None, True),
        ('[{"name": "a", "parameters": {}}]', ["a"], None, False),
        ('[{"name": "a", "parameters": {}}] x', ["a"], "x", True),
        (' [{"name": "a"}] x', [], ' [{"name": "a"}] x', True),
        ('[ {"name": "a", "par', [], '[ {"name": "a", "par', True),
        ("[]", [], "[]", True),
        (" [", [], " [", True),
        ("not JSON", [], "not JSON", True),
        ("", [], "", True),
    ],
)
def test_required(text: str, names: list[str], content: str | None, malformed: bool) -> None:
    _, found = read(Required(), [text])
    assert ([call.name for call in found.calls], found.content, found.malformed) == (names, content, malformed)


def test_a_required_call_goes_out_when_its_object_closes() -> None:
    parser = Required()
    assert parser.feed('[{"name": "a", "parameters": {"x": 1}') == []
    assert parser.feed("}, {") == [Call("a", '{"x": 1}', '{"name": "a", "parameters": {"x": 1}}')]


def test_named_streams_its_arguments_as_they_come() -> None:
    deltas, found = read(Named("f"), [" ", "", '{"x"', ": 1}"])
    assert len(deltas) == 2
    assert found.calls == (Call("f", ' {"x": 1}'),)
    assert not found.malformed
    _, found = read(Named("f"), ['{"x": "cut'])
    assert (found.calls, found.malformed) == ((Call("f", '{"x": "cut'),), True)
    assert read(Named("f"), [""])[1].calls == ()


HOSTILE = [
    "[" * 200_000,
    "{" * 200_000,
    '{"a":' * 100_000,
    "<tool_call>" * 20_000,
    "<tool_call>" + "[" * 200_000,
    "<tool_call>{}</tool_call>" * 5000,
    "<" * 100_000,
    "[f(x=" + "(" * 100_000,
    "[f(x=" + "-" * 200_000 + "1)]",
    "[f(x=a" + ".b" * 100_000 + ")]",
    "[f(x=" + "1+" * 50_000 + "1)]",
    "[f(x=" + "[" * 100_000 + "]" * 100_000 + ")]",
    "[" + "f(), " * 20_000 + "]",
    "[" + "f() " * 20_000 + "]",
    "[f(x=" + ")  " * 50_000,
    "[f(x='" + "\\N{" * 10_000 + "')]",
    "<think>" * 20_000,
    "<tool_call>\n" + "{}\n" * 20_000,
    " " * 200_000,
    '[{"name": "a", "parameters": ' + "[" * 100_000,
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("maker", MAKERS)
def test_hostile_texts_are_read_in_time(maker: str) -> None:
    for text in HOSTILE:
        pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]
        _, found = read(MAKERS[maker](), pieces)
        assert found.calls or maker in ("named", "toolrl") or found.content == text


def test_arguments_are_json_again() -> None:
    found: Any = json.loads(
        parse("hermes", '<tool_call>{"name": "a", "arguments": {"é": "\\u0000🌊"}}').calls[0].arguments
    )
    assert found == {"é": "\0🌊"}
