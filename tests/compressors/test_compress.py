"""From two folders to one file and back: what is stored for every kind of parameter, and what it means."""

import hashlib

import numpy as np
import pytest
import torch

from compressors.artifact import Artifact
from compressors.compress import compress
from compressors.decompress import decompress, delta_tensor
from compressors.encode import encode_rows
from compressors.errors import BaseMismatchError, BudgetError, CheckpointError
from compressors.impart import ImPartConfig, drop_ratios, sparsify
from compressors.inspect import summary
from compressors.spectrum import decompose
from compressors.tensors import Checkpoint
from compressors.values import value_form
from compressors.verify import verify
from tests.compressors.conftest import LAYER, base_tensors, tuned_tensors

Q, UP = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.up_proj.weight"
RATIO_4 = ImPartConfig(ratio=4.0)


@pytest.fixture
def pair(checkpoint):
    return checkpoint("base", base_tensors()), checkpoint("tuned", tuned_tensors())


def test_the_estimate_is_unbiased_and_its_error_is_the_closed_form():
    delta = tuned_tensors()[UP] - base_tensors()[UP]
    spectrum = decompose(delta)
    drops = drop_ratios(spectrum.s, tuple(delta.shape), 8.0, 0.3, 1.0, "exact")
    rank = sum(drop < 1 for drop in drops)
    leading = spectrum.leading(rank)
    truncated = (leading.u * leading.s) @ leading.vt
    total, errors, runs = torch.zeros_like(delta), [], 400
    for seed in range(runs):
        factors = sparsify(spectrum, drops, UP, seed, value_form("fp16"))
        estimate = dense(factors, delta.shape, seed)
        total += estimate
        errors.append(((estimate - truncated) ** 2).sum().item())
    keep_u, keep_v = factors.keep_u.astype(float), factors.keep_v.astype(float)
    m, n = delta.shape
    variance = leading.s.numpy() ** 2 * (m / keep_u * n / keep_v - 1)
    assert np.mean(errors) == pytest.approx(variance.sum(), rel=0.02)
    assert ((total / runs - truncated).norm() ** 2).item() == pytest.approx(variance.sum() / runs, rel=0.25)


def dense(factors, shape, seed):
    from compressors.masks import factor_rows, layer_seed

    sides = []
    for f, (keep, values) in enumerate(((factors.keep_u, factors.u_vals), (factors.keep_v, factors.v_vals))):
        side = torch.zeros(shape[f], len(keep))
        rows = factor_rows(layer_seed(seed, UP), f, shape[f], keep)
        side[rows, np.repeat(np.arange(len(keep)), keep)] = torch.from_numpy(values.astype(np.float32))
        sides.append(side)
    return (sides[0] * torch.from_numpy(factors.coef)) @ sides[1].T


@pytest.mark.parametrize(("value_dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3), ("int8", 1.2e-2)])
def test_value_dtypes_agree_with_full_precision(pair, tmp_path, value_dtype, tolerance):
    """At ratio 1 nothing is dropped, so only the values' rounding is left."""
    base, tuned = pair
    compress(base, tuned, tmp_path / "d.safetensors", ImPartConfig(ratio=2.0, beta=0.0, c=0.0, value_dtype=value_dtype))
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        rank = artifact.records[Q].rank
        leading = decompose(tuned_tensors()[Q] - base_tensors()[Q]).leading(rank)
        truncated = (leading.u * leading.s) @ leading.vt
        assert rank == 12
        assert (delta_tensor(artifact, Q) - truncated).norm() < tolerance * truncated.norm()


def test_same_inputs_give_the_same_bytes_and_another_seed_does_not(pair, tmp_path):
    base, tuned = pair
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        compress(base, tuned, tmp_path / f"{i}.safetensors", ImPartConfig(ratio=4.0, seed=seed))
        digests.append(hashlib.sha256((tmp_path / f"{i}.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert not list(tmp_path.glob(".*"))


def test_the_number_of_threads_does_not_change_the_bytes(pair, tmp_path):
    base, tuned = pair
    threads, contents = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            compress(base, tuned, tmp_path / "d.safetensors", RATIO_4)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        contents.append((tmp_path / "d.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_the_released_rules_are_chosen_by_projection(pair, tmp_path):
    base, tuned = pair
    config = ImPartConfig(ratio=4.0, beta=0.3, rule="released")
    compress(base, tuned, tmp_path / "d.safetensors", config)
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        for name, rule in ((Q, "attention"), (UP, "mlp")):
            sigma = decompose(tuned_tensors()[name] - base_tensors()[name]).s
            drops = drop_ratios(sigma, artifact.records[name].shape, 4.0, 0.3, 1.0, rule)
            assert artifact.records[name].rank == sum(drop < 1 for drop in drops)
    with pytest.raises(BudgetError, match="rule"):
        ImPartConfig(rule="attention")


def test_a_failed_write_leaves_the_old_file_and_no_other(pair, tmp_path):
    base, tuned = pair
    path = tmp_path / "d.safetensors"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(OSError, match=r"d\.safetensors"):
        compress(base, tuned, path, RATIO_4)
    assert (path / "kept").is_file()
    assert not list(tmp_path.glob(".*"))


def test_the_three_ratios_are_recounted_from_the_file(pair, tmp_path):
    base, tuned = pair
    manifest = compress(base, tuned, tmp_path / "d.safetensors", RATIO_4)
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        found = summary(artifact)
        stored = sum(artifact.array(key).size for key in artifact.slots if key.endswith("_vals"))
    projections = 48 * 48 + 24 * 48 + 2 * 96 * 48
    assert found["ratios"] == manifest.ratios.model_dump()
    assert found["ratios"]["values"] == pytest.approx(projections / stored, abs=0.01)
    assert found["ratios"]["values"] >= 4.0
    parameters = sum(tensor.numel() for tensor in base_tensors().values())
    assert found["ratios"]["whole_file"] == pytest.approx(2 * parameters / found["bytes"], abs=0.01)


def test_decompress_writes_base_plus_delta(pair, tmp_path):
    base, tuned = pair
    compress(base, tuned, tmp_path / "d.safetensors", RATIO_4)
    decompress(tmp_path / "d.safetensors", base, tmp_path / "merged", dtype="fp32")
    with Artifact.open(tmp_path / "d.safetensors") as artifact, Checkpoint(tmp_path / "merged") as merged:
        for name, weight in base_tensors().items():
            torch.testing.assert_close(merged.tensor(name), weight + delta_tensor(artifact, name))
    with pytest.raises(FileExistsError):
        decompress(tmp_path / "d.safetensors", base, tmp_path / "merged")


def test_decompress_refuses_another_base(pair, checkpoint, tmp_path):
    base, tuned = pair
    compress(base, tuned, tmp_path / "d.safetensors", RATIO_4)
    other = checkpoint("other", base_tensors(seed=9))
    with pytest.raises(BaseMismatchError):
        decompress(tmp_path / "d.safetensors", other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def stored_kinds(base, tuned, tmp_path, config=RATIO_4):
    compress(base, tuned, tmp_path / "d.safetensors", config)
    verify(tmp_path / "d.safetensors")
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        return {name: record.kind for name, record in artifact.records.items()}


def test_equal_parameters_store_nothing(checkpoint, tmp_path):
    base = checkpoint("base", base_tensors())
    kinds = stored_kinds(base, checkpoint("same", base_tensors()), tmp_path)
    assert set(kinds.values()) == {"zero"}


def test_a_low_rank_delta_is_kept_whole(checkpoint, tmp_path):
    tuned = base_tensors()
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(96, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    tuned[UP] = tuned[UP] + change
    kinds = stored_kinds(checkpoint("base", base_tensors()), checkpoint("lora", tuned), tmp_path)
    assert kinds[UP] == "lowrank"
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.records[UP].rank == 2
        torch.testing.assert_close(delta_tensor(artifact, UP), change, rtol=1e-4, atol=1e-4)


def test_norms_are_stored_whole_and_embeddings_by_changed_row(checkpoint, tmp_path):
    tuned = tuned_tensors()
    tuned["model.norm.weight"] = torch.full((48,), 1.25)
    tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], torch.ones(2, 48)])
    tuned["model.embed_tokens.weight"][7] += 0.5
    kinds = stored_kinds(checkpoint("base", base_tensors()), checkpoint("grown", tuned, vocab_size=42), tmp_path)
    assert kinds["model.norm.weight"] == "raw"
    assert kinds["model.embed_tokens.weight"] == "rows"
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.array("model.embed_tokens.weight::row_idx").tolist() == [7, 40, 41]
        rows = delta_tensor(artifact, "model.embed_tokens.weight")[[7, 40, 41]]
        assert torch.allclose(rows, torch.tensor([[0.5], [1.0], [1.0]]).expand(3, 48), atol=1e-6)
        assert delta_tensor(artifact, "model.norm.weight").tolist() == [0.25] * 48
        assert artifact.manifest.tokenizer.vocab_size == 42
    decompress(tmp_path / "d.safetensors", tmp_path / "base", tmp_path / "merged", dtype="fp32")
    with Checkpoint(tmp_path / "merged") as merged:
        torch.testing.assert_close(
            merged.tensor("model.embed_tokens.weight"), tuned["model.embed_tokens.weight"], rtol=1e-3, atol=1e-3
        )
        assert merged.config["vocab_size"] == 42
        assert merged.config["torch_dtype"] == "float32"


def test_new_rows_of_zeros_still_grow_the_table(checkpoint, tmp_path):
    tuned = base_tensors()
    tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], torch.zeros(3, 48)])
    base = checkpoint("base", base_tensors())
    assert stored_kinds(base, checkpoint("grown", tuned), tmp_path)["model.embed_tokens.weight"] == "rows"
    decompress(tmp_path / "d.safetensors", base, tmp_path / "merged", dtype="fp32")
    with Checkpoint(tmp_path / "merged") as merged:
        assert torch.equal(merged.tensor("model.embed_tokens.weight"), tuned["model.embed_tokens.weight"])


def test_a_tied_head_is_stored_once(checkpoint, tmp_path):
    tuned = tuned_tensors()
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    base = checkpoint("base", base_tensors())
    compress(base, checkpoint("tied", tuned), tmp_path / "d.safetensors", RATIO_4)
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.records["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert verify(tmp_path / "d.safetensors", base_shapes={name: t.shape for name, t in base_tensors().items()})
    tuned["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        compress(base, checkpoint("untied", tuned), tmp_path / "e.safetensors", RATIO_4)


def test_a_head_that_both_store_is_counted_once_while_it_repeats_the_embedding(checkpoint, tmp_path):
    def with_head(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    before, after = with_head(base_tensors()), with_head(tuned_tensors())
    base, path = checkpoint("base", before), tmp_path / "d.safetensors"
    once = compress(checkpoint("plain", base_tensors()), checkpoint("tuned", tuned_tensors()), path, RATIO_4)
    twice = compress(base, checkpoint("tuned-head", after), path, RATIO_4)
    assert twice.tensors["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert twice.ratios.whole_file == pytest.approx(once.ratios.whole_file, rel=0.02)
    decompress(path, base, tmp_path / "merged", dtype="fp32")
    with Checkpoint(tmp_path / "merged") as merged:
        assert torch.equal(merged.tensor("lm_head.weight"), merged.tensor("model.embed_tokens.weight"))
    after["lm_head.weight"][3] += 1
    untied = compress(base, checkpoint("untied", after), path, RATIO_4)
    assert untied.tensors["lm_head.weight"].kind == "rows"
    del after["lm_head.weight"]
    before["lm_head.weight"][3] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*fine-tune ties"):
        compress(checkpoint("untied-base", before), checkpoint("no-head", after), path, RATIO_4)


def test_widening_the_number_format_is_no_change_and_narrowing_it_is_refused(checkpoint, tmp_path):
    short = {name: tensor.bfloat16() for name, tensor in base_tensors().items()}
    wide = {name: tensor.float() for name, tensor in short.items()}
    kinds = stored_kinds(checkpoint("base", short), checkpoint("wide", wide), tmp_path)
    assert set(kinds.values()) == {"zero"}
    with pytest.raises(CheckpointError, match="dtype BF16 in the fine-tune and F32"):
        compress(checkpoint("base-wide", wide), checkpoint("short", short), tmp_path / "e.safetensors", RATIO_4)


def test_small_parameters_are_fp16_where_that_loses_nothing(checkpoint, tmp_path):
    before = {name: tensor.bfloat16() for name, tensor in base_tensors().items()}
    after = before | {"model.norm.weight": before["model.norm.weight"] + torch.linspace(0, 1, 48).bfloat16()}
    after[f"{LAYER}.input_layernorm.weight"] = torch.linspace(1.0, 70000.0, 48).bfloat16()
    base = checkpoint("base", before)
    stored_kinds(base, checkpoint("tuned", after), tmp_path)
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.slots["model.norm.weight::delta"].dtype == "F16"
        assert artifact.slots[f"{LAYER}.input_layernorm.weight::delta"].dtype == "F32"  # beyond fp16's range
    decompress(tmp_path / "d.safetensors", base, tmp_path / "merged")
    with Checkpoint(tmp_path / "merged") as merged:
        for name, weight in after.items():
            assert torch.equal(merged.tensor(name), weight)


def test_a_matrix_smaller_than_its_factors_and_a_router_are_kept_dense(checkpoint, tmp_path):
    names = (f"{LAYER}.mlp.tiny_proj.weight", f"{LAYER}.mlp.gate.weight")
    shapes = ((3, 3), (8, 48))
    generator = torch.Generator().manual_seed(2)
    before = {n: torch.randn(s, generator=generator) for n, s in zip(names, shapes, strict=True)}
    after = {n: w + torch.randn(w.shape, generator=generator) for n, w in before.items()}
    base, tuned = checkpoint("base", before), checkpoint("tuned", after)
    assert stored_kinds(base, tuned, tmp_path) == dict.fromkeys(names, "raw")
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        for name in names:
            torch.testing.assert_close(delta_tensor(artifact, name), after[name] - before[name], rtol=1e-3, atol=1e-3)


FUSED = {
    "phi3-qkv": (
        f"{LAYER}.self_attn.qkv_proj.weight",
        (96, 48),
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        [(48, 48), (24, 48), (24, 48)],
    ),
    "phi3-gate-up": (f"{LAYER}.mlp.gate_up_proj.weight", (192, 48), {}, [(96, 48)] * 2),
    "gpt2": ("h.0.attn.c_attn.weight", (48, 144), {"model_type": "gpt2"}, [(48, 48)] * 3),
    "experts-down": (f"{LAYER}.mlp.experts.down_proj", (3, 48, 32), {"hidden_size": 48}, [(48, 32)] * 3),
    "experts-gate-up": (f"{LAYER}.mlp.experts.gate_up_proj", (2, 64, 48), {"hidden_size": 48}, [(32, 48)] * 4),
    "experts-transposed": (f"{LAYER}.mlp.experts.gate_up_proj", (2, 48, 64), {"hidden_size": 48}, [(32, 48)] * 4),
    "experts-down-transposed": (f"{LAYER}.mlp.experts.down_proj", (2, 32, 48), {"hidden_size": 48}, [(48, 32)] * 2),
}


@pytest.mark.parametrize(("name", "shape", "config", "parts"), FUSED.values(), ids=FUSED)
def test_fused_transposed_and_expert_weights_split_into_projections(checkpoint, tmp_path, name, shape, config, parts):
    generator = torch.Generator().manual_seed(5)
    before = {name: torch.randn(shape, generator=generator), "model.norm.weight": torch.ones(4)}
    after = before | {name: before[name] + 0.1 * torch.randn(shape, generator=generator)}
    base, tuned = checkpoint("base", before, **config), checkpoint("tuned", after, **config)
    compress(base, tuned, tmp_path / "d.safetensors", ImPartConfig(ratio=2.0, beta=0.0, c=0.0, value_dtype="fp16"))
    shapes = {key: tuple(value.shape) for key, value in before.items()}
    verify(tmp_path / "d.safetensors", base_shapes=shapes)
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        found = [artifact.records[f"{name}#{i}"].shape for i in range(len(parts))]
    assert found == parts
    decompress(tmp_path / "d.safetensors", base, tmp_path / "merged", dtype="fp32")
    with Checkpoint(tmp_path / "merged") as merged:
        change, wanted = merged.tensor(name) - before[name], after[name] - before[name]
        assert (change - wanted).norm() < 0.8 * wanted.norm()
        assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), 0) > 0.6


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda t: t.pop(UP), "up_proj"),
        (lambda t: t.update({"extra.weight": torch.ones(2, 2)}), "extra.weight"),
        (lambda t: t[UP].view(-1)[5:6].fill_(float("nan")), "up_proj.*NaN"),
        (lambda t: t.update({UP: t[UP][:90]}), "up_proj.*shape"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "up_proj.*dtype"),
        (lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:30]}), "fewer rows"),
    ],
    ids=["missing", "unknown", "nan", "shape", "integer", "vocabulary"],
)
def test_a_broken_fine_tune_is_refused_by_name_and_leaves_nothing(checkpoint, tmp_path, damage, word):
    tuned = tuned_tensors()
    damage(tuned)
    base, broken = checkpoint("base", base_tensors()), checkpoint("broken", tuned)
    with pytest.raises(CheckpointError, match=word):
        compress(base, broken, tmp_path / "d.safetensors", RATIO_4)
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("rows_dtype", "stored", "error"), [("int8", "I8", 0.01), ("fp16", "F16", 1e-3)])
def test_changed_rows_are_stored_as_asked_and_counted(checkpoint, tmp_path, rows_dtype, stored, error):
    tuned = base_tensors()
    change = torch.zeros(40, 48)
    change[[3, 17, 39]] = 0.01 * torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    tuned["model.embed_tokens.weight"] += change
    config = ImPartConfig(rows_dtype=rows_dtype)
    base = checkpoint("base", base_tensors())
    compress(base, checkpoint("tuned", tuned), tmp_path / "d.safetensors", config)
    verify(tmp_path / "d.safetensors")
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.slots["model.embed_tokens.weight::row_delta"].dtype == stored
        found = delta_tensor(artifact, "model.embed_tokens.weight")
    assert (found - change).norm() <= error * change.norm()
    assert (found.any(1).nonzero()[:, 0] == torch.tensor([3, 17, 39])).all()


def test_rows_with_outliers_are_not_crushed_to_int8():
    before, after = torch.zeros(4, 2048), torch.full((4, 2048), 0.01)
    after[:, 0] = 1.0
    encoded = encode_rows("model.embed_tokens.weight", before, after)
    assert encoded.arrays.keys() == {"row_idx", "row_delta"}
    assert torch.allclose(torch.from_numpy(encoded.arrays["row_delta"]).float(), after, rtol=1e-3)


def test_a_chat_template_travels_only_where_it_is_not_the_bases(checkpoint, tmp_path):
    base = checkpoint("base", base_tensors())
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for name, template, stored in (("same", "{{ messages }}", None), ("own", "{{ messages[0] }}", "{{ messages[0] }}")):
        tuned = checkpoint(name, tuned_tensors(), eos_token_id=[2, 5])
        (tuned / "chat_template.jinja").write_text(template)
        manifest = compress(base, tuned, tmp_path / f"{name}.safetensors", ImPartConfig(ratio=4.0))
        assert manifest.tokenizer.chat_template == stored
        assert verify(tmp_path / f"{name}.safetensors").manifest.tokenizer.eos_token_id == [2, 5]
