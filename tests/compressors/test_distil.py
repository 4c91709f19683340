"""BitDelta's scales, distilled: gradients by autograd, the loss by its logits, a tiny Llama that comes closer to its fine-tune."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, encode_bitdelta
from compressors.calibration import Calibration
from compressors.compress import compress
from compressors.distil import SignedProduct, loss_of
from compressors.divergence import Divergence
from compressors.errors import BudgetError, CheckpointError
from compressors.verify import verify
from server.cli import main

STEPS = 40


@pytest.fixture
def calibration(language_pair):
    return Calibration(language_pair[0] / "text.txt", 8, 64)


@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_are_those_of_the_written_out_weight(per_row):
    generator = torch.Generator().manual_seed(0)
    base, x = torch.randn(7, 5, generator=generator), torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    encoded = encode_bitdelta("w", torch.randn(7, 5, generator=generator), BitDeltaConfig(per_row=per_row))
    scale = torch.from_numpy(encoded.arrays["scale"]).requires_grad_()
    signs = torch.tensor([(encoded.arrays["signs"][i // 8] >> i % 8 & 1) * 2.0 - 1 for i in range(35)])
    signs = signs.float().view(7, 5)
    seen = torch.randn(2, 3, 7, generator=generator)
    found = torch.autograd.grad((SignedProduct.apply(x, scale, base, encoded.arrays["signs"]) * seen).sum(), (x, scale))
    written = x @ (base + scale[:, None] * signs).T
    torch.testing.assert_close(found, torch.autograd.grad((written * seen).sum(), (x, scale)), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(90, 6, generator=generator)
    hidden, reference = torch.randn(2, 2, 4, 6, generator=generator)
    found = loss_of(hidden, reference, head.T @ head / len(head))
    expected = torch.nn.functional.mse_loss(hidden @ head.T, reference @ head.T)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [False, True])
def test_the_model_comes_closer_to_its_fine_tune(language_pair, calibration, tmp_path, per_row):
    _, base, tuned = language_pair
    compress(base, tuned, tmp_path / "plain", BitDeltaConfig(per_row=per_row))
    compress(base, tuned, tmp_path / "d", BitDeltaConfig(per_row=per_row, distil=STEPS), calibration=calibration)
    verify(tmp_path / "d")
    divergence = Divergence(base, tuned, calibration)
    assert divergence.of(tmp_path / "d").kl < 0.95 * divergence.of(tmp_path / "plain").kl
    with Artifact.open(tmp_path / "plain") as plain, Artifact.open(tmp_path / "d") as found:
        assert (plain.manifest.distil, found.manifest.distil) == (None, STEPS)
        signed = [name for name, record in found.records.items() if record.kind == "signs"]
        assert len(signed) == 14
        for name in signed:
            assert (plain.array(f"{name}::signs") == found.array(f"{name}::signs")).all()
            scales = plain.array(f"{name}::scale"), found.array(f"{name}::scale")
            assert scales[0].shape == scales[1].shape
            assert (scales[0] != scales[1]).any()
            assert (scales[1] > 0).all()


def test_the_seed_orders_the_text(language_pair, calibration, tmp_path):
    _, base, tuned = language_pair
    files = []
    for number, seed in enumerate((5, 5, 6)):
        config = BitDeltaConfig(distil=3, seed=seed)
        compress(base, tuned, tmp_path / f"{number}", config, calibration=Calibration(calibration.text, 24, 64))
        files.append((tmp_path / f"{number}").read_bytes())
    assert files[0] == files[1] != files[2]


def test_an_unchanged_projection_stays_unchanged(language_pair, calibration, tmp_path):
    _, base, tuned = language_pair
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    moved = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(moved)
    model.save_pretrained(tmp_path / "one")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "one" / file).write_bytes((tuned / file).read_bytes())
    compress(base, tmp_path / "one", tmp_path / "d", BitDeltaConfig(distil=2), calibration=calibration)
    compress(base, base, tmp_path / "none", BitDeltaConfig(distil=2), calibration=calibration)
    with Artifact.open(tmp_path / "d") as found, Artifact.open(tmp_path / "none") as none:
        assert [n for n, r in found.records.items() if r.kind == "signs"] == ["model.layers.0.mlp.up_proj.weight"]
        assert {record.kind for record in none.records.values()} == {"zero"}


def test_mistakes(language_pair, calibration, tmp_path, capsys):
    root, base, tuned = language_pair
    with pytest.raises(BudgetError, match="--distil needs a text"):
        compress(base, tuned, tmp_path / "d", BitDeltaConfig(distil=1))
    with pytest.raises(BudgetError, match="--seed belongs to bitdelta with --distil"):
        BitDeltaConfig(seed=1)
    with pytest.raises(BudgetError, match="distil must be a number of steps, got -1"):
        BitDeltaConfig(distil=-1)
    text = ["--calibration", str(root / "text.txt"), "--calibration-tokens", "256"]
    command = ["delta", "compress", str(base), str(tuned), "-o", str(tmp_path / "d")]
    for wrong, word in (
        (["--method", "bitdelta", "--distil"], "--distil needs a text: name one with --calibration"),
        (["--method", "bitdelta", "--distil-steps", "3"], "--distil-steps needs --distil"),
        (["--method", "bitdelta", "--distil", "--distil-steps", "0", *text], "--distil-steps must be 1 or more"),
        (
            ["--method", "dare", "--distil", *text],
            "--distil does not belong to the method dare; it belongs to bitdelta",
        ),
        (["--auto", "--distil", *text], "--auto judges bitdelta as it is"),
    ):
        assert main([*command, *wrong]) == 1
        assert word in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    assert main([*command, "--method", "bitdelta", "--distil", "--distil-steps", "2", *text]) == 0
    printed = capsys.readouterr()
    assert "distil 2" in printed.out
    assert "distilling" in printed.err


def test_fused_weights_are_refused(language_pair, calibration, tmp_path):
    from safetensors.torch import load_file, save_file

    _, base, tuned = language_pair
    for folder in (base, tuned):
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix == ".json":
                (tmp_path / folder.name / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        gate = tensors.pop("model.layers.0.mlp.gate_proj.weight")
        up = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        save_file(tensors, tmp_path / folder.name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj\.weight is no linear of its own; compress this model without"
    ):
        compress(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "d", BitDeltaConfig(distil=1), calibration=calibration
        )
