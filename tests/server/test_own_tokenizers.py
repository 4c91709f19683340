"""Deltas with added tokens and a tokenizer of their own, over a fake engine: whose words and ids a request may use."""

import asyncio
import dataclasses
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressors.artifact import TokenizerFile, TokenizerInfo
from compressors.errors import ArtifactError
from server.artifacts.checks import delta_check
from server.artifacts.combination import combination
from server.artifacts.store import Store
from server.config import Settings
from server.core import ChatPrompt, InvalidRequest, Message, Sampling, TextPrompt, TokenPrompt
from server.engine.base import EngineDelta, EngineLoadError, WeightedDelta
from server.engine.decoding import DeltaDecoding
from server.own_tokenizers import OwnTokenizers
from server.prompt import PromptRenderer
from tests.server.byte_tokenizer import ByteTokenizer
from tests.server.conftest import House
from tests.server.fake_checks import CHECKS, fake_verify

pytestmark = pytest.mark.anyio


class Shouting(ByteTokenizer):
    """A fine-tune's tokenizer: another text becomes other ids, and one of them is added."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [*text.upper().encode(), 256]

    def decode(self, ids: Sequence[int]) -> str:
        return f"own {super().decode(ids)}"


def growing(reserved_tokens: int) -> Any:
    """Checks under which the first byte of a delta says how many tokens it adds."""

    def verify(path: Path) -> Any:
        return dataclasses.replace(fake_verify(path), added_tokens=path.read_bytes()[0] - ord("0"))

    return dataclasses.replace(CHECKS, delta=delta_check(verify, reserved_tokens=reserved_tokens))


@pytest.fixture
async def two(store: Store, settings: Settings, build: Callable[..., House]) -> AsyncGenerator[House, None]:
    """A house with a reserve of 2, and one delta that adds 2 tokens and one that adds none."""
    engine = settings.engine.model_copy(update={"reserved_tokens": 2})
    house = build(settings.model_copy(update={"engine": engine}), checks=growing(2))
    await house.gateway.start()
    async with house.client({"authorization": "Bearer admin-key"}) as admin:
        for name, content in (("grown", b"2"), ("plain", b"0")):
            assert (await send(admin, name, content)).status_code == 201
    yield house
    await house.gateway.stop()


async def send(admin: Any, name: str, content: bytes) -> Any:
    form = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    return await admin.post("/v1/admin/deltas", data=form, files={"file": content})


async def test_ids_belong_to_the_delta_that_added_them(two: House) -> None:
    async with two.client() as client:
        for model, token, status in (
            ("grown", 257, 200),
            ("grown", 258, 400),
            ("plain", 256, 400),
            ("tiny-base", 256, 400),
            ("tiny-base", 255, 200),
        ):
            body = {"model": model, "prompt": [1, token], "max_tokens": 1}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == status
            if status == 400:
                assert response.json()["error"]["message"] == f"token id {token} is outside the vocabulary"


async def test_more_than_is_reserved_is_refused_with_the_number(two: House) -> None:
    async with two.client({"authorization": "Bearer admin-key"}) as admin:
        refused = await send(admin, "large", b"3")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (507, "vocabulary_reserve_exceeded")
    assert "adds 3 tokens" in error["message"]
    assert "engine.reserved_tokens is 2: start the server with at least 3" in error["message"]


async def test_a_smaller_reserve_than_at_the_upload_is_told_to_each_request(two: House, build: Any) -> None:
    house = build(checks=growing(0))
    await house.gateway.start()
    async with house.client() as client:
        for model, status in (("grown", 507), ("plain", 200)):
            response = await client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1})
            assert response.status_code == status
            if status == 507:
                assert "engine.reserved_tokens is 0" in response.json()["error"]["message"]
    await house.gateway.stop()


async def test_vocabularies_that_differ_cannot_be_combined(two: House) -> None:
    async with two.client() as client:
        parts = [{"name": "grown", "weight": 0.5}, {"name": "plain", "weight": 0.5}]
        body = {"model": "tiny-base", "prompt": "a", "max_tokens": 1, "delta": parts}
        response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "delta")
    assert "different tokenizers" in response.json()["error"]["message"]


async def test_a_combination_has_the_tokenizer_of_its_parts() -> None:
    parts = [WeightedDelta(EngineDelta(name, name, tokenizer="t", added_tokens=1), 0.5) for name in "ab"]
    made = combination(parts, chat=False)
    assert (made.tokenizer, made.added_tokens) == ("t", 1)
    tokenizers = OwnTokenizers(lambda path: Shouting(str(path)), 1)
    assert tokenizers.of(made).chat_template == "a"
    with pytest.raises(InvalidRequest, match="different tokenizers"):
        combination([parts[0], WeightedDelta(EngineDelta("b", "b"), 0.5)], chat=False)


async def test_the_version_names_its_tokenizer(build: Callable[..., House]) -> None:
    def verify(path: Path) -> Any:
        report = fake_verify(path)
        files = {"tokenizer.json": TokenizerFile(sha256=path.read_text(), stored="s")} if path.read_text() else {}
        report.manifest.tokenizer = TokenizerInfo(files=files)
        return report

    house = build(checks=dataclasses.replace(CHECKS, delta=delta_check(verify)))
    await house.gateway.start()
    async with house.client({"authorization": "Bearer admin-key"}) as admin:
        for name, content in (("a", b"one"), ("b", b"two"), ("c", b"")):
            assert (await send(admin, name, content)).status_code == 201
    found = [house.context.registry.resolve(name, lambda one: True).delta.tokenizer for name in "abc"]
    assert found[2] == ""
    assert len(set(found)) == 3
    await house.gateway.stop()


async def test_prompts_are_rendered_with_the_deltas_own_words() -> None:
    delta = EngineDelta("d", "file", chat_template="T", added_tokens=1, tokenizer="t")
    own = OwnTokenizers(lambda path: Shouting(), 1)
    prompts = PromptRenderer(ByteTokenizer(), own=own.of)
    assert await prompts.render(TextPrompt("hi"), delta) == [*b"HI", 256]
    assert await prompts.render(TextPrompt("hi"), EngineDelta("e", "file")) == [*b"hi"]
    assert await prompts.render(TextPrompt("hi")) == [*b"hi"]
    chat = ChatPrompt((Message("user", "hi"),))
    assert (await prompts.render(chat, delta))[-1] == 256
    with pytest.raises(InvalidRequest, match="257 is outside"):
        await prompts.render(TokenPrompt((257,)), delta)
    assert await prompts.tokenize(TextPrompt("hi"), delta) == [*b"HI", 256]
    assert await prompts.detokenize([*b"hi"], delta) == "own hi"
    assert (await prompts.echo(TokenPrompt((104,)), [104], delta)).text == "own h"
    with pytest.raises(InvalidRequest, match="256 is outside"):
        await prompts.detokenize([256])
    bias = Sampling(1, logit_bias=((256, 1.0),))
    prompts.check_tokens(bias, delta)
    with pytest.raises(InvalidRequest, match="256 is outside"):
        prompts.check_tokens(bias)
    prompts.close()


async def test_a_tokenizer_that_says_ids_which_its_delta_has_not_got_is_refused() -> None:
    prompts = PromptRenderer(ByteTokenizer(), own=lambda delta: Shouting())
    with pytest.raises(InvalidRequest, match="256 is outside"):
        await prompts.render(TextPrompt("hi"), EngineDelta("d", "file", tokenizer="t"))
    prompts.close()


def test_tokenizers_are_loaded_once_shared_and_the_last_kept() -> None:
    loads: list[str] = []

    def load(path: Path) -> Shouting:
        loads.append(path.name)
        return Shouting()

    own = OwnTokenizers(load, 2)
    one, same, two, three = (
        EngineDelta(name, f"/store/{name}", tokenizer=tokenizer) for name, tokenizer in zip("abcd", "1123", strict=True)
    )
    threads = [threading.Thread(target=own.of, args=(one,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.of(one) is own.of(same)
    assert loads == ["a"]
    own.of(two)
    own.of(one)
    own.of(three)
    own.of(one)
    assert loads == ["a", "c", "d"]
    own.of(two)
    assert loads == ["a", "c", "d", "c"]
    assert own.of(None) is own.of(EngineDelta("e", "file")) is None


def test_a_tokenizer_that_does_not_load_is_the_engines_error_and_tried_again() -> None:
    failing = [True]

    def load(path: Path) -> Shouting:
        if failing.pop():
            raise ArtifactError("its bytes do not match")
        return Shouting()

    own = OwnTokenizers(load, 2)
    delta = EngineDelta("d" * 64, "file", tokenizer="t")
    with pytest.raises(EngineLoadError, match="do not match"):
        own.of(delta)
    failing.append(False)
    assert own.of(delta) is not None


async def test_answers_are_decoded_with_what_is_used_while_the_request_is_added() -> None:
    seen: list[tuple[str, str]] = []

    class Processor:
        tokenizer = "base"

        def add_request(self, request: Any, prompt: str, index: int = 0) -> None:
            seen.append((request.name, self.tokenizer))
            if request.name == "bad":
                raise ValueError(prompt)

    def request(name: str, delta: EngineDelta | None) -> Any:
        return SimpleNamespace(name=name, lora_request=delta and SimpleNamespace(lora_name=delta.digest))

    delta, plain = EngineDelta("d", "f", tokenizer="t"), EngineDelta("p", "f")
    decoding, processor = DeltaDecoding(lambda delta: f"own of {delta.digest}"), Processor()
    decoding.install(processor)
    async with decoding.used(delta), decoding.used(plain), decoding.used(None):
        async with decoding.used(delta):
            processor.add_request(request("inner", delta), "p", index=1)
        processor.add_request(request("outer", delta), "p")
        processor.add_request(request("plain", plain), "p")
        processor.add_request(request("base", None), "p")
        with pytest.raises(ValueError, match="p"):
            processor.add_request(request("bad", delta), "p")
    processor.add_request(request("after", delta), "p")
    await asyncio.sleep(0)
    assert dict(seen) == {
        "inner": "own of d",
        "outer": "own of d",
        "plain": "base",
        "base": "base",
        "bad": "own of d",
        "after": "base",
    }
    assert processor.tokenizer == "base"
