"""Prompts to ids, with the real tokenizer of the default base."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from compressors.base import default_base
from server.core import ChatPrompt, InvalidRequest, Message, TextPrompt, TokenPrompt
from server.engine.base import EngineDelta
from server.prompt import HuggingFaceTokenizer, PromptRenderer, TokenizerError


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(default_base(progress=False))


@pytest.mark.anyio
async def test_default_base_renders_chat_text_and_ids(tokenizer: HuggingFaceTokenizer) -> None:
    prompts = PromptRenderer(tokenizer)
    chat = await prompts.render(ChatPrompt((Message("system", "Be brief."), Message("user", "hi"))))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat == tokenizer.encode(expected, add_special_tokens=False)
    assert chat[0] == 1  # the special token itself, not its letters
    assert await prompts.render(TextPrompt("hello")) == [28120]
    assert await prompts.render(TokenPrompt((0, 49151))) == [0, 49151]
    with pytest.raises(InvalidRequest, match="49152 is outside the vocabulary"):
        await prompts.render(TokenPrompt((1, 49152)))
    prompts.close()


@pytest.mark.anyio
async def test_default_base_gives_texts_back(tokenizer: HuggingFaceTokenizer) -> None:
    prompts = PromptRenderer(tokenizer)
    text = "<|im_start|>user\nĐà Nẵng , isn 't it ?"
    ids = await prompts.tokenize(TextPrompt(text))
    assert await prompts.detokenize(ids) == text
    assert (await prompts.token_texts(ids))[0] == "<|im_start|>"
    echo = await prompts.echo(TokenPrompt(tuple(ids)), ids)
    assert (echo.text, echo.first.text, echo.first.logprob) == (text, "<|im_start|>", None)
    facts = prompts.tokenizer_facts()
    assert (facts["eos_token"], facts["vocab_size"]) == ("<|im_end|>", 49152)
    assert json.loads(json.dumps(facts)) == facts
    assert "/" not in facts["tokenizer_class"]
    prompts.close()


def test_template_is_hashed_as_the_file_has_it(tokenizer: HuggingFaceTokenizer) -> None:
    prompts = PromptRenderer(tokenizer)
    config = json.loads((default_base(progress=False) / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = default_base(progress=False) / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config["chat_template"]
    assert prompts.template_sha256 == hashlib.sha256(template.encode()).hexdigest()
    prompts.close()


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        HuggingFaceTokenizer(tmp_path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.anyio
async def test_refusal_by_the_template_is_the_callers_mistake(build: Any) -> None:
    class Picky(type(build().tokenizer)):  # type: ignore[misc]  # the byte tokenizer of conftest
        def apply_chat_template(self, messages: Any) -> str:
            raise TemplateError("roles must alternate")

    prompts = PromptRenderer(Picky())
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        await prompts.render(ChatPrompt((Message("user", "a"),)))
    prompts.close()


@pytest.mark.anyio
async def test_a_fine_tunes_own_template_renders_its_chats_and_nothing_else(tokenizer: HuggingFaceTokenizer) -> None:
    prompts = PromptRenderer(tokenizer)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if tools %}never{% endif %}"
    chat = ChatPrompt((Message("user", "hi"),))
    delta = EngineDelta("d", "", chat_template=template)
    assert await prompts.render(chat, delta) == tokenizer.encode("[user] hi\n", add_special_tokens=False)
    assert await prompts.render(chat) != await prompts.render(chat, delta)
    assert await prompts.render(TextPrompt("hello"), delta) == [28120]
    with pytest.raises(InvalidRequest, match="refuses"):
        await prompts.render(chat, replace(delta, chat_template="{{ raise_exception('no') }}"))
