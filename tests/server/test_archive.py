"""Uploads that are archives: two files at the root, and every trick that an archive can play."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

DELTAS = "/v1/admin/deltas"
DELTA, FACTS = b"a delta, " * 300, {"base_fingerprint": "sha256:ba5e", "description": "packed"}
Member = tuple[str, bytes]
BOTH: tuple[Member, ...] = (("delta.safetensors", DELTA), ("delta.json", json.dumps(FACTS).encode()))


def tar(*members: Member | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mtime = len(member[1]), 1.5  # type: ignore[assignment]  # wants an extended header
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def zipped(*members: Member, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [
    tar(*BOTH),
    tar(*BOTH, format=tarfile.GNU_FORMAT),
    gzip.compress(tar(*reversed(BOTH))),
    zipped(*BOTH),
    zipped(*BOTH, method=zipfile.ZIP_STORED),
]


@pytest.mark.parametrize("content", GOOD)
async def test_an_archive_is_its_delta(upload: Any, house: Any, content: bytes) -> None:
    response = await upload("red", content)
    assert response.status_code == 201, response.text
    digest = hashlib.sha256(DELTA).hexdigest()
    assert (response.json()["digest"], response.headers["etag"]) == (digest, f'"{digest}"')
    assert response.json()["versions"][0]["description"] == "packed"
    assert house.store.objects() == [digest]
    assert (await upload("red", content)).status_code == 200
    assert (await upload("red", DELTA)).status_code == 200
    assert list((house.store.root / "incoming").iterdir()) == []


def encrypted() -> bytes:
    content = bytearray(zipped(*BOTH))
    for start in (content.find(b"PK\x03\x04") + 6, content.find(b"PK\x01\x02") + 8):
        content[start] |= 1
    return bytes(content)


def renamed() -> bytes:
    """A regular member whose extended header gives it another name."""
    info = tarfile.TarInfo("delta.safetensors")
    info.pax_headers = {"path": "../../escaped"}
    return tar(info, BOTH[1])


def huge_header(size: int) -> bytes:
    info = special("x", tarfile.XHDTYPE)
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def many_entries() -> bytes:
    return zipped(*((f"f{n}", b"") for n in range(5000)))


def lying_size() -> bytes:
    """The directory promises more than there is."""
    content = bytearray(zipped(*BOTH, method=zipfile.ZIP_STORED))
    at = content.find(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    return bytes(content)


FACTS_MEMBER = BOTH[1]
TRICKS: list[Callable[[], bytes]] = [
    lambda: tar(("../delta.safetensors", DELTA), FACTS_MEMBER),
    lambda: tar(("/tmp/delta.safetensors", DELTA), FACTS_MEMBER),
    lambda: tar(("a/delta.safetensors", DELTA), FACTS_MEMBER),
    lambda: tar(("DELTA.safetensors", DELTA), FACTS_MEMBER),
    lambda: tar(("delta.safetensors\u200b", DELTA), FACTS_MEMBER),
    lambda: tar(*BOTH, ("evil.sh", b"#!")),
    lambda: tar(*BOTH, BOTH[0]),
    lambda: tar(BOTH[0]),
    lambda: tar(FACTS_MEMBER),
    lambda: tar(special("delta.safetensors", tarfile.SYMTYPE, "/etc/passwd"), FACTS_MEMBER),
    lambda: tar(special("delta.safetensors", tarfile.LNKTYPE, "delta.json"), FACTS_MEMBER),
    lambda: tar(special("delta.safetensors", tarfile.CHRTYPE), FACTS_MEMBER),
    lambda: tar(special("delta.safetensors", tarfile.FIFOTYPE), FACTS_MEMBER),
    lambda: tar(special("delta.safetensors", tarfile.DIRTYPE), *BOTH),
    lambda: tar(special("delta.safetensors", tarfile.GNUTYPE_SPARSE), FACTS_MEMBER),
    lambda: tar(*BOTH)[:900],
    lambda: tar(*BOTH)[:-1024].rstrip(b"\0"),
    lambda: gzip.compress(tar(*BOTH))[:-20],
    lambda: gzip.compress(b"no tar" * 200),
    renamed,
    lambda: huge_header(4 << 30),
    lambda: huge_header(100_000),
    lambda: tar(BOTH[0], ("delta.json", b"{")),
    lambda: tar(BOTH[0], ("delta.json", b"[" * 60_000)),
    lambda: tar(BOTH[0], ("delta.json", b'{"run": "rm -rf /"}')),
    lambda: tar(BOTH[0], ("delta.json", b'{"description": 1}')),
    lambda: tar(BOTH[0], ("delta.json", b" " * 70_000)),
    lambda: zipped(("../delta.safetensors", DELTA), FACTS_MEMBER),
    lambda: zipped(("C:\\delta.safetensors", DELTA), FACTS_MEMBER),
    lambda: zipped(("delta.safetensors/", b""), FACTS_MEMBER),
    lambda: zipped(*BOTH, ("x", b"")),
    lambda: zipped(*BOTH)[:-30],
    lambda: zipped(*BOTH).replace(DELTA[:1], b"?", 1),
    lambda: zipped(*BOTH, method=zipfile.ZIP_LZMA)[:40],
    encrypted,
    many_entries,
    lying_size,
]


@pytest.mark.parametrize("trick", range(len(TRICKS)))
async def test_s2_archive_tricks_are_refused_and_leave_nothing(
    upload: Any, house: Any, admin: httpx.AsyncClient, trick: int
) -> None:
    response = await upload("red", TRICKS[trick]())
    error = response.json()["error"]
    assert (response.status_code, error["code"]) in ((400, "archive_invalid"), (400, "delta_invalid")), error
    assert len(response.content) < 1000
    assert str(house.store.root) not in response.text
    assert [path for path in house.store.root.rglob("*") if path.is_file()] == [house.store.root / "lock"]
    assert (await admin.get(DELTAS)).json()["data"] == []


@pytest.mark.parametrize("pack", [lambda *m: gzip.compress(tar(*m)), zipped])
async def test_s2_an_archive_that_grows_is_stopped(upload: Any, house: Any, pack: Any) -> None:
    for nbytes in (1_000_000, 30_000_000):  # by its ratio, by the limit of an upload
        response = await upload("red", pack(("delta.safetensors", bytes(nbytes)), FACTS_MEMBER))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert [path for path in house.store.root.rglob("*") if path.is_file()] == [house.store.root / "lock"]


async def test_s1_a_pickle_is_not_read(upload: Any, house: Any, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    bomb = b"broken" + pickle.dumps(Bomb())
    torch_zip = zipped(("archive/data.pkl", pickle.dumps(Bomb())), ("archive/version", b"3"))
    for content in (bomb, torch_zip, tar(("delta.safetensors", bomb), FACTS_MEMBER)):
        assert (await upload("red", content)).status_code == 400
    assert not (tmp_path / "exploded").exists()
    assert house.store.objects() == []


async def test_what_the_form_and_the_archive_say_must_agree(upload: Any, house: Any) -> None:
    other = await upload("red", tar(BOTH[0], ("delta.json", b'{"base_fingerprint": "sha256:other"}')))
    assert other.json()["error"]["code"] == "delta_base_mismatch"
    both = await upload("red", tar(*BOTH), base_fingerprint="sha256:other")
    assert both.json()["error"]["code"] == "archive_invalid"
    said = await upload("red", tar(*BOTH), description="mine")
    assert said.json()["versions"][0]["description"] == "mine"
    wrong = await upload("blue", tar(*BOTH), sha256=hashlib.sha256(DELTA).hexdigest())
    assert wrong.json()["error"]["code"] == "digest_mismatch"  # the digest is that of what is sent
