"""Delta files that are made to hurt, sealed and with digests that fit: each is refused by name, and costs no more than its bytes.

The cases are what tests/fuzz found, and the list of damages that the reader must name.
"""

import json
import struct
import time
import tracemalloc

import pytest

from compressors.errors import ArtifactError, DeltaError, FormatVersionError
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.verify import verify
from server.cli import main
from tests.compressors.conftest import LAYER
from tests.fuzz.corpus import write_corpus
from tests.fuzz.mutation import HUGE, Parts

UP, EMBED = f"{LAYER}.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base, files = write_corpus(tmp_path_factory.mktemp("corpus"))
    told = fingerprint(base), {name: tensor.shape for name, tensor in stored_tensors(base).items()}
    return told, {file.name: file.read_bytes() for file in files}


@pytest.fixture
def refused(corpus, tmp_path):
    """refused(file, change): the error of that file after the change, having taken no more than it may."""

    def refuse(name, change, with_base=False):
        parts = Parts.of(corpus[1][name])
        change(parts)
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(parts.bytes())
        started = time.perf_counter()
        tracemalloc.start()
        try:
            with pytest.raises(DeltaError) as caught:
                verify(path, *(corpus[0] if with_base else ()))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 * path.stat().st_size + (1 << 20)
        assert time.perf_counter() - started < 5
        assert main(["delta", "inspect", str(path)]) == (0 if with_base and not _fails(path) else 1)
        str(caught.value).encode()
        return caught.value

    return refuse


def _fails(path):
    try:
        verify(path)
    except DeltaError:
        return True
    return False


def record(**fields):
    return lambda parts: parts.manifest["tensors"][UP].update(fields)


def entry(key, **fields):
    return lambda parts: parts.header[f"{UP}::{key}"].update(fields, touched="data_offsets" in fields)


def numbers(key, values, form="i", name=UP):
    def change(parts):
        data = struct.pack(f"<{len(values)}{form}", *values)
        parts.arrays[f"{name}::{key}"][: len(data)] = data

    return change


def replaced(key, values, form="i", name=UP):
    def change(parts):
        parts.arrays[f"{name}::{key}"] = bytearray(struct.pack(f"<{len(values)}{form}", *values))
        parts.header[f"{name}::{key}"]["shape"] = [len(values)]

    return change


def both(*changes):
    def change(parts):
        for one in changes:
            one(parts)

    return change


def test_the_corpus_is_good(corpus, tmp_path):
    told, files = corpus
    kinds = set()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        report = verify(tmp_path / name, *told)
        kinds |= {(one.kind, one.mask or report.manifest.mask) for one in report.manifest.tensors.values()}
    assert {kind for kind, _ in kinds} == {"zero", "impart", "lowrank", "sparse", "signs", "raw", "rows"}
    assert {mask for kind, mask in kinds if kind == "impart"} == {"seeded", "bitmask", "gap8"}


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        (
            "dare-int4",
            both(record(shape=[1, 2**31 - 1]), numbers("count", [2**31 - 1])),
            "count is 2147483647, but vals",
        ),
        ("dare-int4", both(record(shape=[2**31, 40]), numbers("count", [2**31 - 1])), "count is 2147483647, but vals"),
        ("impart-int4", record(shape=[2**63, 48]), "shape"),
        ("impart-int4", record(shape=[2] * 100_000), "shape"),
        ("impart-int4", record(shape=[-1, 48]), "shape"),
        ("impart-int4", record(shape=[96, HUGE]), "manifest"),
        ("impart-int4", record(rank=2**40), "rank"),
        ("impart-int4", record(rank=0), "rank"),
        ("impart-int4", record(bits=[[2**62, 4]]), "bits"),
        ("impart-int4", record(bits=[[1, 1]]), "bits"),
        ("impart-int4", record(mask="gap8"), "mask_u is missing"),
        ("impart-gap8", record(mask="seeded"), "mask_u belongs to no record"),
        ("dare-gap8", record(mask="bitmask"), "mask_u"),
        ("impart-int8", entry("u_vals", shape=[2] * 200_000), "u_vals"),
        ("impart-int8", entry("u_vals", shape=[2**62, 2**62, 2**62]), "u_vals"),
        ("impart-int8", entry("u_vals", shape=[HUGE]), "JSON"),
        ("impart-int8", entry("u_vals", dtype=["I8"]), "u_vals"),
        ("impart-int8", entry("u_vals", dtype={"I8": 1}), "u_vals"),
        ("impart-int8", entry("u_vals", data_offsets=[2**63, 2**63 + 8]), "u_vals"),
        ("impart-int8", entry("u_vals", data_offsets=[8]), "u_vals"),
        ("impart-int8", lambda parts: parts.header.update({"\ud800": parts.header[f"{UP}::coef"]}), "no text"),
        ("impart-int8", lambda parts: parts.manifest.update(ratio=float("nan")), "ratio"),
        ("impart-int8", lambda parts: parts.manifest["ratios"].update(values=float("inf")), "values"),
        ("impart-int8", lambda parts: parts.manifest.pop("seed"), "seed"),
        ("impart-int8", lambda parts: parts.manifest.update(seed=2**64), "seed"),
        ("impart-int8", lambda parts: parts.manifest.update(format_version=HUGE), "manifest"),
        ("impart-int8", record(sha256={"junk": ""}), "digest"),
        ("impart-int8", record(tied_to=EMBED), "tied"),
        ("impart-int8", record(tied_to=UP, kind="zero"), "belongs to no record"),
        ("bitdelta", record(shape=[97, 48]), "signs"),
        ("whole-rank", record(rank=96), "rank"),
    ],
)
def test_what_a_header_claims(refused, file, change, word):
    error = refused(file, change)
    assert word in str(error)
    assert isinstance(error, ArtifactError)


def test_a_newer_format_is_told_apart(refused):
    error = refused("impart-int8", lambda parts: parts.manifest.update(format_version=2**70))
    assert isinstance(error, FormatVersionError)
    assert "upgrade deltaworks" in str(error)


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ([5, 6, 7, 7], "rise strictly"),
        ([-1, 6, 7, 8], "rise strictly"),
        ([0, 2**31 - 1, -(2**31), -1, 40, 41], "rise strictly"),  # the differences of 32 bits wrap to positive ones
        ([5, 6, 7, 42], "rise strictly"),
        ([], "row_delta"),
    ],
)
def test_numbers_of_rows(refused, index, word):
    def change(parts):
        replaced("row_idx", index, name=EMBED)(parts)
        for key, size in (("row_delta", 48), ("row_scale", 4)):
            if index:
                data = parts.arrays[f"{EMBED}::{key}"]
                parts.arrays[f"{EMBED}::{key}"] = data[:size] * len(index)
                parts.header[f"{EMBED}::{key}"]["shape"][0] = len(index)

    assert word in str(refused("impart-int8", change))


def test_a_number_is_no_row_of_numbers(refused):
    def change(parts):
        replaced("row_idx", [5], name=EMBED)(parts)
        parts.header[f"{EMBED}::row_idx"]["shape"] = []

    assert "row_idx" in str(refused("impart-int8", change))


def test_added_rows_must_be_there(refused):
    def change(parts):
        parts.manifest["tensors"][EMBED]["shape"][0] = 2**31

    error = refused("impart-int8", change, with_base=True)
    assert "adds 2147483608 rows to the base's 40, but holds 2" in str(error)


def test_rows_are_of_a_vocabulary(refused):
    def change(parts):
        parts.manifest["tensors"][UP] = {"kind": "rows", "shape": [96, 48], "sha256": {}}
        for key in [key for key in parts.arrays if key.startswith(f"{UP}::")]:
            del parts.arrays[key], parts.header[key]
        for key in ("row_idx", "row_delta", "row_scale"):
            parts.arrays[f"{UP}::{key}"] = parts.arrays[f"{EMBED}::{key}"]
            parts.header[f"{UP}::{key}"] = dict(parts.header[f"{EMBED}::{key}"])
            parts.manifest["tensors"][UP]["sha256"][key] = ""

    assert "up_proj.weight: a record of kind rows is a vocabulary table" in str(refused("impart-int8", change))


@pytest.mark.parametrize("target", ["lm_head.weight", "absent", UP])
def test_ties_lead_to_a_table(refused, target):
    def change(parts):
        table = {"kind": "zero", "shape": [42, 48], "tied_to": target}
        parts.manifest["tensors"]["lm_head.weight"] = table

    assert f"lm_head.weight is tied to {target!r}" in str(refused("impart-int8", change))


def test_packed_values_of_odd_counts(refused):
    """The nibble behind an odd number of values, and one value more or less than is kept."""

    def filled(parts):
        kept = struct.unpack(f"<{parts.header[f'{UP}::keep_u']['shape'][0]}i", parts.arrays[f"{UP}::keep_u"])
        data = parts.arrays[f"{UP}::u_vals"]
        parts.arrays[f"{UP}::keep_u"][:4] = struct.pack("<i", kept[0] - 1 if sum(kept) % 2 == 0 else kept[0])
        data[-1] |= 0x70

    assert "padding" in str(refused("impart-int4", filled))

    def shortened(parts):
        del parts.arrays[f"{UP}::u_vals"][-1:]
        parts.header[f"{UP}::u_vals"]["shape"][0] -= 1

    assert "u_vals" in str(refused("impart-int4", shortened))
    assert "u_vals" in str(refused("impart-qt", shortened))


def test_nested_json_is_no_crash(corpus, tmp_path):
    path = tmp_path / "deep.safetensors"
    for text in (b'{"a":' * 100_000, json.dumps({"__metadata__": {"deltaworks": "[" * 100_000}}).encode()):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(ArtifactError, match="not JSON"):
            verify(path)
