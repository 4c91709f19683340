"""Merged deltas: Task Arithmetic means the weighted sum of its parts whatever they are stored as, TIES what the paper says."""

import json

import numpy as np
import pytest
import torch

from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig
from compressors.compress import compress
from compressors.decompress import decompress, delta_tensor
from compressors.errors import ArtifactError, BaseMismatchError, BudgetError
from compressors.execution import Shard, sparse_factor
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.impart import ImPartConfig
from compressors.inspect import summary, text
from compressors.merge import MergeConfig, merge
from compressors.peft import import_lora
from compressors.tensors import Checkpoint
from compressors.ties import ties, trim
from compressors.verify import verify
from server.cli import main
from tests.compressors.conftest import LAYER, base_tensors, tuned_tensors
from tests.compressors.lora_folder import pair, write_lora

Q, K = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"
UP, DOWN = f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.down_proj.weight"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"

CONFIGS = {
    "impart-int8": ImPartConfig(ratio=4.0),
    "impart-seed": ImPartConfig(ratio=4.0, seed=5),
    "impart-fp16": ImPartConfig(ratio=4.0, value_dtype="fp16"),
    "impart-bf16": ImPartConfig(ratio=4.0, value_dtype="bf16", seed=1),
    "impart-int4": ImPartConfig(ratio=4.0, value_dtype="int4"),
    "lowrank": LowRankConfig(ratio=4.0, value_dtype="fp16"),
    "dare": DareConfig(ratio=4.0),
    "dare-int4": DareConfig(ratio=4.0, value_dtype="int4", seed=2),
    "bitdelta": BitDeltaConfig(),
    "bitdelta-rows": BitDeltaConfig(per_row=True),
}


@pytest.fixture
def base(checkpoint):
    return checkpoint("base", base_tensors())


@pytest.fixture
def make(base, checkpoint, tmp_path):
    """Writes a delta: make("impart-int8", seed) with every kind of parameter changed, other rows for other seeds."""

    def make(label, seed=1, **config):
        tensors = tuned_tensors(seed)
        start = seed % 4 * 7
        tensors[EMBED] = tensors[EMBED].clone()
        tensors[EMBED][start : start + 10] += 0.1 * torch.randn(10, 48, generator=torch.manual_seed(seed))
        tensors[NORM] = tensors[NORM] + 0.01 * torch.randn(48, generator=torch.manual_seed(seed + 50))
        path = tmp_path / f"{label}-{seed}.safetensors"
        compress(base, checkpoint(f"{label}-{seed}", tensors, **config), path, CONFIGS[label])
        return path

    return make


@pytest.fixture
def lora(base, tmp_path):
    tensors = {}
    for i, (name, shape) in enumerate(((Q, (48, 48)), (UP, (96, 48)))):
        a, b = pair(shape, 4, i)
        tensors |= {
            f"{name.removesuffix('.weight')}.lora_A.weight": a,
            f"{name.removesuffix('.weight')}.lora_B.weight": b,
        }
    path = tmp_path / "lora.safetensors"
    import_lora(write_lora(tmp_path / "lora", tensors), base, path)
    return path


def dense(path):
    with Artifact.open(path) as artifact:
        return {name: delta_tensor(artifact, name) for name in artifact.records}


def kinds(path):
    with Artifact.open(path) as artifact:
        return {name: record.kind for name, record in artifact.records.items()}


def assert_sum(out, paths, weights):
    """Every tensor of `out` is the weighted sum of the parts', to fp32 rounding."""
    parts = [dense(path) for path in paths]
    for name, found in dense(out).items():
        expected = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def check(out, base):
    shapes = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
    return verify(out, fingerprint(base), shapes)


@pytest.mark.parametrize("other", [*CONFIGS, "lora", "merged"])
@pytest.mark.parametrize("first", ["impart-int8", "impart-bf16", "bitdelta-rows"])
def test_task_arithmetic_is_the_weighted_sum_whatever_the_methods(first, other, make, base, lora, tmp_path):
    one, out = make(first), tmp_path / "out.safetensors"
    if other == "merged":
        two = tmp_path / "two.safetensors"
        merge([make("impart-int4", 3), make("dare", 2)], base, two, MergeConfig())
    else:
        two = lora if other == "lora" else make(other, 2)
    merge([one, two], base, out, MergeConfig(weights=(0.7, -1.5), scale=0.5))
    check(out, base)
    assert_sum(out, [one, two], (0.35, -0.75))


def test_three_parts_of_one_seed_stay_integers_and_small(make, base, tmp_path):
    paths, out = [make("impart-int4", seed) for seed in (1, 2, 3)], tmp_path / "out.safetensors"
    manifest = merge(paths, base, out, MergeConfig(dense_dtype="fp32"))
    assert_sum(out, paths, (1, 1, 1))
    with Artifact.open(out) as artifact:
        record = artifact.records[UP]
        assert (record.kind, {width for _, width in record.bits}) == ("impart", {4})
        assert artifact.array(f"{UP}::u_vals").dtype == np.uint8
    assert [part.weight for part in manifest.merged.parts] == [1, 1, 1]
    assert manifest.merged.parts[0].sha256 == verify(paths[0]).digest


def test_one_delta_alone_keeps_its_form(make, base, tmp_path):
    """Also its seeded masks: nothing is written out."""
    for label in ("impart-int8", "dare-int4", "bitdelta"):
        path, out = make(label), tmp_path / f"half-{label}.safetensors"
        merge([path], base, out, MergeConfig(scale=0.5))
        check(out, base)
        assert kinds(out) == kinds(path)
        assert_sum(out, [path], (0.5,))
        assert abs(out.stat().st_size - path.stat().st_size) < 1000


def test_a_weight_of_zero_and_cancelling_weights_leave_nothing(make, base, tmp_path):
    one, out = make("impart-int8"), tmp_path / "out.safetensors"
    merge([one, make("dare", 2)], base, out, MergeConfig(weights=(1, 0)))
    assert_sum(out, [one], (1,))
    merge([one, make("dare", 3)], base, out, MergeConfig(weights=(0, 0)))
    assert set(kinds(out).values()) == {"zero"}
    check(out, base)


def test_dense_where_that_is_smaller(make, base, tmp_path):
    paths, out = [make("bitdelta", seed) for seed in (1, 2, 3, 4, 5, 6, 7, 8, 9)], tmp_path / "out.safetensors"
    merge(paths, base, out, MergeConfig(dense_dtype="fp16"))
    check(out, base)
    assert kinds(out)[UP] == "raw"
    parts = [dense(path)[UP] for path in paths]
    torch.testing.assert_close(dense(out)[UP], sum(parts), rtol=1e-3, atol=1e-4)


def test_served_form_means_what_the_file_means(make, base, tmp_path):
    paths, out = [make("impart-int8"), make("dare", 2), make("bitdelta-rows", 3)], tmp_path / "out.safetensors"
    merge(paths, base, out, MergeConfig())
    with Artifact.open(out) as artifact:
        for name in (Q, UP, DOWN):
            m, n = artifact.records[name].shape
            factor = sparse_factor(artifact, name, Shard((0, m), (0, n)))
            u, v = (matrix(factor, side, size) for side, size in (("u", m), ("v", n)))
            torch.testing.assert_close(
                (u * torch.from_numpy(factor.coef.copy())) @ v.T, delta_tensor(artifact, name), rtol=1e-5, atol=1e-6
            )


def matrix(factor, side, rows):
    entries, start = getattr(factor, f"{side}_entries"), getattr(factor, f"{side}_start")
    found = torch.zeros(rows, factor.rank)
    column = np.repeat(np.arange(factor.rank), np.diff(start))
    if factor.packed:
        row, value = (entries & 0xFFFF).astype(np.int64), (entries & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        row, value = entries["row"].astype(np.int64), entries["value"].copy()
    found[row, column] = torch.from_numpy(value)
    return found


def test_decompressed_it_is_the_base_and_the_sum(make, base, tmp_path):
    paths, out = [make("impart-int8"), make("lowrank", 2)], tmp_path / "out.safetensors"
    merge(paths, base, out, MergeConfig(weights=(0.5, 0.5)))
    decompress(out, base, tmp_path / "model", "fp32")
    parts = [dense(path) for path in paths]
    with Checkpoint(base) as old, Checkpoint(tmp_path / "model") as new:
        for name in old.names:
            expected = old.floats(name) + sum(0.5 * part[name] for part in parts)
            torch.testing.assert_close(new.floats(name), expected, rtol=1e-5, atol=1e-5)
    with Artifact.open(out) as artifact:
        assert "method ta" in text(summary(artifact))


def test_rows_apart_stay_integers_and_shared_rows_add(make, base, tmp_path):
    one, two, apart, shared = make("dare", 1), make("dare", 3), tmp_path / "apart", tmp_path / "shared"
    merge([one, two], base, apart, MergeConfig(weights=(2, 1)))
    with Artifact.open(apart) as artifact:
        assert artifact.array(f"{EMBED}::row_delta").dtype == np.int8
        assert list(artifact.array(f"{EMBED}::row_idx")) == [*range(7, 17), *range(21, 31)]
    assert_sum(apart, [one, two], (2, 1))
    merge([one, make("dare", 2)], base, shared, MergeConfig())
    with Artifact.open(shared) as artifact:
        assert artifact.array(f"{EMBED}::row_delta").shape == (17, 48)


# TIES


def reference(deltas, weights, retain, scale):
    """Entry by entry, as section 4 of the paper."""
    trimmed = []
    for delta, weight in zip(deltas, weights, strict=True):
        order = delta.abs().reshape(-1).argsort(descending=True)
        kept = torch.zeros(delta.numel())
        kept[order[: max(1, round(retain * delta.numel()))]] = 1
        trimmed.append(weight * delta * kept.reshape(delta.shape))
    merged = torch.zeros_like(deltas[0])
    for at in np.ndindex(*merged.shape):
        entries = [float(entry[at]) for entry in trimmed]
        sign = np.sign(sum(entries))
        agreeing = [(entry, abs(w)) for entry, w in zip(entries, weights, strict=True) if entry * sign > 0]
        if agreeing:
            merged[at] = scale * sum(e for e, _ in agreeing) / sum(w for _, w in agreeing)
    return merged


@pytest.mark.parametrize("weights", [(1, 1), (0.2, 1.5), (1, -1)])
@pytest.mark.parametrize("retain", [0.2, 0.6, 1.0])
def test_ties_is_the_papers(make, base, tmp_path, weights, retain):
    paths, out = [make("impart-int8"), make("impart-fp16", 2)], tmp_path / "out.safetensors"
    merge(
        paths,
        base,
        out,
        MergeConfig(method="ties", weights=weights, scale=0.8, retain=retain, dense_dtype="fp32", rows_dtype="fp32"),
    )
    check(out, base)
    one, two = (dense(path) for path in paths)
    for name, found in dense(out).items():
        expected = reference([one[name], two[name]], weights, retain, 0.8)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_trimming_keeps_equal_magnitudes_and_whole_tensors():
    delta = torch.tensor([[3.0, -1.0], [1.0, 0.5]])
    assert trim(delta, 2).tolist() == [[3.0, -1.0], [1.0, 0.0]]
    assert trim(delta, 4) is delta
    assert ties(lambda: [(delta, 1.0), (-delta, 1.0)], 1.0, 4).tolist() == [[0, 0], [0, 0]]


def test_merged_projections_can_be_compressed_anew(make, base, tmp_path):
    paths = [make("impart-int8"), make("dare", 2)]
    for method in ("ta", "ties"):
        out = tmp_path / f"{method}.safetensors"
        config = MergeConfig(method=method, recompress=ImPartConfig(bytes_ratio=2.0, value_dtype="int8", seed=3))
        manifest = merge(paths, base, out, config)
        check(out, base)
        assert (manifest.method, manifest.bytes_ratio, manifest.seed) == ("impart", 2.0, 3)
        assert manifest.merged.method == method
        assert kinds(out)[UP] == "impart"


# What is refused


def test_numbers_that_are_none(make, base, tmp_path):
    for fields, flag in (
        ({"weights": (float("nan"),)}, "--weights"),
        ({"weights": (1.0, float("inf"))}, "--weights"),
        ({"scale": float("nan")}, "--scale"),
        ({"method": "ties", "retain": 0.0}, "--retain"),
        ({"method": "ties", "retain": 1.5}, "--retain"),
        ({"retain": 0.5}, "--retain"),
        ({"method": "slerp"}, "--method"),
        ({"dense_dtype": "int8"}, "--dense-dtype"),
        ({"rows_dtype": "bf16"}, "--rows-dtype"),
        ({"dense_dtype": "fp16", "recompress": ImPartConfig()}, "--dense-dtype"),
    ):
        with pytest.raises(BudgetError, match=flag):
            MergeConfig(**fields)
    out = tmp_path / "out.safetensors"
    with pytest.raises(BudgetError, match="2 numbers for 1 deltas"):
        merge([make("dare")], base, out, MergeConfig(weights=(1, 1)))
    assert not out.exists()


def test_another_base_is_named_with_the_file(make, base, checkpoint, tmp_path):
    mine, other_base = make("dare"), checkpoint("other", base_tensors(9))
    theirs, out = tmp_path / "theirs.safetensors", tmp_path / "out.safetensors"
    compress(other_base, checkpoint("their-tune", tuned_tensors(4)), theirs, DareConfig(ratio=4.0))
    with pytest.raises(BaseMismatchError, match=r"theirs\.safetensors.*--base"):
        merge([mine, theirs], base, out, MergeConfig())
    assert not out.exists()


def test_a_damaged_file_is_named(make, base, tmp_path):
    good, bad, out = make("dare"), tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    content = bytearray(good.read_bytes())
    content[-5] ^= 1
    bad.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: .* do not match their digest"):
        merge([good, bad], base, out, MergeConfig())
    assert not out.exists()


def test_out_that_is_an_input_is_refused(make, base):
    path = make("dare")
    before = path.read_bytes()
    with pytest.raises(BudgetError, match=r"-o .* is one of the deltas"):
        merge([path], base, path, MergeConfig())
    assert path.read_bytes() == before


def test_vocabularies_of_different_sizes_are_refused(make, base, checkpoint, tmp_path):
    grown = base_tensors()
    grown[EMBED] = torch.cat([grown[EMBED], torch.ones(2, 48)])
    path, out = tmp_path / "grown.safetensors", tmp_path / "out.safetensors"
    compress(base, checkpoint("grown", grown), path, DareConfig(ratio=4.0))
    with pytest.raises(ArtifactError, match=r"embed_tokens.*grown\.safetensors.*different sizes"):
        merge([make("dare"), path], base, out, MergeConfig())
    assert not out.exists()
    merge([path, path], base, out, MergeConfig(weights=(0.5, 0.5)))  # the same added tokens: rows of both, summed
    check(out, base)
    assert_sum(out, [path], (1,))


def test_tokenizers_must_agree_or_one_is_chosen(make, base, tmp_path, checkpoint):
    def tuned(label, seed, template=None, **config):
        path = make(label, seed, **config)
        if template is not None:
            (tmp_path / f"{label}-{seed}" / "chat_template.jinja").write_text(template)
            compress(base, tmp_path / f"{label}-{seed}", path, CONFIGS[label])
        return path

    plain, red, same = tuned("dare", 1), tuned("dare", 2, "red", eos_token_id=7), tuned("dare", 3, "red")
    blue, ends = tuned("dare", 4, "blue"), tuned("dare", 5, eos_token_id=[8, 7])
    out = tmp_path / "out.safetensors"
    told = merge([plain, red, same], base, out, MergeConfig()).tokenizer
    assert (told.chat_template, told.eos_token_id) == ("red", 7)
    check(out, base)
    for paths, what in (([red, blue], "chat template"), ([red, ends], "set of end tokens")):
        with pytest.raises(BudgetError, match=f"{paths[0].name} and .*{paths[1].name}.*{what}.*--tokenizer-of"):
            merge(paths, base, tmp_path / "none.safetensors", MergeConfig())
    assert not (tmp_path / "none.safetensors").exists()
    assert merge([red, blue], base, out, MergeConfig(), tokenizer_of=blue).tokenizer.chat_template == "blue"
    with pytest.raises(BudgetError, match=r"--tokenizer-of .*none of the deltas"):
        merge([red, plain], base, out, MergeConfig(), tokenizer_of=blue)


def test_the_command(make, base, tmp_path, capsys):
    one, two, out = make("impart-int8"), make("dare", 2), tmp_path / "cli.safetensors"
    command = ["delta", "merge", str(one), str(two), "--base", str(base)]
    assert main([*command, "-o", str(out), "--weights=-1,0.5", "--scale", "0.5"]) == 0
    assert "method ta" in capsys.readouterr().out
    assert_sum(out, [one, two], (-0.5, 0.25))
    anew = [*command, "-o", str(out), "--method", "ties", "--compress", "impart", "--bytes-ratio", "4"]
    assert main(anew) == 0
    capsys.readouterr()
    assert main(["delta", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"]["retain"] == 0.6
    absent = tmp_path / "absent.safetensors"
    for flags, told in (
        (["--weights", "1,x"], "--weights"),
        (["--weights", "1"], "--weights"),
        (["--weights", "nan,1"], "--weights"),
        (["--bytes-ratio", "8"], "--compress"),
        (["--compress", "bitdelta", "--bytes-ratio", "8"], "--bytes-ratio"),
        (["--compress", "impart", "--dense-dtype", "fp16"], "--dense-dtype"),
        (["--tokenizer-of", str(absent)], "--tokenizer-of"),
    ):
        assert main([*command, "-o", str(absent), *flags]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert told in error
    assert not absent.exists()
    with pytest.raises(SystemExit):
        main([*command, "-o", str(absent), "--shrink"])
