"""Delta files that are nearly right: a real one whose header, manifest, arrays or bytes were changed, the rest kept consistent."""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressors.artifact import DTYPES, encode_header

DEEP, HUGE = "@DEEP@", "@HUGE@"  # written as JSON that json.dumps does not write
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, 2**64)
JUNK: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, "", "a", "\ud800", "x" * 4000, DEEP, HUGE, [], {}, [[]], [0], [-1], [2**63], ["a"], {"a": 1}),
    *(0.5, 1e300, float("nan"), float("inf"), -0.0, [1] * 3000, [2**31, 2**31], [2**62, 2**62], [1, 0], [0, 2**62]),
)
DIMENSIONS = (0, 1, 2, 3, 8, 23, 24, 40, 41, 47, 48, 49, 96, 97, 2**16, 2**20, 2**31, 2**40, 2**62)


@dataclass
class Parts:
    """A delta file taken apart. `mend`: digests of changed arrays are made right again."""

    header: dict[str, Any]
    manifest: dict[str, Any]
    arrays: dict[str, bytearray]
    mend: bool = True
    seal: bool = True

    @classmethod
    def of(cls, data: bytes) -> "Parts":
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        manifest = json.loads(header.pop("__metadata__")["deltaworks"])
        arrays = {key: bytearray(body[slice(*entry["data_offsets"])]) for key, entry in header.items()}
        return cls(header, manifest, arrays)

    def bytes(self) -> bytes:
        """The file; where an entry's offsets were not touched, they follow its array."""
        header, body = copy.deepcopy(self.header), bytearray()
        for key, data in self.arrays.items():
            entry = header.get(key)
            if isinstance(entry, dict) and not entry.pop("touched", False):
                entry["data_offsets"] = [len(body), len(body) + len(data)]
            body += data
        if self.mend:
            self._mend()
        header["__metadata__"] = {"deltaworks": json.dumps(self.manifest), "format": "pt"}
        text = encode_header(header) if self.seal else json.dumps(header).encode()
        for quote in (b'"', b'\\"'):
            text = text.replace(quote + DEEP.encode() + quote, b"[" * 60000 + b"]" * 60000)
            text = text.replace(quote + HUGE.encode() + quote, b"9" * 6000)
        return struct.pack("<Q", len(text)) + text + bytes(body)

    def _mend(self) -> None:
        records = self.manifest.get("tensors")
        for key, data in self.arrays.items():
            name, _, label = key.rpartition("::")
            record = records.get(name) if isinstance(records, dict) else None
            if isinstance(record, dict) and isinstance(record.get("sha256"), dict):
                record["sha256"][label] = hashlib.sha256(data).hexdigest()


Change = Callable[[random.Random, Parts, Parts], None]


def mutated(rng: random.Random, corpus: list[bytes]) -> bytes:
    """One input: up to three changes of one of the files, sometimes with parts of another."""
    parts, other = (Parts.of(rng.choice(corpus)) for _ in range(2))
    parts.mend, parts.seal = rng.random() < 0.9, rng.random() < 0.9
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(CHANGES)(rng, parts, other)
    data = bytearray(parts.bytes())
    if rng.random() < 0.08:
        rng.choice((_cut, _grow, _flip, _length))(rng, data)
    return bytes(data)


def _record(rng: random.Random, parts: Parts) -> dict[str, Any]:
    records = parts.manifest.get("tensors")
    found = [one for one in records.values() if isinstance(one, dict)] if isinstance(records, dict) else []
    return rng.choice(found) if found else {}


def _setting(rng: random.Random, parts: Parts, other: Parts) -> None:
    parts.manifest[rng.choice(list(parts.manifest) or ["seed"])] = copy.deepcopy(rng.choice(JUNK))


def _nested_setting(rng: random.Random, parts: Parts, other: Parts) -> None:
    inner = parts.manifest.get(rng.choice(("ratios", "tokenizer", "merged")))
    if isinstance(inner, dict) and inner:
        inner[rng.choice(list(inner))] = copy.deepcopy(rng.choice(JUNK))


def _missing_or_unknown(rng: random.Random, parts: Parts, other: Parts) -> None:
    place = rng.choice((parts.manifest, _record(rng, parts), parts.manifest.get("tensors")))
    if isinstance(place, dict) and place and rng.random() < 0.7:
        place.pop(rng.choice(list(place)))
    elif isinstance(place, dict):
        place["surprise"] = copy.deepcopy(rng.choice(JUNK))


def _version(rng: random.Random, parts: Parts, other: Parts) -> None:
    parts.manifest["format_version"] = rng.choice((0, 1, 2, 3, 99, 2**70, -1, 1.0, "2", True, [2], HUGE))


def _word(rng: random.Random, parts: Parts, other: Parts) -> None:
    """Another word that the format has."""
    record = _record(rng, parts)
    kinds = ("zero", "impart", "lowrank", "sparse", "signs", "raw", "rows")
    masks = (None, "seeded", "bitmask", "gap8")
    field, words = rng.choice((("kind", kinds), ("mask", masks), ("tied_to", (*parts.header, None))))
    record[field] = rng.choice(words)
    if rng.random() < 0.3:
        parts.manifest["mask"] = rng.choice(masks[1:])
    if rng.random() < 0.3:
        record["tied_to"] = rng.choice(list(parts.manifest["tensors"]))
    if rng.random() < 0.2:
        parts.manifest["value_dtype"] = rng.choice((None, "fp16", "bf16", "int8", "int4", "mixed"))


def _record_field(rng: random.Random, parts: Parts, other: Parts) -> None:
    record = _record(rng, parts)
    record[rng.choice(("kind", "shape", "rank", "tied_to", "mask", "bits", "sha256"))] = copy.deepcopy(rng.choice(JUNK))


def _shape(rng: random.Random, parts: Parts, other: Parts) -> None:
    record = _record(rng, parts)
    shape = record.get("shape")
    if not isinstance(shape, list) or not shape:
        return
    at = rng.randrange(len(shape))
    changed = [*shape[:at], rng.choice((*DIMENSIONS, shape[at])), *shape[at + 1 :]]
    record["shape"] = rng.choice((changed, changed, changed[::-1], [*changed, 1], changed[1:], [*changed, *changed]))


def _rank(rng: random.Random, parts: Parts, other: Parts) -> None:
    record = _record(rng, parts)
    rank = record.get("rank", 0)
    record["rank"] = rng.choice((*NUMBERS, rank + 1 if isinstance(rank, int) else 1, 2))


def _bits(rng: random.Random, parts: Parts, other: Parts) -> None:
    record = _record(rng, parts)
    bits = record.get("bits") or [[rng.choice((1, 2, 40, 48)), 4]]
    if not isinstance(bits, list) or not isinstance(bits[0], list) or len(bits[0]) != 2:
        return
    at, which = rng.randrange(len(bits)), rng.randrange(2)
    if isinstance(bits[at], list) and len(bits[at]) == 2:
        bits[at][which] = rng.choice((*NUMBERS, 4, 5, 1, 2, 3, 8))
    record["bits"] = rng.choice((bits, bits * 2, bits[1:], bits * 500, []))


def _names(rng: random.Random, parts: Parts, other: Parts) -> None:
    """A record under another name, with its arrays or without."""
    records = parts.manifest.get("tensors")
    if not isinstance(records, dict) or not records:
        return
    name = rng.choice(list(records))
    new = rng.choice(
        (f"{name}#0", f"{name}#1", "lm_head.weight", "model.embed_tokens.weight", "", "\ud800", "a::b", *records)
    )
    records[new] = records.pop(name) if rng.random() < 0.6 else copy.deepcopy(records[name])
    if rng.random() < 0.7:
        for key in [key for key in parts.arrays if key.startswith(f"{name}::")]:
            moved = f"{new}::{key.rpartition('::')[2]}"
            parts.arrays[moved], parts.header[moved] = parts.arrays.pop(key), parts.header.pop(key)


def _transplant(rng: random.Random, parts: Parts, other: Parts) -> None:
    """The record and the arrays of another file."""
    records, theirs = parts.manifest.get("tensors"), other.manifest["tensors"]
    if not isinstance(records, dict):
        return
    name = rng.choice(list(theirs))
    target = name if rng.random() < 0.7 or not records else rng.choice(list(records))
    records[target] = copy.deepcopy(theirs[name])
    for key in [key for key in parts.arrays if key.startswith(f"{target}::")]:
        del parts.arrays[key]
        parts.header.pop(key, None)
    for key in [key for key in other.arrays if key.startswith(f"{name}::")]:
        moved = f"{target}::{key.rpartition('::')[2]}"
        parts.arrays[moved], parts.header[moved] = bytearray(other.arrays[key]), copy.deepcopy(other.header[key])


def _entry(rng: random.Random, parts: Parts, other: Parts) -> None:
    """The header's word on an array."""
    if not parts.header:
        return
    key = rng.choice(list(parts.header))
    entry = parts.header[key]
    if rng.random() < 0.1 or not isinstance(entry, dict):
        parts.header[key] = copy.deepcopy(rng.choice(JUNK))
        return
    field = rng.choice(("dtype", "shape", "data_offsets"))
    if field == "dtype":
        entry[field] = rng.choice((*DTYPES, "F64", "I64", "BOOL", copy.deepcopy(rng.choice(JUNK))))
    elif field == "shape":
        shape = entry.get("shape")
        whole = shape if isinstance(shape, list) else []
        entry[field] = rng.choice(([*whole, 1], [1, *whole], whole[1:], [*whole, 0], copy.deepcopy(rng.choice(JUNK))))
    else:
        start, end = rng.choice(NUMBERS), rng.choice(NUMBERS)
        entry.update(
            data_offsets=rng.choice(([start, end], [0, end], [start], copy.deepcopy(rng.choice(JUNK)))), touched=True
        )


def _poke(rng: random.Random, parts: Parts, other: Parts) -> None:
    """Numbers of an array."""
    if not parts.arrays:
        return
    data = parts.arrays[rng.choice(list(parts.arrays))]
    for _ in range(rng.choice((1, 1, 2, 20))):
        if len(data) >= 4 and rng.random() < 0.7:
            at = 4 * rng.randrange(len(data) // 4)
            number = rng.choice(
                (0, 1, -1, 2, 5, 24, 47, 48, 49, 95, 96, 97, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000)
            )
            data[at : at + 4] = struct.pack("<i", number)
        elif data:
            data[rng.randrange(len(data))] = rng.randrange(256)


def _resize(rng: random.Random, parts: Parts, other: Parts) -> None:
    """More or fewer elements of an array, and a header that says so: counts that contradict what they count."""
    vectors = [key for key, entry in parts.header.items() if isinstance(entry, dict) and _is_vector(entry)]
    if not vectors:
        return
    key = rng.choice(vectors)
    data, size = parts.arrays.get(key), DTYPES[parts.header[key]["dtype"]].itemsize
    if data is None:
        return
    count = len(data) // size
    wanted = max(0, rng.choice((0, 1, count - 1, count + 1, count - 2, count // 2, 2 * count, count + 7)))
    parts.arrays[key] = (data * 3)[: wanted * size].ljust(wanted * size, b"\x01")
    parts.header[key]["shape"] = [wanted]


def _is_vector(entry: dict[str, Any]) -> bool:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    return isinstance(dtype, str) and dtype in DTYPES and isinstance(shape, list) and len(shape) == 1


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _grow(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.choice((1, 7, 8, 4096)))


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 4))):
        data[rng.randrange(rng.choice((16, 4096, len(data))) % len(data) or 1)] ^= 1 << rng.randrange(8)


def _length(rng: random.Random, data: bytearray) -> None:
    data[:8] = struct.pack(
        "<Q", rng.choice((0, 1, 2, 2**20, 2**26 + 1, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8))
    )


CHANGES: tuple[Change, ...] = (
    *(_setting, _nested_setting, _missing_or_unknown, _version, _word, _record_field, _shape, _shape, _rank, _bits),
    *(_names, _transplant, _transplant, _entry, _entry, _poke, _poke, _poke, _resize, _resize),
)
