"""An OpenAI-compatible chat endpoint, asked over HTTP with bounded concurrency and patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from steering.errors import EndpointError
from steering.gate.starting import Start

Top = tuple[tuple[str, float], ...]
_PATIENCE_S = (0.5, 2.0, 8.0)  # waits between tries of one request
_AGAIN = (408, 429, 500, 502, 503, 504)
_STARTING = (httpx.ConnectError, httpx.ConnectTimeout)


@dataclass(frozen=True)
class Token:
    """Text and log-probability of a token, and the alternatives that were returned for its place."""

    text: str
    logprob: float
    top: Top


@dataclass(frozen=True)
class Answer:
    """One choice of a chat completion. `tokens` is empty where the server returns no log-probabilities."""

    text: str
    tool_calls: tuple[dict[str, Any], ...]
    finish_reason: str
    tokens: tuple[Token, ...]
    completion_tokens: int
    body: Mapping[str, Any]


@dataclass(frozen=True)
class _Failure:
    """A try without an answer. `starting`: a server that has just been started may fail so."""

    problem: str
    again: bool
    starting: bool
    told_s: float = 0.0


class Endpoint:
    """Use it as an async context manager; at most `concurrency` requests are under way.

    The server has `start_s` until its first answer; `tell` is told now and then what is waited for.
    """

    def __init__(
        self,
        base_url: str,
        concurrency: int = 8,
        api_key: str | None = None,
        timeout_s: float = 300,
        patience_s: Sequence[float] = _PATIENCE_S,
        start_s: float = 0.0,
        tell: Callable[[str], object] = lambda text: None,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, trust_env=False)
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._permits = asyncio.Semaphore(concurrency)
        self._patience_s = patience_s
        self._start = Start(start_s, tell)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def chat(self, body: Mapping[str, Any]) -> Answer:
        """Raises EndpointError."""
        return answer_of(await self.post(self._url, body))

    async def post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that is answered; busy and failing servers are asked again. Raises EndpointError."""
        async with self._permits:
            patience = iter(self._patience_s)
            while isinstance(tried := await self._try(url, body), _Failure):
                wait_s = self._start.wait_s(tried.problem, tried.told_s) if tried.starting else None
                if wait_s is None:
                    pause_s = next(patience, None) if tried.again else None
                    if pause_s is None:
                        raise EndpointError(tried.problem)
                    wait_s = max(pause_s, tried.told_s)
                await asyncio.sleep(wait_s)
            return tried

    async def _try(self, url: str, body: Mapping[str, Any]) -> dict[str, Any] | _Failure:
        try:
            response = await self._client.post(url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return _Failure(f"{url}: {str(error) or type(error).__name__}", True, isinstance(error, _STARTING))
        status = response.status_code
        starting = status == httpx.codes.SERVICE_UNAVAILABLE
        if not starting:
            self._start.answered()
        if status == httpx.codes.OK:
            return _object(url, response)
        problem = f"{url}: status {status}: {response.text[:300]}"
        return _Failure(problem, status in _AGAIN, starting, _retry_after_s(response))


def answer_of(body: Mapping[str, Any]) -> Answer:
    """Raises EndpointError where the body is no chat completion."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content = (choice.get("logprobs") or {}).get("content") or []
        return Answer(
            text=str(message.get("content") or ""),
            tool_calls=tuple(message.get("tool_calls") or ()),
            finish_reason=str(choice.get("finish_reason")),
            tokens=tuple(Token(*_pair(token), _top(token)) for token in content),
            completion_tokens=int((body.get("usage") or {}).get("completion_tokens", len(content))),
            body=body,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise EndpointError(f"the answer is no chat completion: {str(body)[:300]}") from error


def pointed(body: Any, pointer: str) -> tuple[bool, Any]:
    """Whether a JSON Pointer (RFC 6901) leads somewhere, and what stands there."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(body, Mapping) and key in body:
            body = body[key]
        elif isinstance(body, list) and key.isdigit() and int(key) < len(body):
            body = body[int(key)]
        else:
            return False, None
    return True, body


def _retry_after_s(response: httpx.Response) -> float:
    told = response.headers.get("retry-after", "")
    return min(float(told), 60.0) if told.isdigit() else 0.0


def _object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError as error:
        raise EndpointError(f"{url}: the answer is not JSON: {response.text[:300]}") from error
    if not isinstance(found, dict):
        raise EndpointError(f"{url}: the answer is no JSON object: {response.text[:300]}")
    return found


def _top(token: Mapping[str, Any]) -> Top:
    return tuple(_pair(one) for one in token.get("top_logprobs") or ())


def _pair(token: Mapping[str, Any]) -> tuple[str, float]:
    return str(token["token"]), float(token["logprob"])
