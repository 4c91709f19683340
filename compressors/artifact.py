"""The delta file: one safetensors file whose metadata holds a manifest. Reading needs neither torch nor trust in the file.

Layout: 8 bytes header length (LE), JSON header, tensor bytes. The header's `__metadata__["deltaworks"]` is the manifest: a
record per parameter of the checkpoint; its `__metadata__["sha256"]` is the digest of the rest of the header, so that with the
digests in the records every byte of the file is covered. The arrays of the record `name` are stored as `name::array`:

| kind | arrays |
|---|---|
| zero | none: the parameter equals the base's |
| impart | coef f32 [r]; keep_u, keep_v i32 [r]; u_vals, v_vals: kept values, column after column, ascending row |
| | and mask_u, mask_v u8 where the rows are written out (mask_codes.py) |
| lowrank | a [r, in], b [out, r] |
| sparse | count i32 [1], spread evenly over columns (factors.py); scale f32 [1]; vals: kept entries of the delta, as U's; mask_u |
| signs | signs u8: a bit an entry, row after row, 1 for +; scale f32 [1] or [out] |
| raw | delta, in the parameter's shape |
| rows | row_idx i32 [t], row_delta [t, width]; int8 has row_scale f32 [t] too; rows past the base's last are new ones, whole |

Values are fp16, bf16 or int8, and fp32 where a merged delta needs it; or u8 where the record has `bits`: runs of columns with
their width, each packed by itself (packing.py). An integer is a multiple of its column's step, which coef or scale holds.

A fine-tune's own tokenizer (tokenizer.py) is stored as `tokenizer::<file>`, u8.

Format 1 had seeded masks, the kinds zero, impart, lowrank, raw and rows, and no `bits`; it is read as it was. Format 3 has a
tokenizer; a file without one says 2.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressors.errors import ArtifactError, FormatVersionError

FORMAT = "deltaworks-delta"
FORMAT_VERSION = 3
READABLE = (1, 2, 3)
_WITHOUT_TOKENIZER = 2
MAX_HEADER_BYTES = 64 << 20
MANIFEST_KEY = "deltaworks"
SEAL_KEY = "sha256"

# safetensors dtype -> numpy; bf16 has no numpy type and is read as its bit pattern
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
}
DTYPE_NAMES = {np.dtype(v): k for k, v in DTYPES.items()}

Array = npt.NDArray[Any]
Kind = Literal["zero", "impart", "lowrank", "sparse", "signs", "raw", "rows"]
Mask = Literal["seeded", "bitmask", "gap8"]


MAX_DIMENSIONS = 8
_MOST = (1 << 63) - 1  # of an extent or an offset
Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=_MOST)], ...], Field(max_length=MAX_DIMENSIONS)]


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: Sized) -> bool:
    return not value


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(_Strict):
    """How one parameter is stored. `shape` is the fine-tune's; `sha256` maps each array to the digest of its bytes.

    `mask` stands where it is not the manifest's; `bits` are (columns, width) of packed values, in the order of the columns.
    """

    kind: Kind
    shape: Shape
    rank: int = 0
    tied_to: str | None = None
    mask: Mask | None = Field(default=None, exclude_if=_is_none)
    bits: tuple[tuple[int, int], ...] = Field(default=(), exclude_if=_is_empty)
    sha256: dict[str, str] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Ratios(_Strict):
    """Compression, three ways: surviving values (the paper's), bytes of the projections, whole file (dense is 2 bytes a value)."""

    values: float | None
    projection_bytes: float | None
    whole_file: float | None


class TokenizerFile(_Strict):
    """A file of the fine-tune's own tokenizer: sha256 of its text, of the base's that it is a difference to, of what is stored."""

    sha256: str
    against: str | None = None
    stored: str


class TokenizerInfo(_Strict):
    """What the fine-tune's tokenizer says; None where the folder has none. `chat_template`: its text, if not the base's.

    `files` by name, where the tokenizer is not the base's.
    """

    vocab_size: int | None = None
    eos_token_id: int | list[int] | None = None
    chat_template_sha256: str | None = None
    chat_template: str | None = None
    files: dict[str, TokenizerFile] = Field(default={}, exclude_if=_is_empty)


class MergedPart(_Strict):
    """A delta that went into a merged one: the sha256 of its file, and its weight."""

    sha256: str
    weight: float


class Merged(_Strict):
    """What a merged delta was made of. `retain`: the share of entries that TIES kept; None for Task Arithmetic."""

    method: Literal["ta", "ties"]
    scale: float
    retain: float | None = None
    parts: tuple[MergedPart, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Manifest(_Strict):
    """Everything that a file says about itself. Holds no time and no path: the same inputs give the same bytes.

    Settings that the method does not have are None. `bytes_ratio` is the one that was asked for. `distil`: steps in which
    BitDelta's scales were tuned.
    """

    format: str = FORMAT
    format_version: int = _WITHOUT_TOKENIZER
    method: str
    base_fingerprint: str
    base_name: str
    architecture: str
    ratio: float | None
    bytes_ratio: float | None = None
    beta: float | None
    c: float | None
    rule: str | None
    rescale: str | None
    value_dtype: str | None
    mask: str
    seed: int
    distil: int | None = Field(default=None, exclude_if=_is_none)
    ratios: Ratios
    tokenizer: TokenizerInfo
    tool: str
    merged: Merged | None = Field(default=None, exclude_if=_is_none)
    tensors: dict[str, Record]


def version_for(tokenizer: TokenizerInfo) -> int:
    """The oldest format that can say it."""
    return FORMAT_VERSION if tokenizer.files else _WITHOUT_TOKENIZER


@dataclass(frozen=True)
class Slot:
    """Where an array lies in the file: dtype as safetensors spells it, shape, and byte range."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Source(Protocol):
    """Where records are read from: a file, or what was encoded and is not written yet."""

    @property
    def records(self) -> Mapping[str, Record]: ...

    @property
    def slots(self) -> Mapping[str, Slot]: ...

    @property
    def mask(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def array(self, key: str) -> Array:
        """The array stored under `key`; bf16 as uint16 bit patterns."""
        ...


class Artifact:
    """An open delta file; arrays are views of the mapped file. Use `with Artifact.open(path) as artifact`."""

    def __init__(self, path: Path, manifest: Manifest, slots: Mapping[str, Slot], buffer: mmap.mmap) -> None:
        self.path = path
        self.manifest = manifest
        self.slots = slots
        self._buffer: mmap.mmap | None = buffer

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Raises ArtifactError (FormatVersionError) when the file is not a readable delta, OSError when it is not there."""
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_end, header = _read_header(file.read(8), size, file.read)
            manifest, slots = _parse(header, header_end, size)
            return cls(Path(path), manifest, slots, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @property
    def records(self) -> Mapping[str, Record]:
        return self.manifest.tensors

    @property
    def mask(self) -> str:
        """Code of the masks of records that name none."""
        return self.manifest.mask

    @property
    def seed(self) -> int:
        return self.manifest.seed

    def sealed(self) -> bool:
        """Whether the header is, byte for byte, the one that was written."""
        if self._buffer is None:
            raise ValueError(f"{self.path} is closed")
        length = int.from_bytes(self._buffer[:8], "little")
        stored = self._buffer[8 : 8 + length]
        header = json.loads(stored)
        header["__metadata__"].pop(SEAL_KEY, None)
        return stored == encode_header(header)

    def array(self, key: str) -> Array:
        """The array stored under `key`, without a copy where it lies aligned; bf16 as uint16 bit patterns."""
        if self._buffer is None:
            raise ValueError(f"{self.path} is closed")
        try:
            slot = self.slots[key]
        except KeyError:
            raise ArtifactError(f"{self.path.name}: the array {key} is missing; the file is incomplete") from None
        dtype = DTYPES[slot.dtype]
        flat = np.frombuffer(self._buffer, dtype, (slot.end - slot.start) // dtype.itemsize, slot.start)
        return np.require(flat, requirements="A").reshape(slot.shape)

    def close(self) -> None:
        """Unmap the file, as soon as no array of it is in use."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            with suppress(BufferError):  # an array still views the mapping; its end unmaps it
                buffer.close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def encode_header(header: dict[str, Any]) -> bytes:
    """The bytes of a header, in the one form that is written: sorted, compact, sealed, and padded to a multiple of 8."""
    seal = hashlib.sha256(_compact(header)).hexdigest()
    encoded = _compact(header | {"__metadata__": header["__metadata__"] | {SEAL_KEY: seal}})
    return encoded + b" " * (-len(encoded) % 8)


def _compact(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), sort_keys=True).encode()


def _read_header(prefix: bytes, size: int, read: Callable[[int], bytes]) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(prefix, "little")
    fits = len(prefix) == 8 and length <= size - 8
    text = read(length) if fits and length <= MAX_HEADER_BYTES else b""
    if not text.startswith(b"{"):  # only then: the length of a good header may begin with the bytes of a pickle
        raise ArtifactError(_what_it_is(prefix, fits, length))
    try:
        header: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the header is not JSON: the file is damaged, or is not a safetensors file") from error
    return 8 + length, header


def _what_it_is(prefix: bytes, fits: bool, length: int) -> str:
    """Why a file that does not begin like safetensors is refused."""
    if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
        return "this is a pickle (a PyTorch .bin or .pt file), never loaded; a delta comes from `deltaworks delta compress`"
    if not fits:
        return "the file is truncated, or is not a safetensors file"
    if length > MAX_HEADER_BYTES:
        return f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read"
    return "the header is not a JSON object: the file is damaged, or is not a safetensors file"


def _parse(header: dict[str, Any], header_end: int, size: int) -> tuple[Manifest, dict[str, Slot]]:
    metadata = header.pop("__metadata__", None)
    text = metadata.get(MANIFEST_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ArtifactError("the file has no Deltaworks manifest; it is a safetensors file, but not a delta")
    manifest = _parse_manifest(text)
    for key in header:
        _check_text(key)
    slots = {key: _slot(key, entry, header_end) for key, entry in header.items()}
    position = header_end
    for key, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != position:
            raise ArtifactError(
                f"array {key} starts at byte {slot.start}, expected {position}: offsets overlap or leave a hole"
            )
        position = slot.end
    if position != size:
        raise ArtifactError(f"the file has {size} bytes but its header describes {position}: it is truncated or padded")
    return manifest, slots


def _parse_manifest(text: str) -> Manifest:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ArtifactError(f"the manifest's format is not {FORMAT!r}")
        version = fields.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"the file has format version {version}; this version reads up to {FORMAT_VERSION}: upgrade deltaworks"
            )
        if version not in READABLE:
            raise ArtifactError(f"the manifest's format_version is {version!r}, expected {FORMAT_VERSION}")
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ArtifactError(f"manifest field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the manifest is not JSON: the file is damaged") from error


def _check_text(key: str) -> None:
    """JSON can spell half a character, which no answer could carry."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ArtifactError(f"the header has an array {key!a}, whose name is no text") from None


def _slot(key: str, entry: Any, header_end: int) -> Slot:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"the header entry of {key} is malformed") from error
    numbers = (*shape, start, end)
    known = isinstance(dtype, str) and dtype in DTYPES
    if not known or len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n <= _MOST for n in numbers):
        raise ArtifactError(f"the header entry of {key} has an unknown dtype or a bad number")
    count = 1
    for extent in shape:
        count *= extent
    if end - start != count * DTYPES[dtype].itemsize:
        raise ArtifactError(f"array {key} of shape {list(shape)} and dtype {dtype} cannot have {end - start} bytes")
    return Slot(dtype, shape, header_end + start, header_end + end)
