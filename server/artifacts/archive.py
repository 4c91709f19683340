"""An upload that is a tar, tar.gz or zip of `delta.safetensors` and `delta.json`, both at its root, and nothing else.

No name of a member is ever used as a path: the two are read as streams, everything else is refused, so there is nothing to escape
to. What comes out is bounded as an upload is, and by how much it may unpack; headers are bounded before they are read.
"""

import gzip
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import IO

from server.artifacts.store import BodyTooLarge, Incoming
from server.core import GatewayError

DELTA_FILE, FACTS_FILE = "delta.safetensors", "delta.json"
FACTS = ("base_fingerprint", "description")
_MAX_HEADER_BYTES = 64 << 10  # of delta.json, of a tar's extended header, of a zip's directory
_MAX_RATIO = 50  # unpacked to packed; weights hardly shrink
_CHUNK_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"


class InvalidArchive(GatewayError):
    """An archive that does not hold exactly the two files, or is damaged."""


def is_archive(path: Path) -> bool:
    """By its first bytes; a safetensors file begins with the length of its header, and so with none of these. Blocking."""
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    return head.startswith((_ZIP, _GZIP)) or head[257:262] == b"ustar"


def unpack(path: Path, incoming: Incoming) -> dict[str, str]:
    """Write the delta of an archive to `incoming`; returns what its delta.json says. Blocking.

    Raises InvalidArchive, BodyTooLarge, InsufficientStorage.
    """
    with path.open("rb") as file:
        members = _zip_members(path) if file.read(4) == _ZIP else _tar_members(path)
    facts: dict[str, str] | None = None
    found: set[str] = set()
    limit = _MAX_RATIO * path.stat().st_size
    try:
        for name, content in members:
            if name not in (DELTA_FILE, FACTS_FILE) or name in found:
                raise InvalidArchive(f"an archive holds {DELTA_FILE} and {FACTS_FILE} at its root, and nothing else")
            found.add(name)
            if name == FACTS_FILE:
                facts = _facts(content)
                continue
            for chunk in content:
                incoming.write(chunk)
                if incoming.nbytes > limit:
                    raise BodyTooLarge(f"the archive unpacks to more than {_MAX_RATIO} times its size")
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InvalidArchive("the archive is damaged") from error
    except (NotImplementedError, RuntimeError) as error:
        raise InvalidArchive("the archive is encrypted, or packed in a way that is not read") from error
    if facts is None or DELTA_FILE not in found:
        raise InvalidArchive(f"the archive lacks {FACTS_FILE if facts is None else DELTA_FILE} at its root")
    return facts


def _facts(content: Iterator[bytes]) -> dict[str, str]:
    text = b""
    for chunk in content:
        text += chunk
        if len(text) > _MAX_HEADER_BYTES:
            raise InvalidArchive(f"{FACTS_FILE} is larger than {_MAX_HEADER_BYTES} bytes")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArchive(f"{FACTS_FILE} is not JSON") from error
    if not isinstance(facts, dict) or set(facts) - set(FACTS) or not all(isinstance(v, str) for v in facts.values()):
        raise InvalidArchive(f"{FACTS_FILE} is an object of strings: {', '.join(FACTS)}")
    return facts


def _zip_members(path: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MAX_HEADER_BYTES - 22))
        tail = file.read()
    start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) < start + 22:
        raise InvalidArchive("the archive is damaged")
    entries, nbytes = struct.unpack("<HI", tail[start + 10 : start + 16])
    if entries > 2 or nbytes > _MAX_HEADER_BYTES:  # before all of the directory is read
        raise InvalidArchive(f"an archive holds {DELTA_FILE} and {FACTS_FILE} at its root, and nothing else")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            plain = info.external_attr >> 28 in (0, 8)  # without a Unix mode, or a regular file
            with archive.open(info) as file:
                yield (info.filename if plain else ""), _chunks(file)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _tar_members(path: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Regular files by name, "" for everything else; extended headers that would rename or resize one are refused."""
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        with gzip.open(raw) if packed else raw as file:
            while (block := _exactly(file, _BLOCK)) != bytes(_BLOCK):
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
                    if member.size > _MAX_HEADER_BYTES:
                        raise InvalidArchive("a header of the archive is too large")
                    extended = b"".join(_content(file, member.size))
                    if any(key in extended for key in (b"path=", b"size=", b"GNU.sparse")):
                        raise InvalidArchive("the archive renames or resizes files in extended headers")
                    continue
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                yield (member.name if regular else ""), _content(file, member.size)


def _content(file: GzipFile | BufferedReader, nbytes: int) -> Iterator[bytes]:
    left = nbytes
    while left:
        chunk = _exactly(file, min(left, _CHUNK_BYTES))
        left -= len(chunk)
        yield chunk
    _exactly(file, -nbytes % _BLOCK)


def _exactly(file: GzipFile | BufferedReader, nbytes: int) -> bytes:
    chunk = file.read(nbytes)
    if len(chunk) < nbytes:
        raise EOFError
    return chunk
