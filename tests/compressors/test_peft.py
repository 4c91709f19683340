"""PEFT LoRA folders become delta files that mean W + scale * B A, and what means something else is refused by name."""

import json
import math

import pytest
import torch

from compressors.artifact import Artifact
from compressors.decompress import decompress, delta_tensor
from compressors.errors import CheckpointError
from compressors.fingerprint import fingerprint
from compressors.peft import import_lora
from compressors.tensors import Checkpoint
from compressors.verify import verify
from tests.compressors.conftest import LAYER, base_tensors
from tests.compressors.lora_folder import pair, write_lora

Q, K, UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.up_proj"
TABLE, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def base(checkpoint):
    return checkpoint("base", base_tensors())


def adapter(rank=4, modules=(Q, UP)):
    tensors = {}
    for i, module in enumerate(modules):
        a, b = pair(tuple(base_tensors()[f"{module}.weight"].shape), rank, i)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return tensors


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()


def imported(tmp_path, base, tensors, **config):
    out = tmp_path / "lora.safetensors"
    import_lora(write_lora(tmp_path / "lora", tensors, **config), base, out)
    verify(out, fingerprint(base), {n: t.shape for n, t in base_tensors().items()})
    return Artifact.open(out)


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 8 / math.sqrt(4)), ({"lora_alpha": 3}, 0.75)],
    ids=["alpha/r", "rslora", "odd-alpha"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pair_means_scaled_b_times_a(tmp_path, base, config, scale, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in adapter().items()}
    with imported(tmp_path, base, tensors, **config) as artifact:
        assert {name: record.kind for name, record in artifact.records.items() if record.kind != "zero"} == {
            f"{Q}.weight": "lowrank",
            f"{UP}.weight": "lowrank",
        }
        for module in (Q, UP):
            torch.testing.assert_close(
                delta_tensor(artifact, f"{module}.weight"), scale * product(tensors, module), rtol=1e-5, atol=1e-6
            )


def test_patterns_set_rank_and_alpha_of_single_modules(tmp_path, base):
    tensors = adapter(4, (Q,)) | adapter(2, (UP,))
    config = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 5}}
    with imported(tmp_path, base, tensors, **config) as artifact:
        torch.testing.assert_close(delta_tensor(artifact, f"{UP}.weight"), 2.5 * product(tensors, UP))
        torch.testing.assert_close(delta_tensor(artifact, f"{Q}.weight"), 2.0 * product(tensors, Q))


def test_a_rank_above_the_matrix_is_stored_dense(tmp_path, base):
    tensors = adapter(32, (K,))
    with imported(tmp_path, base, tensors, r=32) as artifact:
        assert artifact.records[f"{K}.weight"].kind == "raw"
        torch.testing.assert_close(delta_tensor(artifact, f"{K}.weight"), 0.25 * product(tensors, K))


def test_a_fused_projection_is_split_into_its_matrices(tmp_path, checkpoint):
    fused = {
        "model.layers.0.mlp.gate_up_proj.weight": torch.zeros(32, 16),
        "model.embed_tokens.weight": torch.ones(8, 16),
    }
    base = checkpoint("fused", fused, hidden_size=16)
    a, b = pair((32, 16), 4, 0)
    name = "model.layers.0.mlp.gate_up_proj"
    folder = write_lora(tmp_path / "lora", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    import_lora(folder, base, tmp_path / "d.safetensors")
    decompress(tmp_path / "d.safetensors", base, tmp_path / "merged", "fp32")
    with Checkpoint(tmp_path / "merged") as merged:
        torch.testing.assert_close(merged.tensor(f"{name}.weight"), 2.0 * b @ a)


def test_saved_modules_and_biases_are_kept_whole(tmp_path, checkpoint):
    tensors = base_tensors() | {f"{Q}.bias": torch.zeros(48), "lm_head.weight": torch.ones(40, 48)}
    base = checkpoint("untied", tensors, tie_word_embeddings=False)
    saved = {"lm_head.weight": torch.full((40, 48), 1.5), NORM: torch.full((48,), 1.25)}
    folder = write_lora(
        tmp_path / "lora", adapter() | saved | {f"{Q}.base_layer.bias": torch.ones(48)}, bias="lora_only"
    )
    import_lora(folder, base, tmp_path / "d.safetensors")
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert torch.equal(delta_tensor(artifact, "lm_head.weight"), torch.full((40, 48), 0.5))
        assert torch.equal(delta_tensor(artifact, NORM), torch.full((48,), 0.25))
        assert torch.equal(delta_tensor(artifact, f"{Q}.bias"), torch.ones(48))
        assert artifact.records[TABLE].kind == "zero"


def test_the_same_input_gives_the_same_bytes(tmp_path, base):
    folder = write_lora(tmp_path / "lora", adapter())
    for name in ("one", "two"):
        import_lora(folder, base, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"init_lora_weights": "pissa"}, "pissa"),
        ({}, {"peft_type": "IA3"}, "IA3"),
        ({}, {"layer_replication": [[0, 1]]}, "layer_replication"),
        ({}, {"r": 8}, "rank 8"),
        ({}, {"r": 0}, "at least 1"),
        ({}, {"r": "many"}, "must be numbers"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 50)}, {}, "is this its base"),
        ({f"{Q}.lora_A.weight": torch.full((4, 48), float("nan"))}, {}, "NaN"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 48)}, {}, r"layers\.7\.mlp\.up_proj"),
        ({f"{K}.lora_A.weight": torch.ones(4, 48)}, {}, "has only a"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(48)}, {}, "magnitude"),
        ({"model.embed_tokens.lora_embedding_A": torch.ones(4, 40)}, {}, "lora_embedding_A"),
        ({TABLE: torch.ones(40, 48)}, {}, "ties"),
        ({NORM: torch.ones(47)}, {}, r"model\.norm"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refuses_by_name(tmp_path, base, change, config, told):
    folder = write_lora(tmp_path / "lora", adapter() | change, **config)
    with pytest.raises(CheckpointError, match=told):
        import_lora(folder, base, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_a_pickle_is_never_loaded(tmp_path, base):
    folder = write_lora(tmp_path / "lora", adapter())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        import_lora(folder, base, tmp_path / "d.safetensors")


def test_a_tied_table_saved_at_both_ends_is_stored_once(tmp_path, base):
    table = base_tensors()[TABLE] + 0.5
    folder = write_lora(tmp_path / "lora", adapter() | {TABLE: table, "lm_head.weight": table.clone()})
    import_lora(folder, base, tmp_path / "d.safetensors")
    with Artifact.open(tmp_path / "d.safetensors") as artifact:
        assert artifact.records[TABLE].kind == "rows"
        assert "lm_head.weight" not in artifact.records


def test_a_damaged_config_is_named(tmp_path, base):
    folder = write_lora(tmp_path / "lora", adapter())
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        import_lora(folder, base, tmp_path / "d.safetensors")
