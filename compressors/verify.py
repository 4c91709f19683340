"""Everything that is checked before a delta file is trusted; the CLI and the gateway's upload run the same function. No torch.

Nothing is allocated because a header or a count says so: `verify` takes at most 64 bytes of memory a byte of the file and 1 MiB,
and time in proportion, whatever the file holds (tests/fuzz). All other readers are for files that have passed.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressors.artifact import Array, Artifact, Manifest, Record
from compressors.errors import ArtifactError, BaseMismatchError, UnknownMethodError
from compressors.factors import read_rows, read_values, spread
from compressors.layout import is_buffer, is_embedding, stored_name, vocabulary_tables
from compressors.packing import WIDTHS
from compressors.tokenizer import array_key
from compressors.tokenizer import check as check_tokenizer

KNOWN_METHODS = ("impart", "impart-qt", "lowrank", "dare", "bitdelta", "lora", "ta", "ties")
MAX_TEMPLATE_BYTES = 256 << 10
_ARRAYS = {
    "zero": (),
    "impart": ("coef", "keep_u", "keep_v", "u_vals", "v_vals"),
    "lowrank": ("a", "b"),
    "sparse": ("count", "scale", "vals"),
    "signs": ("signs", "scale"),
    "raw": ("delta",),
    "rows": ("row_idx", "row_delta"),
}
_WRITTEN_MASKS = {"impart": ("mask_u", "mask_v"), "sparse": ("mask_u",)}
_MASKS = ("seeded", "bitmask", "gap8")
_PACKED = ("int4", "mixed")  # value dtypes that are u8 in the file, with `bits` in the records
_VALUE_SLOTS = {"fp16": "F16", "bf16": "BF16", "int8": "I8"}
_MOST_VALUES = 8 // min(WIDTHS)  # in a byte
_FLOAT_SLOTS = ("F32", "F16", "BF16")
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}


@dataclass(frozen=True)
class Report:
    """What a verified file is: its sha256, size, manifest, the checks that it passed, and how many tokens it adds to the base's."""

    digest: str
    nbytes: int
    manifest: Manifest
    checks: tuple[str, ...]
    added_tokens: int = 0


def verify(
    path: Path,
    base_fingerprint: str | None = None,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
    base_folder: Path | None = None,
) -> Report:
    """Check a delta file: structure, method, base, shapes, arrays against records, digests, finite values, its own tokenizer.

    `base_fingerprint`, `base_shapes` (name -> shape) and `base_folder` (for its tokenizer) describe the base that shall serve it;
    None skips those checks.
    Raises ArtifactError, FormatVersionError, UnknownMethodError or BaseMismatchError, naming the tensor.
    """
    with Artifact.open(path) as artifact:
        manifest = artifact.manifest
        checks, added_tokens = ["structure"], 0
        if manifest.method not in KNOWN_METHODS:
            raise UnknownMethodError(
                f"method {manifest.method!r} is unknown; this version knows {', '.join(KNOWN_METHODS)}"
            )
        _check_settings(manifest)
        _check_template(manifest)
        checks.append("method")
        if base_fingerprint is not None:
            _check_base(manifest, base_fingerprint)
            checks.append("base")
        if base_shapes is not None:
            _check_shapes(artifact.records, base_shapes)
            added_tokens = _added_tokens(artifact.records, base_shapes)
            checks.append("shapes")
        _check_keys(artifact)
        for name, record in artifact.records.items():
            _check_record(artifact, name, record)
        if base_shapes is not None:
            _check_added_rows(artifact, base_shapes)
        if not artifact.sealed():
            raise ArtifactError(
                "the header does not match its digest: the manifest or an offset was changed or damaged"
            )
        checks += ["records", "digests", "finite"]
        if base_folder is not None and manifest.tokenizer.files:
            check_tokenizer(artifact, base_folder)
            checks.append("tokenizer")
    return Report(_file_sha256(path), path.stat().st_size, manifest, tuple(checks), added_tokens)


def _check_settings(manifest: Manifest) -> None:
    if manifest.mask not in _MASKS:
        raise ArtifactError(f"mask {manifest.mask!r} is unknown; one of {', '.join(_MASKS)}")
    if not 0 <= manifest.seed < 1 << 64:
        raise ArtifactError(f"seed {manifest.seed} is outside [0, 2^64)")
    if manifest.value_dtype not in (None, *_VALUE_SLOTS, *_PACKED):
        known = ", ".join((*_VALUE_SLOTS, *_PACKED))
        raise ArtifactError(f"value_dtype {manifest.value_dtype!r} is unknown; one of {known}")


def _check_template(manifest: Manifest) -> None:
    told = manifest.tokenizer
    if told.chat_template is None:
        return
    encoded = told.chat_template.encode()
    if len(encoded) > MAX_TEMPLATE_BYTES:
        raise ArtifactError(f"tokenizer.chat_template has {len(encoded)} bytes; at most {MAX_TEMPLATE_BYTES} are read")
    if hashlib.sha256(encoded).hexdigest() != told.chat_template_sha256:
        raise ArtifactError("tokenizer.chat_template does not match chat_template_sha256")


def _check_base(manifest: Manifest, base_fingerprint: str) -> None:
    if manifest.base_fingerprint != base_fingerprint:
        raise BaseMismatchError(
            f"the delta belongs to the base {manifest.base_name!r} ({manifest.base_fingerprint[:19]}…), "
            f"but the base here is {base_fingerprint[:19]}…: same names and shapes are not enough, the weights differ"
        )


def _check_shapes(records: Mapping[str, Record], base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, record in records.items():
        stored = stored_name(name)
        if record.tied_to is not None:
            continue
        if stored not in base_shapes:
            raise BaseMismatchError(f"the delta has {stored}, which the base lacks")
        shape = base_shapes[stored]
        if record.kind == "rows":
            fits = record.shape[1:] == shape[1:] and record.shape[0] >= shape[0]
        else:
            fits = "#" in name or record.shape in (shape, shape[::-1])  # a Conv1D is stored transposed
        if not fits:
            raise BaseMismatchError(
                f"{name} has shape {list(record.shape)}, but {list(shape)} in the base", fault="shape"
            )
    for stored, count in _part_values(records).items():
        if count != math.prod(base_shapes[stored]):
            raise BaseMismatchError(
                f"the parts of {stored} do not add up to its shape {list(base_shapes[stored])}", fault="shape"
            )
    missing = set(base_shapes) - {stored_name(name) for name in records} - {"lm_head.weight"}
    missing = {name for name in missing if not is_buffer(name)}
    if missing:
        raise ArtifactError(f"the delta has no record of {min(missing)} ({len(missing)} tensors missing)")


def _added_tokens(records: Mapping[str, Record], base_shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows that token embedding and head have beyond the base's: as many in both."""
    tables = [name for name in vocabulary_tables(records) if records[name].tied_to is None and name in base_shapes]
    added = {name: records[name].shape[0] - base_shapes[name][0] for name in tables}
    if len(set(added.values())) > 1:
        raise ArtifactError(
            "the fine-tune adds other numbers of tokens to its tables: "
            + ", ".join(f"{added[n]} to {n}" for n in sorted(added))
        )
    return max(added.values(), default=0)


def _check_added_rows(artifact: Artifact, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Rows past the base's last one have no base to be a change of, so each of them is stored."""
    for name, record in artifact.records.items():
        if record.kind == "rows":
            known = base_shapes[name][0]
            stored = int((artifact.array(f"{name}::row_idx") >= known).sum())
            if stored != record.shape[0] - known:
                raise ArtifactError(
                    f"{name} adds {record.shape[0] - known} rows to the base's {known}, but holds {stored}"
                )


def _part_values(records: Mapping[str, Record]) -> dict[str, int]:
    """Values in all parts of each split parameter."""
    counts: dict[str, int] = defaultdict(int)
    for name, record in records.items():
        if "#" in name:
            counts[stored_name(name)] += math.prod(record.shape)
    return counts


def _check_keys(artifact: Artifact) -> None:
    mask = artifact.manifest.mask
    expected = {f"{name}::{key}" for name, record in artifact.records.items() for key in _arrays(record, mask)}
    files = artifact.manifest.tokenizer.files
    expected |= {array_key(name) for name in files}
    missing, extra = expected - set(artifact.slots), set(artifact.slots) - expected
    if missing:
        raise ArtifactError(f"the array {min(missing)} is missing ({len(missing)} arrays)")
    if extra:
        raise ArtifactError(f"the array {min(extra)} belongs to no record ({len(extra)} arrays)")
    for name, file in files.items():
        _expect_bytes(artifact, array_key(name))
        if hashlib.sha256(artifact.array(array_key(name)).tobytes()).hexdigest() != file.stored:
            raise ArtifactError(f"the bytes of {array_key(name)} do not match their digest; the file is damaged")


def _arrays(record: Record, manifest_mask: str) -> tuple[str, ...]:
    """The arrays that a record must have."""
    masks = () if (record.mask or manifest_mask) == "seeded" else _WRITTEN_MASKS.get(record.kind, ())
    scaled = record.kind == "rows" and "row_scale" in record.sha256
    return _ARRAYS[record.kind] + masks + (("row_scale",) if scaled else ())


def _check_record(artifact: Artifact, name: str, record: Record) -> None:
    if any(extent < 1 for extent in record.shape) or not record.shape:
        raise ArtifactError(f"{name}: shape {list(record.shape)} has no elements", fault="shape")
    if record.tied_to is not None:
        _check_tie(artifact.records, name, record)
    keys = _arrays(record, artifact.manifest.mask)
    if extra := set(record.sha256) - set(keys):
        raise ArtifactError(f"{name} has a digest of {min(extra)}, which a record of kind {record.kind} has not")
    for key in keys:
        array = artifact.array(f"{name}::{key}")
        if hashlib.sha256(array.tobytes()).hexdigest() != record.sha256.get(key):
            raise ArtifactError(
                f"{name}: the bytes of {key} do not match their digest; the file is damaged", fault="digest"
            )
        _check_finite(f"{name}::{key}", artifact.slots[f"{name}::{key}"].dtype, array)
    check = _CHECKS.get(record.kind)
    if check is not None:
        check(artifact, name, record)


def _check_tie(records: Mapping[str, Record], name: str, record: Record) -> None:
    table = records.get(record.tied_to or "")
    if record.kind != "zero" or table is None or table.tied_to is not None or table.shape != record.shape:
        raise ArtifactError(f"{name} is tied to {record.tied_to!r}, which is no table of its shape")


def _check_impart(artifact: Artifact, name: str, record: Record) -> None:
    rank = record.rank
    _expect_matrix(name, record)
    if rank < 1 or (record.mask in (None, "seeded") and rank > min(record.shape)):  # a merged delta's may be larger
        raise ArtifactError(f"{name}: rank {rank} does not fit the shape {list(record.shape)}", fault="shape")
    _expect(artifact, f"{name}::coef", (rank,), ("F32",))
    for side, (label, rows) in enumerate(zip("uv", record.shape, strict=True)):
        _expect(artifact, f"{name}::keep_{label}", (rank,), ("I32",))
        keep = artifact.array(f"{name}::keep_{label}")
        if keep.min() < 1 or keep.max() > rows:
            raise ArtifactError(f"{name}: keep_{label} must lie in 1..{rows}, found {keep.min()}..{keep.max()}")
        _check_values(artifact, name, f"{label}_vals", record, keep)
        if (record.mask or artifact.manifest.mask) != "seeded":
            _expect_bytes(artifact, f"{name}::mask_{label}")
            read_rows(artifact, name, side, record, keep)


def _check_values(artifact: Artifact, name: str, label: str, record: Record, keep: Array) -> None:
    """Values of one factor: as many as are kept, of the record's width; packed ones without a bit behind the last."""
    key = f"{name}::{label}"
    if not record.bits:
        slots = [_VALUE_SLOTS[dtype] for dtype in (artifact.manifest.value_dtype,) if dtype in _VALUE_SLOTS]
        known = ("F32", *_VALUE_SLOTS.values()) if artifact.manifest.value_dtype is None else _VALUE_SLOTS.values()
        _expect(artifact, key, (int(keep.sum(dtype=np.int64)),), tuple(slots or known))
        return
    for columns, width in record.bits:
        if width not in WIDTHS or columns < 1:
            raise ArtifactError(f"{name}: bits {record.bits} must be runs of columns with a width of {WIDTHS}")
    _expect_bytes(artifact, key)
    read_values(artifact, name, label, record, keep)


def _check_sparse(artifact: Artifact, name: str, record: Record) -> None:
    _expect_matrix(name, record)
    _expect(artifact, f"{name}::count", (1,), ("I32",))
    _expect(artifact, f"{name}::scale", (1,), ("F32",))
    count, (rows, columns) = int(artifact.array(f"{name}::count")[0]), record.shape
    if not columns <= count <= rows * columns:
        raise ArtifactError(f"{name}: count must lie in {columns}..{rows * columns}, found {count}")
    stored = artifact.slots[f"{name}::vals"]
    if count > (stored.end - stored.start) * _MOST_VALUES:  # before anything is spread over the columns
        raise ArtifactError(f"{name}: count is {count}, but vals has {stored.end - stored.start} bytes")
    _check_values(artifact, name, "vals", record, spread(count, columns))
    if (record.mask or artifact.manifest.mask) != "seeded":
        _expect_bytes(artifact, f"{name}::mask_u")
        read_rows(artifact, name, 0, record, spread(count, columns))


def _check_signs(artifact: Artifact, name: str, record: Record) -> None:
    _expect_matrix(name, record)
    count = math.prod(record.shape)
    _expect(artifact, f"{name}::signs", ((count + 7) // 8,), ("U8",))
    if count % 8 and artifact.array(f"{name}::signs")[-1] >> (count % 8):
        raise ArtifactError(f"{name}::signs has bits behind its {count} entries")
    scale = artifact.slots[f"{name}::scale"].shape
    _expect(artifact, f"{name}::scale", (1,) if scale == (1,) else (record.shape[0],), ("F32",))


def _check_raw(artifact: Artifact, name: str, record: Record) -> None:
    _expect(artifact, f"{name}::delta", record.shape, _FLOAT_SLOTS)


def _check_lowrank(artifact: Artifact, name: str, record: Record) -> None:
    _expect_matrix(name, record)
    if not 1 <= record.rank <= min(record.shape):
        raise ArtifactError(f"{name}: rank {record.rank} does not fit the shape {list(record.shape)}", fault="shape")
    _expect(artifact, f"{name}::a", (record.rank, record.shape[1]), _FLOAT_SLOTS)
    _expect(artifact, f"{name}::b", (record.shape[0], record.rank), _FLOAT_SLOTS)


def _check_rows(artifact: Artifact, name: str, record: Record) -> None:
    _expect_matrix(name, record)
    if not is_embedding(name):
        raise ArtifactError(f"{name}: a record of kind rows is a vocabulary table")
    index = artifact.array(f"{name}::row_idx").reshape(-1)
    _expect(artifact, f"{name}::row_idx", (len(index),), ("I32",))
    scaled = "row_scale" in record.sha256
    _expect(artifact, f"{name}::row_delta", (len(index), *record.shape[1:]), ("I8",) if scaled else _FLOAT_SLOTS)
    if scaled:
        _expect(artifact, f"{name}::row_scale", (len(index),), ("F32",))
    if not len(index):
        raise ArtifactError(f"{name}: row_idx is empty; an unchanged table is stored as zero")
    if index[0] < 0 or index[-1] >= record.shape[0] or (index[1:] <= index[:-1]).any():
        raise ArtifactError(f"{name}: row_idx must rise strictly within 0..{record.shape[0] - 1}")


_CHECKS: dict[str, Callable[[Artifact, str, Record], None]] = {
    "impart": _check_impart,
    "lowrank": _check_lowrank,
    "sparse": _check_sparse,
    "signs": _check_signs,
    "raw": _check_raw,
    "rows": _check_rows,
}


def _expect_matrix(name: str, record: Record) -> None:
    if len(record.shape) != 2:
        raise ArtifactError(
            f"{name}: a record of kind {record.kind} is a matrix, its shape is {list(record.shape)}", fault="shape"
        )


def _expect_bytes(artifact: Artifact, key: str) -> None:
    """A row of bytes of any length: what it must be is told by what it encodes."""
    slot = artifact.slots[key]
    if slot.dtype != "U8" or len(slot.shape) != 1:
        raise ArtifactError(f"{key} must be a row of bytes (U8), found {slot.dtype} {list(slot.shape)}")


def _expect(artifact: Artifact, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    slot = artifact.slots[key]
    if slot.shape != shape:
        raise ArtifactError(f"{key} has shape {list(slot.shape)}, expected {list(shape)}", fault="shape")
    if slot.dtype not in dtypes:
        raise ArtifactError(f"{key} has dtype {slot.dtype}, expected {' or '.join(dtypes)}")


def _check_finite(key: str, dtype: str, array: Array) -> None:
    """A float is not finite when all bits of its exponent are set."""
    if dtype in _EXPONENTS and array.size:
        unsigned, mask = _EXPONENTS[dtype]
        if ((array.view(unsigned) & unsigned(mask)) == mask).any():
            raise ArtifactError(f"{key} holds NaN or infinite values", fault="nonfinite")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
