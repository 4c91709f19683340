"""Which template renders tools, and what ours write, by the real tokenizer of the default base."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from compressors.base import default_base
from server.config import ToolsSettings
from server.core import ChatPrompt, Message, PastCall, Tool
from server.prompt import HuggingFaceTokenizer, PromptRenderer
from server.tool_template import ToolTemplateError, choose, mentions_tools, shipped
from server.toolcalls import PARSERS, parse

OWN = "{% for tool in tools %}{{ tool }}{% endfor %}"
PLAIN = "{{ messages }} with toolset"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = (Tool("weather", "Weather & wind <now>", CITY), Tool("now"))
CALLS = (PastCall("1", "weather", {"city": "Дelft", "days": [1, None]}), PastCall("2", "now", {}))
CHAT = (
    Message("system", "Be brief."),
    Message("user", "hi"),
    Message("assistant", "", CALLS),
    Message("tool", "12 °C", (), "1", "weather"),
    Message("tool", "noon", (), "2", "now"),
    Message("assistant", "Mild."),
    Message("user", "and?"),
)


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(default_base(progress=False))


def test_the_setting_chooses(tmp_path: Path) -> None:
    assert choose("auto", "hermes", OWN) == choose("own", "hermes", OWN) == OWN
    assert choose("auto", "hermes", PLAIN) == shipped("hermes")
    assert choose("auto", "toolrl", "") == shipped("toolrl")
    assert choose("pythonic", "hermes", OWN) == shipped("pythonic")
    (tmp_path / "mine.jinja").write_text("{{ tools }}")
    assert choose(str(tmp_path / "mine.jinja"), "hermes", OWN) == "{{ tools }}"
    with pytest.raises(ToolTemplateError, match="does not mention tools"):
        choose("own", "hermes", PLAIN)
    with pytest.raises(ToolTemplateError, match="'hermse' is none of auto, own, hermes"):
        choose("hermse", "hermes", OWN)


def test_every_parser_can_be_set_and_has_a_template() -> None:
    assert get_args(ToolsSettings.model_fields["parser"].annotation) == tuple(PARSERS)
    assert all(mentions_tools(shipped(parser)) for parser in PARSERS)


def test_the_default_base_has_none_of_its_own(tokenizer: HuggingFaceTokenizer) -> None:
    assert not mentions_tools(tokenizer.own_tool_template)


def test_hermes_as_it_is_written(tokenizer: HuggingFaceTokenizer) -> None:
    text = tokenizer.apply_tool_template(shipped("hermes"), CHAT, TOOLS)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    listed = system.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line) for line in listed] == [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Weather & wind <now>", "parameters": CITY},
        },
        {"type": "function", "function": {"name": "now"}},
    ]
    assert rest == (
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Дelft", "days": [1, null]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12 °C\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nMild.<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("parser", PARSERS)
def test_calls_of_the_history_stand_as_the_parser_reads_them(tokenizer: HuggingFaceTokenizer, parser: str) -> None:
    for content in ("", "Look:"):
        chat = (CHAT[1], Message("assistant", content, CALLS))
        text = tokenizer.apply_tool_template(shipped(parser), chat, ())
        assert text.startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        turn = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
        assert turn.startswith(content)
        found = parse(parser, turn if parser != "pythonic" else turn.removeprefix("Look:\n"))
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
            (c.name, c.arguments) for c in CALLS
        ]


@pytest.mark.parametrize("parser", PARSERS)
def test_tools_are_shown_without_a_system_message_too(tokenizer: HuggingFaceTokenizer, parser: str) -> None:
    text = tokenizer.apply_tool_template(shipped(parser), CHAT[1:2], TOOLS)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>") == 3


@pytest.mark.anyio
async def test_only_chats_with_tools_use_it(tokenizer: HuggingFaceTokenizer) -> None:
    prompts = PromptRenderer(tokenizer, shipped("hermes"), "hermes")
    plain = PromptRenderer(tokenizer)
    texts: dict[str, Any] = {
        name: await prompts.render(prompt)
        for name, prompt in (
            ("plain", ChatPrompt(CHAT[1:2])),
            ("tools", ChatPrompt(CHAT[1:2], TOOLS)),
            ("history", ChatPrompt(CHAT)),
            ("answer", ChatPrompt((CHAT[1], CHAT[3]))),
        )
    }
    assert texts["plain"] == await plain.render(ChatPrompt(CHAT[1:2]))
    assert texts["tools"] == tokenizer.encode(tokenizer.apply_tool_template(shipped("hermes"), CHAT[1:2], TOOLS), False)
    assert texts["history"] == tokenizer.encode(tokenizer.apply_tool_template(shipped("hermes"), CHAT, ()), False)
    assert "<tool_response>" in tokenizer.apply_tool_template(shipped("hermes"), (CHAT[1], CHAT[3]), ())
    assert len(texts["answer"]) < len(texts["history"])
    for one in (prompts, plain):
        one.close()


def test_the_hash_tells_template_and_parser_apart(tokenizer: HuggingFaceTokenizer) -> None:
    def sha256(template: str, parser: str) -> str:
        prompts = PromptRenderer(tokenizer, template, parser)
        prompts.close()
        return prompts.tool_template_sha256

    assert sha256("x", "hermes") == hashlib.sha256(b"hermes\nx").hexdigest()
    assert len({sha256("x", "hermes"), sha256("x", "toolrl"), sha256("y", "hermes")}) == 3
    assert sha256("", "hermes") == ""
