"""The bytes of an upload -> a temporary file of the store, never whole in memory.

Two forms: multipart/form-data with a part `file` and the fields as parts, or a raw body with the fields as query, where
`Content-Digest` (RFC 9530) may stand for `sha256`.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from server.artifacts.store import Incoming
from server.core import GatewayError, InvalidRequest
from server.routes.body import BodyTimeout, ClientGone, body_timeout_s
from server.wire import UploadFields, check

_BATCH_BYTES = 1 << 20  # written and hashed in one go, off the event loop
_PROGRESS_BYTES = 64 << 10  # a client has a time limit for each of these, not for the file
_MAX_FIELD_BYTES = 4096
FORM_OVERHEAD_BYTES = 64 << 10  # what multipart adds to the file at most
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([^:]*):", re.IGNORECASE)


class LengthRequired(GatewayError):
    """A file that comes as the body itself does not say how long it is."""


class InvalidMultipart(GatewayError):
    """The multipart body is malformed or ends too early."""


async def receive(request: Request, incoming: Incoming) -> UploadFields:
    """Stream the file into `incoming`.

    Raises InvalidMultipart, InvalidRequest, MissingParameter, LengthRequired, BodyTooLarge, InsufficientStorage,
    BodyTimeout, ClientGone.
    """
    content_type, options = parse_options_header(request.headers.get("content-type"))
    form = _Form(options.get(b"boundary", b"")) if content_type == b"multipart/form-data" else None
    if form and request.query_params:
        raise InvalidRequest("a form says everything in its parts; the query is for a file that is the body itself")
    query = None if form else check(UploadFields, _query(request))
    batch, limit_s, since = bytearray(), body_timeout_s(request), 0
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limit_s) as timer:
            async for chunk in request.stream():
                batch += form.feed(chunk) if form else chunk
                since += len(chunk)
                if len(batch) >= _BATCH_BYTES:
                    await asyncio.to_thread(incoming.write, bytes(batch))
                    batch.clear()
                if since >= _PROGRESS_BYTES:
                    timer.reschedule(loop.time() + limit_s)
                    since = 0
    except TimeoutError as error:
        raise BodyTimeout(f"less than {_PROGRESS_BYTES} bytes of the upload came in {limit_s:g} s") from error
    except ClientDisconnect as error:
        raise ClientGone("the client went away during the upload") from error
    await asyncio.to_thread(incoming.write, bytes(batch))
    return query or check(UploadFields, form.finish() if form else {})


def _query(request: Request) -> dict[str, str]:
    """Raises LengthRequired, InvalidRequest."""
    if "content-length" not in request.headers:
        raise LengthRequired("a raw upload says how long it is: Content-Length")
    query = dict(request.query_params)
    if len(request.query_params.multi_items()) > len(query):
        raise InvalidRequest("the query gives a field twice")
    header = request.headers.get("content-digest")
    if header is not None:
        digest = _content_digest(header)
        if query.setdefault("sha256", digest) != digest:
            raise InvalidRequest("Content-Digest and the field sha256 differ", param="sha256")
    return query


def _content_digest(header: str) -> str:
    """The SHA-256 of a Content-Digest header, in hex. Raises InvalidRequest."""
    found = _SHA256.search(header)
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise InvalidRequest("Content-Digest has no sha-256=:BASE64:, the only digest that is checked", param="sha256")
    return digest.hex()


class _Form:
    """Callbacks of the streaming multipart parser: file bytes pass through, small fields are kept."""

    def __init__(self, boundary: bytes) -> None:
        if not boundary:
            raise InvalidMultipart("the content type names no boundary")
        self._fields: dict[str, bytearray] = {}
        self._file = bytearray()
        self._header = bytearray()
        self._value = bytearray()
        self._part = ""
        self._overhead = 0
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise InvalidMultipart(f"malformed multipart body: {error}") from error

    def feed(self, chunk: bytes) -> bytes:
        """Parse a piece of the body; returns the file's bytes in it."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidMultipart(f"malformed multipart body: {error}") from error
        found = bytes(self._file)
        self._file.clear()
        self._overhead += len(chunk) - len(found)
        if self._overhead > FORM_OVERHEAD_BYTES:
            raise InvalidMultipart("the multipart body holds too much beside the file")
        return found

    def finish(self) -> Mapping[str, str]:
        if not self._complete:
            raise InvalidMultipart("the multipart body ends before its closing boundary")
        if "file" not in self._fields:
            raise InvalidRequest("the form has no part called file", param="file")
        return {name: value.decode("utf-8", "replace") for name, value in self._fields.items() if name != "file"}

    def _on_part_begin(self) -> None:
        self._part = ""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._part = options.get(b"name", b"").decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        if self._part != "file" and self._part not in UploadFields.model_fields:
            raise InvalidRequest(f"unknown form field {self._part[:100]!r}", param=self._part[:100])
        if self._part in self._fields:
            raise InvalidRequest("the form gives a field twice", param=self._part)
        self._fields[self._part] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._file += data[start:end]
            return
        field = self._fields[self._part]
        field += data[start:end]
        if len(field) > _MAX_FIELD_BYTES:
            raise InvalidRequest("the form field is too long", param=self._part)

    def _on_end(self) -> None:
        self._complete = True
