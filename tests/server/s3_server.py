"""An S3 server on loopback (moto), whose requests and answers a test may look at and spoil."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Iterable[bytes]
BUCKET = "deltas"


class _Quiet(WSGIRequestHandler):
    def log(self, *line: object) -> None: ...


class S3Server:
    """`before` sees every request's WSGI environment; `after` may replace its answer once it is done."""

    def __init__(self) -> None:
        self.before: Callable[[dict[str, Any]], None] = lambda environ: None
        self.after: Callable[[dict[str, Any], Answer], str | None] = lambda environ, answer: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        self.before(environ)
        begun: list[Any] = []
        answer = list(self._moto(environ, lambda *head: begun.append(head)))
        status = self.after(environ, answer)
        if status is not None:
            start_response(status, [("content-length", "0")])
            return []
        start_response(*begun[0])
        return answer


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """A server that has the bucket, with credentials for it in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        server = S3Server()
        server.client().create_bucket(Bucket=BUCKET)
        yield server
        server.stop()
