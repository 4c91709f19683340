"""A chat endpoint on loopback that knows short sums, calls a calculator for long ones, and is scripted to fail."""

import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.steering.gate_world import tool

Json = dict[str, Any]


class ChatServer:
    """`requests` are the bodies so far. `fail` may return (status, body) in the place of an answer."""

    def __init__(self) -> None:
        self.requests: list[Json] = []
        self.fail: Callable[[int, Json], tuple[int, str] | None] = lambda index, body: None
        self.logprobs = True
        self.extra: Json = {}
        self.told: Callable[[Json], Json] = lambda body: {}
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str, body: Json) -> tuple[int, str]:
        with self._lock:
            self.requests.append({**body, "path": path})
            index = len(self.requests)
        if (failure := self.fail(index, body)) is not None:
            return failure
        if path == "/tool":
            return 200, json.dumps({"result": {"told": body["arguments"]}})
        return 200, json.dumps(self.completion(body))

    def completion(self, body: Json) -> Json:
        text, calls = self.words(body)
        tokens = re.findall(r"\S+\s*", text)[: body["max_tokens"]]
        cut = len(tokens) < len(re.findall(r"\S+\s*", text))
        message: Json = {"role": "assistant", "content": "".join(tokens).strip() or None}
        if calls:
            message["tool_calls"] = calls
        choice: Json = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if calls else "length" if cut else "stop",
        }
        if body.get("logprobs") and self.logprobs:
            choice["logprobs"] = {"content": [self.token(token, body["top_logprobs"]) for token in tokens]}
        usage = {"prompt_tokens": 9, "completion_tokens": len(tokens)}
        return {"object": "chat.completion", "choices": [choice], "usage": usage, **self.extra, **self.told(body)}

    def words(self, body: Json) -> tuple[str, list[Json]]:
        """Sums of up to 19 are known, longer ones are guessed; with a calculator, two digits are enough for a call."""
        messages = body["messages"]
        if messages[-1]["content"].startswith("Is the answer above right"):
            return "Yes", []
        if messages[-1]["role"] == "tool":
            return f"The answer is {messages[-1]['content']}.", []
        a, b = re.findall(r"\d+", messages[-1]["content"])
        shown = {tool["function"]["name"] for tool in body.get("tools", ())}
        if shown and "calculator" not in shown:  # tools that do not serve sums lead astray
            return "I would have to ask someone.", []
        if shown:
            if len(a) == 1:
                return f"{int(a) + int(b)}", []
            arguments = json.dumps({"expression": f"{a}+{b}"})
            call = {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
            return ("<tool_call> x" if body["max_tokens"] == 1 else ""), [] if body["max_tokens"] == 1 else [call]
        guess = random.Random(body.get("seed", 0)).randint(1, 9)
        total = int(a) + int(b) if int(a) < 20 else guess
        return f"Let me see, that should be fine. The answer is {total}.", []

    def token(self, token: str, top: int) -> Json:
        others = [("Yes", 0.6), (" No", 0.2), ("<", 0.1)][:top]
        listed = [{"token": text, "logprob": math.log(share)} for text, share in others]
        return {"token": token, "logprob": math.log(0.7), "top_logprobs": listed}


def task(identifier: str, a: int, b: int, **changes: Any) -> dict[str, Any]:
    """A sum to be asked, as a line of a task file; `changes` replace its keys."""
    return {
        "id": identifier,
        "question": f"What is {a} + {b}?",
        "tools": [tool("calculator", "Computes an expression")],
        "tool_kinds": {"calculator": "compute"},
        "gold": [str(a + b)],
        "executors": {"calculator": "calculator"},
        **changes,
    }


@contextmanager
def serving(chat: ChatServer | None = None, port: int = 0) -> Iterator[ChatServer]:
    chat = chat or ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            status, text = chat.answer(self.path, json.loads(self.rfile.read(length)))
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            """Not to the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
