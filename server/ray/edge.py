"""What stands around Ray Serve's HTTP proxies: it tells them a request's delta, and clients in our words what Ray Serve cannot do.

Ray Serve calls `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it, in every proxy. The delta is in the body,
which the proxies do not read and a request router never sees; so it is read here and handed on as a session id, the key of
`router.DeltaRouter`. A deployment of its own in front would see the body too, but costs a hop for every token, and Ray passes no
body on in pieces: an upload would have to fit into memory. Without this middleware all is served, by any replica.
"""

from collections.abc import MutableMapping
from typing import Any

from starlette.middleware import Middleware

from server import sse
from server.access import App, Message, Receive, Send, send_json
from server.core import GatewayError
from server.errors import describe
from server.ray import affinity
from server.ray.gone import ReplicaGone
from server.supervisor import NotReady

CALLBACK = "server.ray.edge.middlewares"
SESSION = b"x-session-id"  # Ray Serve's default name of it; the last one counts
_OURS = b"x-gateway-version"  # every answer of a replica has it
_RETRY_AFTER_S = 1.0


def middlewares() -> list[Middleware]:
    return [Middleware(Edge)]


class Edge:
    """Plain ASGI around a proxy. Its own paths, /-/..., are left to it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        key, receive = await affinity.find(scope, receive)
        asked = dict(scope)
        if key is not None:
            asked["headers"] = [*scope["headers"], (SESSION, key.encode())]
        answer = _Answer(send)
        await self._app(asked, receive, answer.send)
        await answer.end(asked["headers"])


class _Answer:
    """Hands a replica's answer on, keeps back what Ray Serve says itself, and ends what was not ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status = 0  # of the replica's answer, or of Ray Serve's
        self._ours = False
        self._streamed = False
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._status, self._ours = message["status"], _OURS in headers
            self._streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            # The proxy adds its x-request-id to the replica's, which is the same.
            message["headers"] = _once(message["headers"], b"x-request-id")
        if self._ours:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body")
            await self._send(message)

    async def end(self, headers: list[tuple[bytes, bytes]]) -> None:
        """`headers` of the request, to which the proxy has added its id where it had none."""
        if self._ended:
            return
        if not self._ours:
            problem = describe(self._refusal())
            told = [(name.encode(), value.encode()) for name, value in problem.headers.items()]
            told += [(name, value) for name, value in headers if name == b"x-request-id"][:1]
            await send_json(self._send, problem.status, problem.body, told)
        elif self._streamed:
            last = sse.frame(describe(self._refusal()).body) + sse.DONE
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        # Any other answer that has begun is cut off, as by a server that dies.

    def _refusal(self) -> GatewayError:
        if self._status == 404:  # no application is there yet, or any more
            return NotReady("no replica takes requests yet", retry_after_s=5)
        return ReplicaGone("the replica that had the request is gone; try again", retry_after_s=_RETRY_AFTER_S)


def _once(headers: list[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    first = next((pair for pair in headers if pair[0] == name), None)
    return [pair for pair in headers if pair[0] != name] + ([first] if first else [])
