"""Prompts to token ids by the chat template and tokenizer of the base, or of a fine-tune that has its own.

transformers is imported when a tokenizer loads.

Chats with tools or with calls in their history are rendered by the tool template (tool_template.py), all others by the
model's own as they always were.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jinja2 import TemplateError

from compressors.errors import CheckpointError
from compressors.tokenizer import load
from server.core import (
    ChatPrompt,
    GatewayError,
    InvalidRequest,
    Message,
    Prompt,
    Sampling,
    TextPrompt,
    TokenLogprob,
    Tool,
)
from server.echo import PromptText
from server.engine.base import EngineDelta

Result = TypeVar("Result")


class TokenizerError(Exception):
    """The model folder holds no tokenizer that can be used; ends the start of the server."""


class NoChatTemplate(GatewayError):
    """Chat was asked of a model that has no chat template."""


class Tokenizer(Protocol):
    """Text to ids and back in the words of this module; the tests have one of bytes."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chat_template(self) -> str:
        """The template's text; "" where there is none."""
        ...

    @property
    def own_tool_template(self) -> str:
        """The template that the model brings for chats with tools; often the one for all chats."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text with its special tokens."""
        ...

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own words for the tokens."""
        ...

    def facts(self) -> dict[str, Any]:
        """What clients that bring their own tokenizer want to know, as JSON."""
        ...

    def apply_chat_template(self, messages: Sequence[Message]) -> str: ...

    def apply_tool_template(self, template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str: ...


class PromptRenderer:
    """Renders in one thread of its own: tokenizing a long text must not hold up the streams of the others.

    `tool_template_sha256` is of the text of `tool_template` and of the parser that reads the answers to it. `own`: the tokenizer
    of a fine-tune, None where it is the base's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tool_template: str = "",
        parser: str = "",
        own: Callable[[EngineDelta | None], Tokenizer | None] = lambda delta: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._own = own
        self._tool_template = tool_template
        both = f"{parser}\n{tool_template}".encode()
        self.tool_template_sha256 = hashlib.sha256(both).hexdigest() if tool_template else ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        template = tokenizer.chat_template
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest() if template else ""

    async def render(self, prompt: Prompt, delta: EngineDelta | None = None) -> list[int]:
        """Ids of a prompt to the base or to `delta`, whose own chat template is for chats without tools.

        Raises InvalidRequest, NoChatTemplate, EngineLoadError.
        """
        ids = await self.tokenize(prompt, delta)
        if not ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return ids

    async def tokenize(self, prompt: Prompt, delta: EngineDelta | None = None) -> list[int]:
        """As `render`, and no ids of no text."""
        return await self._run(self._render, prompt, delta)

    async def detokenize(self, ids: Sequence[int], delta: EngineDelta | None = None) -> str:
        """Raises InvalidRequest, EngineLoadError."""
        self._check_known(ids, "tokens", delta)
        return await self._run(lambda: self._of(delta).decode(ids))

    async def token_texts(self, ids: Sequence[int], delta: EngineDelta | None = None) -> list[str]:
        return await self._run(lambda: self._of(delta).token_texts(ids))

    def tokenizer_facts(self) -> dict[str, Any]:
        return self._tokenizer.facts()

    async def echo(self, prompt: Prompt, ids: Sequence[int], delta: EngineDelta | None = None) -> PromptText:
        """A prompt of these ids, as an answer repeats it."""
        return await self._run(self._echo, prompt, ids, delta)

    def check_tokens(self, sampling: Sampling, delta: EngineDelta | None = None) -> None:
        """Are the tokens that the sampling names in the vocabulary? Raises InvalidRequest."""
        for field, ids in (
            ("logit_bias", (token for token, _ in sampling.logit_bias)),
            ("stop_token_ids", iter(sampling.stop_token_ids)),
        ):
            self._check_known(ids, field, delta)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _of(self, delta: EngineDelta | None) -> Tokenizer:
        return self._own(delta) or self._tokenizer

    def _echo(self, prompt: Prompt, ids: Sequence[int], delta: EngineDelta | None) -> PromptText:
        tokenizer = self._of(delta)
        text = prompt.text if isinstance(prompt, TextPrompt) else tokenizer.decode(ids)
        return PromptText(text, TokenLogprob(ids[0], tokenizer.decode(ids[:1]), None))

    def _render(self, prompt: Prompt, delta: EngineDelta | None) -> list[int]:
        tokenizer = self._of(delta)
        if isinstance(prompt, ChatPrompt):
            template = delta.chat_template if delta else ""
            ids = tokenizer.encode(self._chat_text(tokenizer, prompt, template), prompt.special_tokens)
        elif isinstance(prompt, TextPrompt):
            ids = tokenizer.encode(prompt.text, prompt.special_tokens)
        else:
            ids = list(prompt.ids)
        self._check_known(ids, "prompt", delta)
        return ids

    def _check_known(self, ids: Iterable[int], field: str, delta: EngineDelta | None) -> None:
        size = self._tokenizer.vocab_size + (delta.added_tokens if delta else 0)
        unknown = next((token for token in ids if token >= size), None)
        if unknown is not None:
            raise InvalidRequest(f"token id {unknown} is outside the vocabulary", param=field)

    def _chat_text(self, tokenizer: Tokenizer, prompt: ChatPrompt, template: str) -> str:
        if not template and not tokenizer.chat_template:
            raise NoChatTemplate("the model has no chat template; use /v1/completions", param="messages")
        try:
            if prompt.tools or any(message.calls or message.role == "tool" for message in prompt.messages):
                return tokenizer.apply_tool_template(self._tool_template, prompt.messages, prompt.tools)
            if template:
                return tokenizer.apply_tool_template(template, prompt.messages, ())
            return tokenizer.apply_chat_template(prompt.messages)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


class HuggingFaceTokenizer:
    """The tokenizer of a local model folder; `loaded` is transformers' own."""

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError."""
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise TokenizerError(
                f"the model folder {folder} has no tokenizer (tokenizer.json); copy the base's into it"
            )
        try:
            self.loaded: Any = load(folder)
        except CheckpointError as error:
            raise TokenizerError(f"the tokenizer of the model folder {folder} cannot be read: {error}") from error
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text_config = config.get("text_config", config)
        self.vocab_size = int(text_config.get("vocab_size", len(self.loaded)))
        template = self.loaded.chat_template
        named = (
            template if isinstance(template, dict) else {"default": template}
        )  # several, by names that are agreed on
        self.chat_template = str(named.get("default") or "")
        self.own_tool_template = str(named.get("tool_use") or self.chat_template)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.loaded(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.loaded.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        texts: list[str | None] = self.loaded.convert_ids_to_tokens(list(ids))
        return [text or "" for text in texts]  # rows that only fill the vocabulary up have no word

    def facts(self) -> dict[str, Any]:
        named = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: getattr(self.loaded, name, None) for name in named}
        return {
            "tokenizer_class": type(self.loaded).__name__,
            "vocab_size": self.vocab_size,
            **{name: None if token is None else str(token) for name, token in special.items()},
            "chat_template": self.chat_template or None,
        }

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        rendered: str = self.loaded.apply_chat_template(
            [message_dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return rendered

    def apply_tool_template(self, template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        rendered: str = self.loaded.apply_chat_template(
            [message_dict(message) for message in messages],
            tools=[tool_dict(tool) for tool in tools] or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return rendered


def message_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates know it; a plain one has a role and content, and nothing else."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.tool_call_id is not None:
        found |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return found


def tool_dict(tool: Tool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {key: value for key, value in described.items() if value is not None}}
