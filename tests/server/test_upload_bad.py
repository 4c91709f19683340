"""R14 and the upload's part of the S table, over a real socket: what a broken or hostile client sends leaves nothing behind."""

import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

DELTAS = "/v1/admin/deltas"
AUTH = "authorization: Bearer admin-key"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def raw(live: Any, head: str, body: bytes, cut: bool = False) -> bytes:
    """One request as it stands; returns what the server says, or nothing where the client cuts the connection."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        answer = b""
        while not cut and (piece := connection.recv(65536)):
            answer += piece
        return answer


def post(query: str, *headers: str) -> str:
    return "\n".join([f"POST {DELTAS}?{query} HTTP/1.1", "host: x", "connection: close", AUTH, *headers])


def is_clean(live: Any) -> bool:
    store: Path = live.house.store.root
    return live.wait_idle() and [path for path in store.rglob("*") if path.is_file()] == [store / "lock"]


def eventually_clean(live: Any) -> bool:
    deadline = time.monotonic() + 5
    while not is_clean(live) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_clean(live)


CONTENT = b"a delta" * 100
QUERY = f"name=red&sha256={sha256(CONTENT)}"


def test_r14_a_body_that_ends_too_early(live: Any) -> None:
    raw(live, post(QUERY, "content-length: 700"), CONTENT[:-1], cut=True)
    assert eventually_clean(live)
    form = (
        f'--B\r\ncontent-disposition: form-data; name="name"\r\n\r\nred\r\n'
        f'--B\r\ncontent-disposition: form-data; name="sha256"\r\n\r\n{sha256(CONTENT)}\r\n'
        f'--B\r\ncontent-disposition: form-data; name="file"\r\n\r\n'
    ).encode()
    for body in (form, form + CONTENT, form + CONTENT + b"\r\n--B"):
        head = post("", "content-type: multipart/form-data; boundary=B", f"content-length: {len(body)}")
        assert b"400 Bad Request" in raw(live, head, body)
        assert eventually_clean(live)


@pytest.mark.parametrize("length", ["699", "701", "-1", "1e3", "0x2bc", "700, 700", "9" * 30])
def test_r14_a_wrong_length(live: Any, length: str) -> None:
    answer = raw(live, post(QUERY, f"content-length: {length}"), CONTENT, cut=length == "701")
    assert b" 201 " not in answer[:20]
    assert eventually_clean(live)


def test_r14_a_flipped_bit(live: Any) -> None:
    for place in (0, 350, 699):
        broken = bytearray(CONTENT)
        broken[place] ^= 4
        answer = raw(live, post(QUERY, "content-length: 700"), bytes(broken))
        assert b"digest_mismatch" in answer
        assert eventually_clean(live)


def test_r14_two_lengths_are_no_way_in(live: Any) -> None:
    """Request smuggling: a length and chunks, or two lengths, are refused or read as one request."""
    chunked = b"2bc\r\n" + CONTENT + b"\r\n0\r\n\r\n" + b"DELETE /v1/admin/deltas/red HTTP/1.1\r\nhost: x\r\n\r\n"
    for headers in (
        ("content-length: 5", "transfer-encoding: chunked"),
        ("content-length: 700", "content-length: 701"),
        ("transfer-encoding: chunked, identity",),
    ):
        assert b" 204 " not in raw(live, post(QUERY, *headers), chunked)
    assert live.house.context.registry.refs() == [] or live.house.store.objects() == [sha256(CONTENT)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..%2f..%2fetc",
        "a%00b",
        "a%0d%0aset-cookie:x",
        "%e2%80%aered",  # right-to-left override
        "re%cc%88d",  # a combining mark
        "%ff%fe",
        "r%D0%B5d",  # a Cyrillic letter that looks Latin
        ".hidden",
        "-rf",
        "CON%3a",
        "",
        "x" * 5000,
    ],
)
def test_s2_names_that_are_paths_or_tricks(live: Any, name: str) -> None:
    query = f"name={name}&sha256={sha256(CONTENT)}"
    answer = raw(live, post(query, "content-length: 700"), CONTENT)
    assert b" 400 " in answer[:20]
    assert len(answer) < 2000
    assert b"set-cookie" not in answer.partition(b"\r\n\r\n")[0]
    assert eventually_clean(live)


def test_s6_a_form_is_bounded_beside_its_file(live: Any) -> None:
    field = b'--B\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    bodies = {
        "invalid_multipart": [
            field % (b"name", b"red") + b"--B--\r\n" + b"x" * 200_000,  # an endless epilogue
            b'--B\r\ncontent-disposition: form-data; name="name"\r\nx: ' + b"y" * 100_000 + b"\r\n\r\nred\r\n--B--\r\n",
        ],
        "invalid_value": [
            field % (b"name", b"r" * 5000) + b"--B--\r\n",
            field % (b"n" * 3000, b"red") + b"--B--\r\n",
            field % (b"name", b"red") + field % (b"name", b"blue") + b"--B--\r\n",
            field % (b"../file", b"red") + b"--B--\r\n",
            field % (b"name", b"\xff\xfe") + field % (b"sha256", b"\xff") + field % (b"file", b"1") + b"--B--\r\n",
        ],
    }
    for code, tricks in bodies.items():
        for body in tricks:
            response = httpx.post(
                f"{live.url}{DELTAS}",
                content=body,
                headers={"authorization": "Bearer admin-key", "content-type": "multipart/form-data; boundary=B"},
            )
            assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text
            assert len(response.content) < 2000
    assert eventually_clean(live)


def test_a_replayed_upload_changes_nothing(live: Any) -> None:
    headers = {"authorization": "Bearer admin-key"}
    answers = [httpx.post(f"{live.url}{DELTAS}?{QUERY}", content=CONTENT, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert len({answer.text for answer in answers}) == 1
    stale = httpx.post(f"{live.url}{DELTAS}?{QUERY}&expected_generation=0", content=CONTENT, headers=headers)
    assert stale.status_code == 409
