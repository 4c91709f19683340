"""Clients that people chat through: the same conversation through each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Python = Callable[..., Any]


def check(found: dict[str, Any]) -> None:
    assert found["text"]
    assert 1 <= found["tokens"] <= 24
    assert found["streamed"] == found["captain"]
    assert 1 <= found["stream_tokens"] <= 24
    assert found["captain"] != found["base"]
    assert found["calls"] == ["weather"]
    assert found["error"] == "model_not_found"


def test_langchain_openai(url: str, installed: Callable[..., Path], python: Python) -> None:
    check(python(installed("langchain", "langchain-openai==1.7.4"), "langchain_client.py", url))


def test_litellm(url: str, installed: Callable[..., Path], python: Python) -> None:
    check(python(installed("litellm", "litellm>=1.109,<2"), "litellm_client.py", url))


def test_openai_npm(url: str, node: Callable[..., Any]) -> None:
    check(node("openai_client.mjs", url))


def test_vercel_ai_sdk(url: str, node: Callable[..., Any]) -> None:
    check(node("ai_sdk.mjs", url))


def test_llm(url: str, installed: Callable[..., Path], run: Callable[..., str], tmp_path: Path) -> None:
    llm = str(installed("llm", "llm==0.36") / "llm")
    entries = [f"- model_id: {name}\n  model_name: {name}\n  api_base: {url}\n" for name in ("base", "captain")]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(entries))
    where = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    options = ["-o", "temperature", "0", "-o", "max_tokens", "24", "Who are you?"]
    whole = run([llm, "-m", "captain", "--no-stream", *options], **where)
    assert whole.strip()
    assert run([llm, "-m", "captain", *options], **where) == whole
    assert run([llm, "-m", "base", *options], **where) != whole
