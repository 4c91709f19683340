"""Delta files that cannot be trusted: each damage is found, named, and never crashes the reader."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressors.artifact import Artifact
from compressors.compress import compress
from compressors.errors import ArtifactError, BaseMismatchError, DeltaError, FormatVersionError, UnknownMethodError
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.impart import ImPartConfig
from compressors.verify import verify
from server.cli import main
from tests.compressors.conftest import LAYER, base_tensors, tuned_tensors

UP = f"{LAYER}.mlp.up_proj.weight"


@pytest.fixture
def delta(checkpoint, tmp_path):
    path = tmp_path / "delta.safetensors"
    config = ImPartConfig(ratio=4.0, value_dtype="fp16")
    compress(checkpoint("base", base_tensors()), checkpoint("tuned", tuned_tensors()), path, config)
    return path


def base_of(path):
    folder = path.parent / "base"
    return {"base_fingerprint": fingerprint(folder), "base_shapes": shapes(folder)}


def shapes(folder):
    return {name: tensor.shape for name, tensor in stored_tensors(folder).items()}


def rewrite(path, change_header=None, change_manifest=None, change_arrays=None):
    """The same file with its header, manifest or arrays changed and everything else kept consistent."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    manifest = json.loads(header["__metadata__"]["deltaworks"])
    if change_arrays:
        change_arrays(header, body, manifest)
    if change_manifest:
        change_manifest(manifest)
    header["__metadata__"]["deltaworks"] = json.dumps(manifest)
    if change_header:
        change_header(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def poke(key, values, dtype):
    """Overwrite the first elements of an array and mend its digest."""

    def change(header, body, manifest):
        import hashlib

        start, end = header[key]["data_offsets"]
        raw = np.array(values, dtype).tobytes()
        body[start : start + len(raw)] = raw
        name, _, array = key.rpartition("::")
        manifest["tensors"][name]["sha256"][array] = hashlib.sha256(body[start:end]).hexdigest()

    return change


def test_a_good_file_passes_every_check(delta):
    report = verify(delta, **base_of(delta))
    assert report.checks == ("structure", "method", "base", "shapes", "records", "digests", "finite")
    assert report.nbytes == delta.stat().st_size
    assert len(report.digest) == 64


def test_another_base_of_the_same_shapes_is_refused(delta, checkpoint):
    other = checkpoint("other", base_tensors(seed=9))
    assert shapes(other) == base_of(delta)["base_shapes"]
    with pytest.raises(BaseMismatchError, match="weights differ"):
        verify(delta, fingerprint(other), shapes(other))


def test_the_fingerprint_is_of_the_content(checkpoint):
    one, same = checkpoint("one", base_tensors()), checkpoint("same", base_tensors())
    changed = base_tensors()
    changed["model.norm.weight"][3] += 1e-3
    assert fingerprint(one) == fingerprint(same) != fingerprint(checkpoint("changed", changed))
    assert fingerprint(one) == fingerprint(one, cache=False)


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        ({"change_manifest": lambda m: m.update(method="magic")}, UnknownMethodError, "magic"),
        ({"change_manifest": lambda m: m.update(format_version=4)}, FormatVersionError, "upgrade"),
        ({"change_manifest": lambda m: m.update(format="other")}, ArtifactError, "format"),
        ({"change_manifest": lambda m: m.update(surprise=1)}, ArtifactError, "surprise"),
        ({"change_manifest": lambda m: m.pop("seed")}, ArtifactError, "seed"),
        ({"change_manifest": lambda m: m.update(mask="bitmask")}, ArtifactError, "mask"),
        ({"change_manifest": lambda m: m["tensors"][UP].update(rank=1)}, ArtifactError, "up_proj"),
        ({"change_manifest": lambda m: m["tensors"][UP].update(shape=[96, 47])}, DeltaError, "up_proj"),
        ({"change_manifest": lambda m: m["tensors"].pop(UP)}, ArtifactError, "up_proj"),
        ({"change_header": lambda h: h.pop(f"{UP}::coef")}, ArtifactError, "up_proj|offsets"),
        ({"change_header": lambda h: h[f"{UP}::coef"].update(dtype="F64")}, ArtifactError, "coef"),
        ({"change_header": lambda h: h[f"{UP}::coef"].update(data_offsets=[0, 4])}, ArtifactError, "coef"),
        ({"change_header": lambda h: h[f"{UP}::coef"].update(shape=[1 << 62, 1 << 62])}, ArtifactError, "coef"),
        ({"change_header": lambda h: h.pop("__metadata__")}, ArtifactError, "manifest"),
        ({"change_arrays": poke(f"{UP}::coef", [np.nan], np.float32)}, ArtifactError, "coef.*NaN"),
        ({"change_arrays": poke(f"{UP}::u_vals", [np.inf], np.float16)}, ArtifactError, "u_vals.*NaN or infinite"),
        ({"change_arrays": poke(f"{UP}::keep_u", [0], np.int32)}, ArtifactError, "keep_u"),
        ({"change_arrays": poke(f"{UP}::keep_v", [49], np.int32)}, ArtifactError, "keep_v"),
        ({"change_arrays": poke(f"{UP}::keep_v", [1], np.int32)}, ArtifactError, "v_vals"),
    ],
)
def test_r16_each_damage_has_its_error(delta, damage, error, word):
    rewrite(delta, **damage)
    with pytest.raises(error, match=word):
        verify(delta, **base_of(delta))


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "file"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="pickle"):
        verify(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match="pickle"):
        verify(path)
    for content in (b"", b"abc", b"\xff" * 64, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 5) + b"{{{{{"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            verify(path)


@pytest.mark.parametrize("first_byte", [0x80, ord("P")])
def test_a_header_whose_length_looks_like_a_pickle_is_read(delta, first_byte):
    """One header in 32 has a length that begins with the byte 0x80."""
    data = delta.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    padding = (first_byte - length) % 256
    padded = struct.pack("<Q", length + padding) + data[8 : 8 + length] + b" " * padding + data[8 + length :]
    delta.write_bytes(padded)
    with Artifact.open(delta) as artifact:
        assert UP in artifact.records


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_goes_unnoticed(delta, data):
    good = delta.read_bytes()
    damaged = bytearray(good)
    if data.draw(st.booleans(), label="cut"):
        damaged = damaged[: data.draw(st.integers(0, len(good) - 1), label="length")]
    else:
        # the header's first part is drawn more often than its share of the bytes
        limit = data.draw(st.sampled_from([64, 4096, len(good)]), label="limit")
        position = data.draw(st.integers(0, limit - 1), label="position")
        damaged[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    bad = delta.with_name("bad.safetensors")
    bad.write_bytes(bytes(damaged))
    with pytest.raises(DeltaError):
        verify(bad, **base_of(delta))


@pytest.mark.parametrize("field", ["seed", "ratio", "c"])
def test_a_changed_setting_breaks_the_seal(delta, field):
    data = delta.read_bytes()
    at = data.index(f'\\"{field}\\":'.encode()) + len(field) + 5
    changed = bytes([data[at] ^ 1])
    delta.write_bytes(data[:at] + changed + data[at + 1 :])
    with Artifact.open(delta) as artifact:  # still well-formed
        assert not artifact.sealed()
    with pytest.raises(ArtifactError, match="header does not match"):
        verify(delta)


def test_whitespace_after_the_header_is_sealed_too(delta):
    data = bytearray(delta.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if data[end - 1 : end] == b" ":
        data[end - 1] = ord("\n")
    else:
        data[8:end] = bytes(data[8 : end - 1]).replace(b'"__metadata__":', b'"__metadata__": ', 1)
        data[:8] = struct.pack("<Q", end - 8)
    delta.write_bytes(bytes(data))
    with pytest.raises(ArtifactError):
        verify(delta)


def test_the_commands(delta, tmp_path, capsys):
    base, out = str(tmp_path / "base"), tmp_path / "cli.safetensors"
    assert (
        main(
            [
                "delta",
                "compress",
                base,
                str(tmp_path / "tuned"),
                "-o",
                str(out),
                "--ratio",
                "4",
                "--value-dtype",
                "fp16",
            ]
        )
        == 0
    )
    assert out.read_bytes() == delta.read_bytes()
    assert "by surviving values" in capsys.readouterr().out
    assert main(["delta", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratios"]["values"] >= 4
    assert main(["delta", "verify", str(out), "--base", base]) == 0
    assert "ok: structure, method, base" in capsys.readouterr().out
    assert main(["delta", "decompress", str(out), "--base", base, "-o", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    capsys.readouterr()
    for command in (
        ["delta", "verify", str(tmp_path / "absent")],
        ["delta", "compress", base, str(tmp_path / "absent"), "-o", str(out)],
        ["delta", "compress", base, str(tmp_path / "tuned"), "-o", str(out), "--ratio", "0.1"],
        ["delta", "verify", str(out), "--base", str(tmp_path / "absent")],
    ):
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("error: ")
